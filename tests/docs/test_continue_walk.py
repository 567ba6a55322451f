"""The walk of docs/continue.md from a model folder and text to an exported model, each command, with a small model."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch

from megaopus.__main__ import main
from megaopus.data.tokenizer import EOD, train_tokenizer
from tests.evaluation_items import write_items

PAGE = Path(__file__).resolve().parents[2] / "docs" / "continue.md"
LITTLE = "data.seq_len=32 train.steps=4 train.global_batch_size=4 train.micro_batch_size=4 train.eval_every=0"
LITTLE += " optim.warmup_steps=1 optim.lr=1e-2 selection.warmup_steps=1 selection.proxy_batch_size=4"
WORDS = ["cell", "light", "force", "plant", "oxygen", "star", "gives", "takes", "the", "a"]


def commands() -> list[list[str]]:
    """Of the first block of the page; what trains is made short."""
    block = re.search(r"```bash\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert block is not None
    lines = block[1].replace("data.path=corpus", f"data.path=corpus {LITTLE}").splitlines()
    return [shlex.split(line.replace("--out corpus", "--seq-len 32 --out corpus")) for line in lines]


def write_text(rng: np.random.Generator) -> None:
    Path("text").mkdir()
    rows = [{"text": " ".join(rng.choice(WORDS, 60)), "id": f"d{number}"} for number in range(1000)]
    Path("text/rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("held_out").mkdir()
    Path("held_out/rest.txt").write_text(" ".join(rng.choice(WORDS, 2000)))
    write_items(Path("items"))


def write_model(folder: str) -> None:
    """A random Llama with a tokenizer that was trained on other text."""
    transformers = pytest.importorskip(
        "transformers", reason="transformers is an optional extra (megaopus[transformers])"
    )
    tokenizer = train_tokenizer(iter([" ".join(WORDS)] * 9), 300)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=tokenizer.get_vocab_size(), **size)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOD).save_pretrained(folder)


def test_the_walk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    write_text(np.random.default_rng(0))
    write_model("model")
    for command in commands():
        assert command[:3] == ["python", "-m", "megaopus"]
        assert main(command[3:]) == 0, capsys.readouterr().err
    import transformers

    before, after = (transformers.AutoModelForCausalLM.from_pretrained(name) for name in ("model", "continued"))
    theirs, ours = (transformers.AutoTokenizer.from_pretrained(name) for name in ("model", "continued"))
    texts = [json.loads(line)["text"] for line in Path("text/rows.jsonl").read_text().splitlines()]
    assert [theirs(text).input_ids for text in texts] == [ours(text).input_ids for text in texts]
    losses = []
    for model in (before, after):
        tokens = torch.tensor([ours(text).input_ids[:33] for text in texts[:32]])
        with torch.no_grad():
            losses.append(float(model(tokens, labels=tokens).loss))
    assert losses[1] < losses[0] - 0.3, losses  # it has learnt something of the text
    tables = [json.loads(Path(name).read_text()) for name in ("before.json", "after.json")]
    told = [{row["domain"]: row["nats_per_token"] for row in table["perplexity"]}["held_out"] for table in tables]
    assert told[0] - told[1] > 0.3
    assert "after.json less before.json" in capsys.readouterr().out
    first = json.loads(Path("runs/continued/metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(losses[0], abs=0.4)  # and began where the model was
