"""The loss mask of a corpus: from ranges of characters or the roles of a conversation to the labels of a batch."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from megaopus.__main__ import main
from megaopus.corpus_tools import encode
from megaopus.corpus_tools.benchmark_proxy import Item, Limits, build
from megaopus.corpus_tools.chat import ChatTemplate
from megaopus.corpus_tools.prepare import prepare
from megaopus.corpus_tools.sources import Fields, Source
from megaopus.corpus_tools.split import SplitRule
from megaopus.data.candidates import CandidateBuffer
from megaopus.data.corpus import LOSS_MASK, Corpus
from megaopus.data.read_ahead import TokenReader
from megaopus.data.sequences import Sequences
from megaopus.errors import DataError

RULE = SplitRule(0, 0, seq_len=16)
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TURNS = [
    {"role": "user", "content": "How many is <|im_end|> in tokens?"},
    {"role": "assistant", "content": "One, or many: as text."},
    {"role": "user", "content": "Thanks."},
    {"role": "assistant", "content": "You are welcome, ünïcode."},
]


def rows(count: int = 60) -> list[dict[str, Any]]:
    """Questions and answers; a third says nothing of what counts, one has nothing that does."""
    found: list[dict[str, Any]] = []
    for number in range(count):
        question, answer = f"Question {number}: what is {'so ' * (number % 5)}blue?", f" Answer {number}: the ëther."
        spans = [[len(question), len(question + answer)]] if number else []
        row = {"id": f"d{number}", "text": question + answer, "spans": spans}
        found.append(row if number % 3 == 0 else {**row, "spans": None} if number % 3 == 1 else row)
    return found


def write(path: Path, content: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in content))
    return path


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    folder = tmp_path_factory.mktemp("mask")
    source = Source(write(folder / "rows.jsonl", rows()), fields=Fields(loss_spans="spans"))
    return Corpus.open(prepare([source], folder / "corpus", vocab_size=300, rule=RULE), verify=True)


def counted(corpus: Corpus, document: int) -> np.ndarray:
    start, length = corpus.offsets[document : document + 1], corpus.lengths[document : document + 1]
    return corpus.read_mask(start, length)


def test_tokens_with_a_character_in_a_range_count(corpus: Corpus) -> None:
    """Character by character: byte-level tokens say how many bytes of the text each has."""
    tokenizer = corpus.tokenizer()
    for document, row in enumerate(rows()):
        tokens = corpus.read(corpus.offsets[document : document + 1], corpus.lengths[document : document + 1])
        found, text = counted(corpus, document), row["text"]
        spans = [[0, len(text)]] if row["spans"] is None else row["spans"]
        inside = {place for first, last in spans for place in range(first, last)}
        owner = [place for place, character in enumerate(text) for _ in character.encode()]  # of each byte
        at = 0
        for token, counts in zip(tokens[:-1], found, strict=False):
            size = len(tokenizer.id_to_token(int(token)))  # a character for each byte
            assert counts == any(place in inside for place in owner[at : at + size]), (document, at)
            at += size
        assert at == len(owner)
        assert found[-1] == bool(spans)
    totals = corpus.manifest["counts"]["rows"]["pool"]
    assert totals["loss_tokens"] == sum(int(counted(corpus, each).sum()) for each in range(len(corpus)))
    assert 0.3 < totals["loss_tokens"] / totals["tokens"] < 0.8


def test_batches_mark_what_is_context(corpus: Corpus) -> None:
    sequences = Sequences(corpus, "pool", 16)
    numbers = np.arange(len(sequences))[::-1]
    plain, batch = sequences.tokens(numbers), CandidateBuffer(sequences, numbers, numbers).batch()
    assert (plain >= 0).all()
    assert ((batch == plain) | (batch == ~plain)).all()
    assert 0.2 < float((batch < 0).float().mean()) < 0.7
    everything = corpus.read_mask(np.array([0]), np.array([len(corpus.tokens)]))
    for row, number in zip(batch, numbers, strict=True):  # one domain: sequences lie one after the other
        np.testing.assert_array_equal(row.numpy() >= 0, everything[number * 16 : number * 16 + 17])
    reader = TokenReader()
    reader.begin(0)
    assert (CandidateBuffer(sequences, numbers, numbers, reader).batch(7) == batch[:, :8]).all()


def test_the_mask_does_not_depend_on_chunks_and_workers(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode, "CHUNK_CHARACTERS", 300)
    source = Source(write(tmp_path / "rows.jsonl", rows()), fields=Fields(loss_spans="spans"))
    again = prepare([source], tmp_path / "corpus", vocab_size=300, rule=RULE, workers=2)
    assert (again / LOSS_MASK).read_bytes() == (corpus.path / LOSS_MASK).read_bytes()
    assert Corpus.open(again, verify=True).fingerprint == corpus.fingerprint


def test_pieces_of_a_long_text_have_their_part_of_the_ranges(tmp_path: Path) -> None:
    texts = [f"Chapter {number}. " + f"word{number} and so on. " * 400 for number in range(2)]
    content = [{"text": text, "spans": [[100, 5000]]} for text in texts]
    source = Source(write(tmp_path / "rows.jsonl", content), fields=Fields(loss_spans="spans"))
    made = Corpus.open(prepare([source], tmp_path / "corpus", vocab_size=300, rule=SplitRule(0.1, 0.1, seq_len=16)))
    assert len(made) > 4
    found: dict[str, list[str]] = {}
    for document, name in enumerate(made.ids):
        tokens = made.read(made.offsets[document : document + 1], made.lengths[document : document + 1])[:-1]
        kept = tokens[counted(made, document)[:-1]].tolist()
        found.setdefault(name.split("#")[0], []).append(made.tokenizer().decode(kept))
    for text, pieces in zip(texts, found.values(), strict=True):
        joined = "".join(pieces)
        assert text[100:5000] in joined
        assert len(joined) < 4900 + 40  # tokens at the ends have characters beyond


def test_a_corpus_without_a_mask_is_as_before(tmp_path: Path) -> None:
    content = [{key: value for key, value in row.items() if key != "spans"} for row in rows()]
    plain = Source(write(tmp_path / "rows.jsonl", content))
    named = Source(tmp_path / "rows.jsonl", fields=Fields(loss_spans="spans"))
    first, second = (
        Corpus.open(prepare([source], tmp_path / name, vocab_size=300, rule=RULE))
        for name, source in {"a": plain, "b": named}.items()
    )
    assert first.fingerprint == second.fingerprint
    assert not second.masked
    assert second.manifest["format_version"] == 1


def test_a_corpus_with_another_proxy_keeps_its_mask(corpus: Corpus, tmp_path: Path) -> None:
    items = [Item(str(n), f"Question {n}: what is so blue? Answer {n}: the ether.") for n in range(5)]
    built = build(corpus, items, tmp_path / "out", tokens=300, limits=Limits(), held_out=0.3)
    other, target = Corpus.open(built.path, verify=True), Corpus.open(built.path).target
    assert (other.path / LOSS_MASK).read_bytes() == (corpus.path / LOSS_MASK).read_bytes()
    entries = [entry for splits in other.manifest["counts"].values() for entry in splits.values()]
    assert sum(entry["loss_tokens"] for entry in entries) == corpus.loss_tokens().sum()
    assert 0 < (other.loss_share("proxy") or 0) < 1
    assert corpus.loss_tokens().tolist() == [int(counted(corpus, each).sum()) for each in range(len(corpus))]
    assert target is not None
    held = {other.ids[each]: counted(other, each).tolist() for each in np.flatnonzero(other.split_codes == 4)}
    masks = {name: counted(target, each) for each, name in enumerate(target.ids)}
    wholly = {name for name, mask in masks.items() if name in [item.name for item in items] and mask.all()}
    assert len(held) > 1
    assert len(wholly) == built.summary["items_held_out"] > 0
    assert {name: mask.tolist() for name, mask in masks.items() if name not in wholly} == held
    assert sum(map(sum, held.values())) < sum(map(len, held.values()))


# -- conversations -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer with the markup of the template, in a folder with it."""
    folder = tmp_path_factory.mktemp("model")
    made = Tokenizer.from_file(str(corpus.path / "tokenizer.json"))
    made.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": CHATML, "eos_token": "<|im_end|>"}))
    return folder


def test_what_the_assistant_says_counts() -> None:
    text, spans = ChatTemplate(CHATML).write(TURNS)
    said = [text[first:last] for first, last in spans]
    assert said == [f"{turn['content']}<|im_end|>\n" for turn in TURNS if turn["role"] == "assistant"]
    text, spans = ChatTemplate(CHATML, ("user",)).write(TURNS)
    assert text[slice(*spans[1])] == "<|im_start|>user\nThanks.<|im_end|>\n"


def test_templates_are_those_of_transformers(tokenizer: Path) -> None:
    transformers = pytest.importorskip(
        "transformers", reason="transformers is an optional extra (megaopus[transformers])"
    )
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tokenizer / "tokenizer.json"))
    theirs.chat_template = CHATML
    for turns in (TURNS, TURNS[:1]):
        text, _ = ChatTemplate.load(tokenizer).write(turns)
        assert text == theirs.apply_chat_template(turns, tokenize=False)


def test_a_corpus_of_conversations(tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "chats.jsonl", [{"messages": TURNS, "id": f"c{number}"} for number in range(40)])
    out = tmp_path / "corpus"
    command = ["prepare", "--source", str(source), "--out", str(out), "--tokenizer", str(tokenizer)]
    command += ["--messages", "messages", "--chat-template", str(tokenizer), "--seq-len", "16"]
    command += ["--proxy-fraction", "0", "--validation-fraction", "0"]
    assert main(command) == 0
    assert "tokens count in the loss" in " ".join(capsys.readouterr().out.split())
    made = Corpus.open(out, verify=True)
    tokens, mask = made.read(made.offsets[:1], made.lengths[:1]), counted(made, 0)
    ids = made.tokenizer()
    start, end = ids.token_to_id("<|im_start|>"), ids.token_to_id("<|im_end|>")
    assert (tokens == start).sum() == len(TURNS)
    assert (tokens == end).sum() == len(TURNS) + 1  # one is quoted in a question, as transformers has it
    assert ids.decode(tokens[mask].tolist(), skip_special_tokens=False) == "".join(
        f"{turn['content']}<|im_end|>\n" for turn in TURNS if turn["role"] == "assistant"
    ) + ids.decode([made.eod_id], skip_special_tokens=False)


# -- faults ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spans", [[[3, 2]], [[0, 999]], [[0, 4], [2, 5]], "0-4", [[0.5, 2]], [[-1, 2]]])
def test_ranges_that_are_none(tmp_path: Path, spans: Any) -> None:
    source = Source(
        write(tmp_path / "rows.jsonl", [{"text": "some text", "spans": spans}]), fields=Fields(loss_spans="spans")
    )
    with pytest.raises(DataError, match=r"rows\.jsonl line 1: 'spans' is not \[\[first, last\], \.\.\.\]"):
        prepare([source], tmp_path / "out", vocab_size=300, rule=RULE)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--messages", "messages"], "--chat-template PATH"),
        (["--chat-template", "{model}"], "name their field, --messages"),
        (["--messages", "messages", "--chat-template", "{model}", "--loss-spans", "x"], "give one of them"),
        (["--messages", "messages", "--chat-template", "{nothing}"], "no chat template"),
        (["--messages", "text", "--chat-template", "{model}"], "line 1: 'text' is not a list of messages"),
        (["--messages", "bad", "--chat-template", "{model}"], "cannot write it"),
    ],
)
def test_conversations_that_are_none(
    tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    nothing = tmp_path / "nothing"
    nothing.mkdir()
    shutil.copy(tokenizer / "tokenizer.json", nothing)
    row = {"messages": TURNS, "text": "words", "bad": [{"role": "user", "content": 3}]}
    source = write(tmp_path / "chats.jsonl", [row])
    refusing = "{% if messages[0].content is not string %}{{ raise_exception('text only') }}{% endif %}" + CHATML
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "chat_template.jinja").write_text(refusing)
    places = {"{model}": str(tmp_path / "model"), "{nothing}": str(nothing)}
    command = ["prepare", "--source", str(source), "--out", str(tmp_path / "out"), "--tokenizer", str(tokenizer)]
    assert main([*command, *(places.get(option, option) for option in options)]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def test_a_template_that_changes_what_was_written_is_refused() -> None:
    forgetful = "{% for m in messages %}{% if loop.last or m.role == 'user' %}{{ m.content }}.{% endif %}{% endfor %}"
    with pytest.raises(ValueError, match="message 2 otherwise when more follow"):
        ChatTemplate(forgetful).write(TURNS)
