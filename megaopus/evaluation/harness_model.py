"""Shows a model to lm-eval: it asks for texts, this hands tokens to every rank and texts back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from megaopus.corpus_tools.chat import ChatTemplate
from megaopus.errors import DataError
from megaopus.evaluation.likelihood import Likelihood
from megaopus.evaluation.model import Words

NEW_TOKENS = 256
"""Tokens that are generated where a task does not say how many; as lm-eval has it."""
_MOST_NEW = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


class HarnessModel(TemplateLM):
    """Answers lm-eval's requests. Every rank has one, is given the same requests and gets the same answers."""

    def __init__(self, likelihood: Likelihood, words: Words, *, apart: bool = False):
        """``apart``: context and continuation are encoded each by itself, not as one text that is then cut."""
        super().__init__()
        self._likelihood, self._words, self._apart = likelihood, words, apart
        self._start = words.tokenizer.decode([words.prefix], skip_special_tokens=False)
        self._chat: ChatTemplate | None = None

    # -- text and tokens --------------------------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        return self._words.end

    @property
    def prefix_token_id(self) -> int:
        return self._words.prefix

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids; with what the tokenizer puts around a text, unless that is there or not wanted."""
        special = not string.startswith(self._start) if add_special_tokens is None else add_special_tokens
        return self._words.tokenizer.encode(string, add_special_tokens=special).ids

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        if self._apart:
            return self.tok_encode(context), self.tok_encode(continuation, add_special_tokens=False)
        return super()._encode_pair(context, continuation)

    # -- requests ---------------------------------------------------------------------------------------------------

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        pairs = [(context, continuation) for _, context, continuation in requests]
        return [(each.logprob, each.greedy) for each in self._likelihood.continuations(pairs)]

    def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> list[float]:
        """Log-likelihood of whole texts, cut into windows as long as the model reads; each token counts once."""
        owners, pairs = [], []
        for number, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            windows = get_rolling_token_windows(
                tokens, prefix_token=self.prefix_token_id, max_seq_len=self._likelihood.max_length, context_len=1
            )
            for window in windows:
                owners.append(number)
                pairs.append(make_disjoint_window(window))
        totals = [0.0] * len(requests)
        for owner, answer in zip(owners, self._likelihood.continuations(pairs), strict=True):
            totals[owner] += answer.logprob
        return totals

    def generate_until(self, requests: Any, disable_tqdm: bool = True) -> list[str]:
        """Continue texts greedily, each up to the first of its stop strings. Raises DataError where a task samples."""
        texts = [""] * len(requests)
        groups: dict[tuple[int, tuple[str, ...]], list[int]] = {}
        for number, request in enumerate(requests):
            settings = dict(request.args[1])
            if settings.get("do_sample") and settings.get("temperature", 1.0) > 0:
                raise DataError(f"{request.task_name}: samples its answers; here they are generated greedily alone")
            most = next((int(settings[name]) for name in _MOST_NEW if settings.get(name)), NEW_TOKENS)
            stops = settings.get("until") or []
            stops = (stops,) if isinstance(stops, str) else tuple(stops)
            groups.setdefault((most, stops), []).append(number)
        for (most, stops), numbers in groups.items():
            contexts = [self.tok_encode(requests[number].args[0]) for number in numbers]
            added = self._likelihood.greedy(contexts, self._room(most), self._stopping(stops))
            for number, tokens in zip(numbers, added, strict=True):
                texts[number] = self._cut(tokens, stops)
        return texts

    def _room(self, most: int) -> int:
        """Tokens to generate: as many as asked for, unless the model has not that many positions and half of them."""
        return min(most, self._likelihood.max_length // 2)

    def _stopping(self, stops: Sequence[str]) -> Callable[[int, list[int]], bool]:
        def done(number: int, tokens: list[int]) -> bool:
            if tokens[-1] == self._words.end:
                return True
            text = self._decoded(tokens)
            return any(stop and stop in text for stop in stops)

        return done

    def _cut(self, tokens: list[int], stops: Sequence[str]) -> str:
        """Write what was generated, up to the first stop string."""
        text = self._decoded(tokens[:-1] if tokens and tokens[-1] == self._words.end else tokens)
        for stop in filter(None, stops):
            text = text.split(stop)[0]
        return text

    def _decoded(self, tokens: list[int]) -> str:
        return self._words.tokenizer.decode(tokens, skip_special_tokens=True)

    # -- conversations ----------------------------------------------------------------------------------------------

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Write a conversation by the template beside the tokenizer. Raises DataError if there is none."""
        if self._chat is None:
            self._chat = ChatTemplate.load(self._words.folder)
        try:
            if add_generation_prompt:
                return self._chat.rendered(chat_history, True)
            *before, last = chat_history  # which the model is to go on with, so that nothing may end it
            return self._chat.rendered(before, True) + last["content"]
        except ValueError as error:
            raise DataError(f"{self._words.folder}: {error}") from error

    @property
    def tokenizer_name(self) -> str:
        return str(self._words.folder).replace("/", "__")
