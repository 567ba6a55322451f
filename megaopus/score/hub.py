"""Models of the Hugging Face hub, by name or path: the loss under a causal language model, and sequence classifiers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from megaopus.corpus_tools.readers.stored import needed
from megaopus.data.corpus import Corpus
from megaopus.data.scores import HIGHEST, LOWEST
from megaopus.errors import DataError
from megaopus.score.base import Begin
from megaopus.selection.config import PASS_TOKENS

FIRST, MEAN = "first", "mean"
"""Windows of a document that count."""


class _HubModel:
    """Says what both have in common: loading, cutting a document into windows, passes over windows of like length."""

    batch_tokens = 1 << 15
    chunk_tokens = 1 << 18
    kind: str
    """Class of transformers that reads the model."""

    def __init__(self, corpus: Corpus, name: str, windows: str, max_tokens: int | None, device: str):
        """Args:
        corpus: whose documents are scored.
        name: of the hub, or a folder.
        windows: first: only the first window of a document counts; mean: all, by their number of tokens.
        max_tokens: of a window; None: what the model takes, 512 if it does not say.
        device: auto, cpu or cuda.

        Raises:
            DataError: the package is missing, or there is no such model.
        """
        transformers = needed("transformers", f"--model {name}", "transformers")
        self._corpus, self._windows = corpus, windows
        try:
            self._tokenizer = transformers.AutoTokenizer.from_pretrained(name)
            model = getattr(transformers, self.kind).from_pretrained(name)
        except (OSError, ValueError, KeyError) as error:
            said = " ".join(str(error).split())[:200]
            raise DataError(
                f"--model {name}: cannot be read as {self.kind} ({said}); name a model or its folder"
            ) from error
        self._device = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
        self._model = model.to(self._device).eval()
        limits = (self._tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", None))
        limit = min((size for size in limits if size and size < 1 << 20), default=512)
        if max_tokens is not None and not 1 < max_tokens <= limit:
            raise DataError(f"--max-tokens {max_tokens}: must lie in [2, {limit}] for {name}")
        self._size = max_tokens or limit
        self.about: dict[str, Any] = {"model": name, "windows": windows, "max_tokens": self._size}
        self.stamps = [self._digest()]

    def _digest(self) -> float:
        """Tells two models of one name apart: the sum of all weights."""
        return float(sum(parameter.detach().double().sum() for parameter in self._model.parameters()))

    def ready(self, work: Path, begin: Begin) -> None:
        """Everything is loaded."""

    def finish(self, folder: Path, work: Path) -> None:
        """Nothing but the column."""

    def close(self) -> None:
        """Nothing is held but memory."""

    def _texts(self, documents: np.ndarray) -> list[str]:
        return self._corpus.texts(documents)

    def _averaged(self, owners: list[int], values: Tensor, weights: Tensor, count: int) -> np.ndarray:
        """(count,) weighted mean of windows' ``values`` by the document they are of; NaN where there are none."""
        where, sums = torch.tensor(owners, dtype=torch.int64), torch.zeros(2, count, dtype=torch.float64)
        sums[0].index_add_(0, where, values * weights)
        sums[1].index_add_(0, where, weights)
        return (sums[0] / sums[1]).numpy()

    @torch.no_grad()
    def _passes(self, windows: list[list[int]], run: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """(n,) float64 of ``run(tokens (b, T), mask (b, T))`` over all windows, those of like length together."""
        found = torch.empty(len(windows), dtype=torch.float64)
        order = sorted(range(len(windows)), key=lambda n: len(windows[n]))
        pad = self._tokenizer.pad_token_id or 0
        most = PASS_TOKENS["cuda" if self._device != "cpu" else "cpu"]
        while order:
            size = max(1, most // len(windows[order[-1]]))  # the longest first
            rows, order = order[-size:], order[:-size]
            width = max(len(windows[n]) for n in rows)
            tokens = torch.full((len(rows), width), pad)
            mask = torch.zeros(len(rows), width, dtype=torch.int64)
            for row, n in enumerate(rows):
                tokens[row, : len(windows[n])] = torch.tensor(windows[n])
                mask[row, : len(windows[n])] = 1
            found[rows] = run(tokens.to(self._device), mask.to(self._device)).double().cpu()
        return found


class HubPerplexity(_HubModel):
    """Mean loss (nats) of a document's tokens, by the model's own tokenizer, under a causal language model.

    The first is predicted from the beginning-of-text token (the end-of-text one where there is no other). Windows of
    ``max_tokens`` predicted tokens less one; each begins with the last token of the one before.
    """

    best = LOWEST
    kind = "AutoModelForCausalLM"

    def __init__(
        self, corpus: Corpus, name: str, windows: str = MEAN, max_tokens: int | None = None, device: str = "auto"
    ):
        super().__init__(corpus, name, windows, max_tokens, device)
        self.about = {"method": "perplexity", **self.about}
        tokenizer = self._tokenizer
        first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        self._first = [] if first is None else [first]

    def scores(self, documents: np.ndarray) -> np.ndarray:
        """(n,) float64; NaN for a document without a token to predict."""
        windows: list[list[int]] = []
        owners: list[int] = []
        for place, text in enumerate(self._texts(documents)):
            ids = self._first + self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            for start in range(0, len(ids) - 1, self._size - 1):
                windows.append(ids[start : start + self._size])
                owners.append(place)
                if self._windows == FIRST:
                    break
        losses = self._passes(windows, self._losses) if windows else torch.empty(0, dtype=torch.float64)
        counts = torch.tensor([len(window) - 1 for window in windows], dtype=torch.float64)
        return self._averaged(owners, losses, counts, len(documents))

    def _losses(self, tokens: Tensor, mask: Tensor) -> Tensor:
        logits = self._model(input_ids=tokens, attention_mask=mask).logits[:, :-1].float()
        losses = F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none").double()
        counted = mask[:, 1:].double()
        return (losses * counted).sum(1) / counted.sum(1)


class Classifier(_HubModel):
    """A sequence classifier's output: its one number (FineWeb-Edu's), else the chance of ``label``, or its logit.

    A document is cut into windows of ``max_tokens`` with the model's special tokens in each.
    """

    best = HIGHEST
    kind = "AutoModelForSequenceClassification"

    def __init__(
        self,
        corpus: Corpus,
        name: str,
        windows: str = FIRST,
        max_tokens: int | None = None,
        device: str = "auto",
        label: str | None = None,
        logit: bool = False,
    ):
        """``label``: name or number, where there are several; ``logit``: its raw number (QuRating's), no chance."""
        super().__init__(corpus, name, windows, max_tokens, device)
        names = [str(self._model.config.id2label[index]) for index in range(self._model.config.num_labels)]
        if len(names) == 1:
            self._label = 0
        elif label in names:
            self._label = names.index(str(label))
        elif label is not None and label.isdecimal() and int(label) < len(names):
            self._label = int(label)
        else:
            what = "several labels" if label is None else f"no label {label!r}"
            raise DataError(f"--model {name}: {what}; give the one that is scored with --label: {', '.join(names)}")
        self._logit = logit or len(names) == 1
        self.about = {"method": "classifier", **self.about, "label": names[self._label], "logit": self._logit}

    def scores(self, documents: np.ndarray) -> np.ndarray:
        """(n,) float64; NaN for a document without a token."""
        cut = self._tokenizer(
            self._texts(documents),
            truncation=True,
            max_length=self._size,
            return_overflowing_tokens=True,
            return_special_tokens_mask=True,
        )
        owners = list(cut["overflow_to_sample_mapping"])
        first = [n for n, owner in enumerate(owners) if n == 0 or owner != owners[n - 1]]
        taken = list(range(len(owners))) if self._windows == MEAN else first
        counts = [cut["special_tokens_mask"][n].count(0) for n in taken]
        values = self._passes([cut["input_ids"][n] for n in taken], self._outputs)
        weights = torch.tensor(counts, dtype=torch.float64)
        return self._averaged([owners[n] for n in taken], values, weights, len(documents))

    def _outputs(self, tokens: Tensor, mask: Tensor) -> Tensor:
        logits = self._model(input_ids=tokens, attention_mask=mask).logits.float()
        return logits[:, self._label] if self._logit else logits.softmax(1)[:, self._label]
