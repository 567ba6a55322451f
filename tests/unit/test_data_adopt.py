"""Token files that somebody else wrote are read where they lie, and give the tokens that their own readers give."""

from __future__ import annotations

import json
import random
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megaopus.cli.main import main
from megaopus.config.compose import compose
from megaopus.corpus_tools.adopt import adopt
from megaopus.corpus_tools.blend import blend_of
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


# -- data sets ---------------------------------------------------------------------------------------------------------


def saved(folder: Path, columns: dict[str, Any], kind: str) -> Path:
    """Write a data set as ``datasets`` saves it (in two files), or as parquet files in a folder."""
    import datasets

    made = datasets.Dataset.from_dict(columns)
    if kind == "arrow":
        made.save_to_disk(str(folder / "saved"), num_shards=2)
        return folder / "saved"
    (folder / "rows").mkdir()
    for number in range(2):
        made.shard(2, number, contiguous=True).to_parquet(str(folder / "rows" / f"{number}.parquet"))
    return folder / "rows"


def tokens_of(corpus: Corpus) -> list[list[int]]:
    """Tokens of each document."""
    ends = (corpus.offsets + corpus.lengths).tolist()
    return [corpus.tokens[first:end].tolist() for first, end in zip(corpus.offsets.tolist(), ends, strict=True)]


@pytest.mark.parametrize("kind", ["arrow", "parquet"])
def test_rows_of_a_tokenised_data_set_are_documents(kind: str, tokenizer: Path, tmp_path: Path) -> None:
    """Each row as it is, or with the end it lacks; copied, and after what is read where it lies."""
    found = documents(300, 8)
    place = saved(tmp_path, {"input_ids": found, "unread": [str(each) for each in found]}, kind)
    made = adopt([str(place)], tmp_path / "c", tokenizer=tokenizer, eod=EOD, rule=RULE)
    corpus = Corpus.open(made, verify=True)
    assert tokens_of(corpus) == found
    assert corpus.domains == [place.name]
    assert (corpus.split_codes[:5] == corpus.split_codes[300:]).all()  # copies share a split
    with_web = adopt(
        [f"rows={place}", megatron(tmp_path, found[:50])], tmp_path / "both", tokenizer=tokenizer, eod=EOD, rule=RULE
    )
    assert tokens_of(Corpus.open(with_web, verify=True)) == [*found[:50], *found]
    Path(f"{place}-moved").mkdir()
    place.rename(Path(f"{place}-moved") / "x")  # the tokens were copied
    assert tokens_of(Corpus.open(made)) == found


def test_rows_without_an_end_filled_up_or_packed(
    tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = documents(200, 9)
    bare, longest = [each[:-1] for each in found], max(map(len, found))
    filled = [each + [7] * (longest - len(each)) for each in bare]
    masks = [[1] * len(each) + [0] * (longest - len(each)) for each in bare]
    stream = [token for each in found for token in each]
    columns = {
        "--append-eod": {"ids": filled, "attention_mask": masks},
        "--packed": {"ids": [stream[n : n + 64] for n in range(0, len(stream), 64)]},
    }
    for option, each in columns.items():
        folder = tmp_path / option
        folder.mkdir()
        given = ["prepare", "--adopt", f"x={saved(folder, each, 'parquet')}", "--tokenizer", str(tokenizer)]
        given += ["--seq-len", "16", "--out", str(folder / "c"), "--column", "ids"]
        assert main(given) == 2
        said = r"rows: rows do not end with the token 0 \(row 0 .*--append-eod .* --packed"
        assert re.search(said, capsys.readouterr().err)
        assert not (folder / "c").exists()
        assert main([*given, option]) == 0, capsys.readouterr()
        assert tokens_of(Corpus.open(folder / "c", verify=True)) == found


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"text": ["a", "b"]}, r"no column 'input_ids' \(columns: .*--column"),
        ({"input_ids": [[[1, 0]], [[2, 0]]]}, r"column 'input_ids' is of list<.*list<.*, not of lists of token ids"),
        ({"input_ids": [[5, 60000, 0]]}, r"has the token 60000, the tokenizer 0 to"),
        ({"input_ids": [[1, None, 0]]}, r"column 'input_ids' has null in its lists"),
        ({"input_ids": [None, None]}, r"column 'input_ids' is of null|no tokens in column 'input_ids'"),
    ],
)
def test_rows_that_are_no_tokens(columns: dict[str, Any], message: str, tokenizer: Path, tmp_path: Path) -> None:
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    with pytest.raises(DataError, match=message):
        adopt([str(tmp_path / "x.parquet")], tmp_path / "c", tokenizer=tokenizer, eod=EOD, rule=RULE)
    assert not (tmp_path / "c").exists()


def test_folders_that_are_no_data_set(tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(DataError, match=r"several data sets; name one of them, .*/train say \(train, test\)"):
        adopt([str(tmp_path)], tmp_path / "c", tokenizer=tokenizer, eod=EOD)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty: no \.arrow or \.parquet file in it"):
        adopt([str(tmp_path / "empty")], tmp_path / "c", tokenizer=tokenizer, eod=EOD)
    with pytest.raises(DataError, match=r"--adopt s3://b/c: is an address"):
        adopt(["s3://b/c"], tmp_path / "c", tokenizer=tokenizer, eod=EOD)


# -- blends ------------------------------------------------------------------------------------------------------------


def test_a_blend_of_megatron_s_command_line(
    tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The corpus is that of the paths, and the weights are told as the setting that a run takes."""
    places = [megatron(tmp_path, documents(100, n), name) for n, name in ((10, "web"), (11, "books"))]
    given = ["prepare", "--tokenizer", str(tokenizer), "--seq-len", "16", "--adopt", "0.3", places[0], "0.7", places[1]]
    assert main([*given, "--out", str(tmp_path / "c")]) == 0
    (setting,) = re.findall(r"setting of the run: '(data\.weights=\S+)'", capsys.readouterr().out)
    manifest = json.loads((tmp_path / "c" / "manifest.json").read_text())
    assert manifest["provenance"]["blend"] == {"web": 0.3, "books": 0.7}
    config = compose([f"data.path={tmp_path / 'c'}", "data.seq_len=16", "model=tiny", setting])
    assert config.data.weights == [[0, {"web": 0.3, "books": 0.7}]]
    plain = adopt(places, tmp_path / "plain", tokenizer=tokenizer, eod=EOD, rule=SplitRule(seq_len=16))
    assert Corpus.open(plain).fingerprint == manifest["fingerprint"]
    assert blend_of([f"0.3 {places[0]} 0.7 {places[1]}"]) == (places, [0.3, 0.7])
    for wrong, said in (
        (["0.3", "a", "b"], "a blend is a number before each path"),
        (["0.3", "a", "0.7"], "a blend is a number before each path"),
        (["-1", "a"], "a weight is a number above 0, not -1"),
    ):
        with pytest.raises(DataError, match=said):
            blend_of(wrong)
    with pytest.raises(DataError, match="two paths of the blend have the domain web"):
        adopt(["1", places[0], "2", places[0]], tmp_path / "d", tokenizer=tokenizer, eod=EOD)


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
