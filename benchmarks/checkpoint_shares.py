"""Measures what of a checkpoint each rank writes, and what its memory holds meanwhile; and counts it for a large job.

Real ranks on the CPU (gloo), a GPT of 4 layers and width 512 (13.8M parameters) with AdamW after one update, its state
whole on each rank or sharded. Rows {what, ranks, sharded, file_mb, held_mb, save_mb, load_mb}: bytes of the files of
each rank, of its tensors before, and at the peak of a save and of a load beyond those. With --count: {what, shape,
layout, ranks, whole_gb, most_gb, least_gb}, what a rank writes of a job of many, by arithmetic over its tensors
(``estimate``).

    python benchmarks/checkpoint_shares.py [--ranks 1 2 4] [--count] --results FILE
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from rich.console import Console

from benchmarks.checkpoint import BATCH, MODEL, SEQ_LEN, VOCAB, Batch
from benchmarks.common import commit
from benchmarks.fake_cuda.meter import DeviceMeter
from megaopus.distributed.config import ParallelConfig
from megaopus.distributed.mesh import Mesh
from megaopus.distributed.shards import deal
from megaopus.engine.config import EngineConfig
from megaopus.engine.megatron.engine import MegatronEngine
from megaopus.optim.config import OptimConfig

COUNTED = {"llama_8b": 1024, "llama_70b": 2048}
"""Shape of gpu_shapes.py -> ranks."""
ADAMW_BYTES = 4 + 4 + 4
"""Of a weight: its moments and its fp32 form."""


def measure(folder: Path, sharded: bool) -> dict[str, Any]:
    """Be one rank: train once, save, load; returns its bytes."""
    parallel = ParallelConfig(distributed_optimizer=sharded)
    mesh, meter = Mesh(parallel, "cpu"), DeviceMeter("cpu")
    settings: dict[str, Any] = {"vocab_size": VOCAB, "seq_len": SEQ_LEN, "total_steps": 10, "seed": 1234}
    try:
        with meter:
            engine = MegatronEngine(
                mesh,
                model=MODEL,
                optim=OptimConfig(),
                engine=EngineConfig(device="cpu", precision="fp32"),
                parallel=parallel,
                micro_batch_size=BATCH // mesh.shape.dp,
                **settings,
            )
            engine.train_step(Batch(torch.randint(0, VOCAB, (BATCH, SEQ_LEN + 1))))
            held = meter.bytes
            meter.reset_peak()
            saving = engine.prepare_save(folder, {}, False)
            saving.start(lambda path: None, False)
            if error := saving.error():
                raise error
            saving.commit()
            saved = meter.peak - held
            del saving
            mesh.barrier()
            held = meter.bytes
            meter.reset_peak()
            engine.load(folder, [])
            loaded = meter.peak - held
        written = sum(path.stat().st_size for path in folder.glob(f"__{mesh.rank}_*.distcp"))
        own = {"file": written, "held": held, "save": saved, "load": loaded}
        of_all = mesh.gather_objects(own)
        return {f"{name}_mb": [round(each[name] / 1e6, 1) for each in of_all] for name in own}
    finally:
        mesh.close()


def counted(shape: str, ranks: int) -> dict[str, Any]:
    """Count the bytes that the dp and cp ranks of one stage and tensor-parallel rank share."""
    from megatron.core.dist_checkpointing.exchange_utils import distribute_shards_to_ranks

    from benchmarks.fake_cuda.measure import fake_job
    from benchmarks.gpu_shapes import CASES
    from megaopus.build import build_engine

    case = CASES[shape]
    config = case.config()
    config.parallel.distributed_optimizer = True
    with fake_job(config, 0, ranks) as (mesh, _):
        sizes = {name: p.numel() for name, p in build_engine(config, mesh, case.vocab_size).named_parameters()}
    sharing = ranks // (config.parallel.tp * config.parallel.pp)
    shared = {name: list(range(sharing)) for name in sizes}
    of_rank = [0] * sharing
    for size, rank in zip(sizes.values(), deal([*sizes.values()], sharing), strict=True):
        of_rank[rank] += ADAMW_BYTES * size
    weights = {name: 2 * size for name, size in sizes.items()}
    for name, rank in distribute_shards_to_ranks(shared, weights, sharing, set()).items():
        of_rank[rank] += weights[name]
    whole = (ADAMW_BYTES + 2) * sum(sizes.values())
    found = {"whole_gb": whole, "most_gb": max(of_rank), "least_gb": min(of_rank)}
    layout = f"tp{config.parallel.tp} pp{config.parallel.pp} dp x cp {sharing}"
    named = {"what": "estimate", "shape": shape, "layout": layout, "ranks": ranks}
    return named | {name: round(size / 1e9, 3) for name, size in found.items()}


def launched(ranks: int, sharded: bool) -> dict[str, Any]:
    """Measure a job of ``ranks`` processes."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "row.json")
        given = ["--rank-of", folder, "--results", str(out), *(["--sharded"] if sharded else [])]
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, *launcher, __file__, *given], check=True, env=environment)
        return {"what": "measured", "ranks": ranks, "sharded": sharded, **json.loads(out.read_text())}


def main() -> None:
    """Measure and count, a row at a time."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--results", type=Path, required=True, metavar="FILE", help="rows are added to it")
    made.add_argument("--ranks", type=int, nargs="*", default=[1, 2, 4], help="%(default)s")
    made.add_argument("--count", action="store_true", help="count large jobs too (some minutes; it needs g++)")
    made.add_argument("--rank-of", type=Path, help=argparse.SUPPRESS)
    made.add_argument("--sharded", action="store_true", help=argparse.SUPPRESS)
    args, console = made.parse_args(), Console()
    warnings.simplefilter("ignore")
    if args.rank_of:
        place = args.rank_of / "weights"
        place.mkdir(exist_ok=True)
        found = measure(place, args.sharded)
        if int(os.environ["RANK"]) == 0:
            args.results.write_text(json.dumps(found))
        return

    def keep(row: dict[str, Any]) -> None:
        with args.results.open("a") as file:
            file.write(json.dumps({**row, "commit": commit()}) + "\n")
        console.print(row, highlight=False)

    for ranks in args.ranks:
        for sharded in (False, True):
            keep(launched(ranks, sharded))
    for shape, ranks in COUNTED.items() if args.count else ():
        keep(counted(shape, ranks))


if __name__ == "__main__":
    main()
