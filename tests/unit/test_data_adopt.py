"""Token files that somebody else wrote are read where they lie, and give the tokens that their own readers give."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megaopus.cli.main import main
from megaopus.corpus_tools.adopt import adopt
from megaopus.corpus_tools.prepare import prepare
from megaopus.corpus_tools.sources import Source
from megaopus.corpus_tools.split_rule import SplitRule
from megaopus.data.corpus import SPLITS, Corpus
from megaopus.data.sequences import Sequences
from megaopus.errors import DataError

EOD, RULE = 0, SplitRule(0.05, 0.05, seq_len=16)


def documents(count: int, seed: int) -> list[list[int]]:
    """Token ids of some documents, the last of each ``EOD``; some of them twice."""
    draw = random.Random(seed)
    found = [[draw.randrange(1, 250) for _ in range(draw.randrange(1, 60))] + [EOD] for _ in range(count)]
    return [*found, *found[:5]]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "s.jsonl").write_text("".join(json.dumps({"text": f"some text {n} " * 9}) + "\n" for n in range(60)))
    return prepare([Source(folder / "s.jsonl")], folder / "c", vocab_size=257, rule=RULE) / "tokenizer.json"


def megatron(folder: Path, found: list[list[int]], name: str = "web") -> str:
    """Write a PREFIX by Megatron's own builder, two sequences a document where it is long."""
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(folder / f"{name}.bin"), dtype=np.uint16)
    for tokens in found:
        parts = [tokens[:30], tokens[30:]] if len(tokens) > 30 else [tokens]
        for part in parts:
            builder.add_item(torch.tensor(part))
        builder.end_document()
    builder.finalize(str(folder / f"{name}.idx"))
    return str(folder / name)


def datatrove(folder: Path, found: list[list[int]], name: str = "trove") -> str:
    """Write NAME.ds and its index as datatrove's DocumentTokenizer does."""
    (folder / f"{name}.ds").write_bytes(b"".join(struct.pack(f"<{len(each)}H", *each) for each in found))
    ends = np.cumsum([len(each) for each in found])
    (folder / f"{name}.ds.index").write_bytes(struct.pack(f"<{len(ends)}Q", *ends))
    return str(folder / f"{name}.ds")


def bare(folder: Path, found: list[list[int]], name: str = "bare") -> str:
    """Write a .bin of uint16 as nanoGPT's prepare.py does."""
    np.concatenate(found).astype("<u2").tofile(folder / f"{name}.bin")
    return str(folder / f"{name}.bin")


FORMATS: dict[str, Callable[[Path, list[list[int]]], str]] = {
    "megatron": megatron,
    "datatrove": datatrove,
    "bare": bare,
}


def of_each(folder: Path, parts: list[list[list[int]]]) -> list[str]:
    """Write three files, of two domains."""
    return [
        f"{domain}={write(folder, part)}"
        for domain, write, part in zip(("web", "books", "web"), FORMATS.values(), parts, strict=True)
    ]


@pytest.mark.parametrize("kind", FORMATS)
def test_tokens_are_those_of_the_files(kind: str, tokenizer: Path, tmp_path: Path) -> None:
    found = documents(1000, 1)
    place = FORMATS[kind](tmp_path, found)
    corpus = Corpus.open(adopt([place], tmp_path / "c", tokenizer=tokenizer, eod=EOD, rule=RULE), verify=True)
    spans = [(corpus.offsets[n : n + 1], corpus.lengths[n : n + 1]) for n in range(1005)]
    assert [corpus.read(*span).tolist() for span in spans] == found
    assert not list(corpus.path.glob("*.bin"))  # nothing was copied
    if kind == "megatron":
        from megatron.core.datasets.indexed_dataset import IndexedDataset

        theirs = IndexedDataset(place)
        for number in range(1000):
            first, last = theirs.document_indices[number : number + 2]
            assert np.concatenate(theirs[first:last]).tolist() == found[number]
    assert corpus.domains == [Path(place).stem]
    assert all((corpus.split_codes == code).any() for code in range(len(SPLITS)))
    assert (corpus.split_codes[:5] == corpus.split_codes[1000:]).all()  # copies share a split


def test_several_files_are_one_corpus(tokenizer: Path, tmp_path: Path) -> None:
    parts = [documents(200, seed) for seed in (2, 3, 4)]
    given = of_each(tmp_path, parts)
    rule = SplitRule(0.1, 0.1, wanted=("books",), seq_len=16)
    corpus = Corpus.open(adopt(given, tmp_path / "c", tokenizer=tokenizer, eod=EOD, rule=rule), verify=True)
    everything = [token for part in parts for each in part for token in each]
    assert corpus.tokens[:].tolist() == everything
    assert corpus.tokens[100:9000].tolist() == everything[100:9000]
    positions = np.random.default_rng(0).integers(0, len(everything), 500)
    assert corpus.tokens[positions].tolist() == [everything[n] for n in positions]
    assert corpus.domain_codes.tolist() == [1] * 205 + [0] * 205 + [1] * 205
    assert set(corpus.domain_codes[corpus.split_codes == SPLITS.index("proxy")]) == {0}
    pool = Sequences(corpus, "pool", 16)
    stream = [
        token
        for code in (0, 1)
        for number in np.flatnonzero((corpus.split_codes == 0) & (corpus.domain_codes == code))
        for token in (parts[0] + parts[1] + parts[2])[number]
    ]
    first = pool.read(np.arange(len(pool)))
    assert first[0].tolist() == stream[:17]
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    other = Corpus.open(adopt(of_each(moved, parts), moved / "c", tokenizer=tokenizer, eod=EOD, rule=rule))
    assert other.fingerprint == corpus.fingerprint  # where files lie does not matter
    assert len(corpus.ids) == len(corpus)


def test_the_verb_adopts(tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place, out = megatron(tmp_path, documents(300, 5)), tmp_path / "c"
    given = ["prepare", "--adopt", f"web={place}", "--tokenizer", str(tokenizer), "--out", str(out), "--seq-len", "16"]
    assert main(given) == 0
    assert "web" in capsys.readouterr().out
    assert Corpus.open(out).domains == ["web"]
    assert main([*given, "--overwrite", "--text-field", "x"]) == 2
    assert "--text-field is about texts" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("no eod", r"web\.bin: \d+ of \d+ documents do not end with the token 9 .*--append-eod"),
        ("cut off", r"web\.bin: [\d,]+ bytes, but its index has [\d,]+; copy both again"),
        (
            "other tokenizer",
            r"web\.bin: has the token 60000, the tokenizer 0 to 2\d\d; name",
        ),
        ("nothing", r"none: no token file: there is neither none\.bin nor none\.ds with its \.ds\.index"),
        ("no index", r"web\.bin: does not end with the token 9 .*--eod"),
        ("eod beyond", r"--eod 70000: the tokenizer .* has tokens 0 to"),
    ],
)
def test_files_that_cannot_be_adopted(damage: str, message: str, tokenizer: Path, tmp_path: Path) -> None:
    found = documents(50, 6)
    if damage == "other tokenizer":
        found[0][0] = 60000
    place, eod = megatron(tmp_path, found), {"no eod": 9, "no index": 9, "eod beyond": 70000}.get(damage, EOD)
    if damage == "cut off":
        Path(f"{place}.bin").write_bytes(Path(f"{place}.bin").read_bytes()[:-2])
    if damage == "no index":
        Path(f"{place}.idx").unlink()
    given = str(tmp_path / "none") if damage == "nothing" else place
    with pytest.raises(DataError, match=message):
        adopt([given], tmp_path / "c", tokenizer=tokenizer, eod=eod, rule=RULE)
    assert not (tmp_path / "c").exists()


def test_tokens_that_changed_where_they_lie_are_noticed(tokenizer: Path, tmp_path: Path) -> None:
    place = Path(f"{megatron(tmp_path, documents(50, 7))}.bin")
    adopt([str(place)], tmp_path / "c", tokenizer=tokenizer, eod=EOD, rule=RULE)
    content = place.read_bytes()
    place.write_bytes(content[:-2])
    with pytest.raises(DataError, match=r"web\.bin: cut off"):
        Corpus.open(tmp_path / "c")
    place.write_bytes(content[:10] + b"\x07\x00" + content[12:])
    with pytest.raises(DataError, match=r"web\.bin: changed since it was prepared"):
        Corpus.open(tmp_path / "c", verify=True)
