"""Imports what ranks and runs need, so that a process forked from one that did so starts at once.

Without it a rank spends eight seconds of a CPU on imports. No thread may be started here: a fork has none of them.
"""

from __future__ import annotations

import gc
import importlib
import pkgutil
import sys
import warnings

import megaopus
from megaopus.distributed.cpu import prepare_megatron

prepare_megatron(on_cpu=True)  # before any other import of megatron-core
UNUSED = ("megaopus.cli.check", "megaopus.cli.demo", "megaopus.corpus_tools", "megaopus.report", "megaopus.score")
"""Rooms that a run does not need, and libraries with threads of their own behind them."""
OURS = [
    module.name
    for module in pkgutil.walk_packages(megaopus.__path__, "megaopus.")
    if not module.name.startswith(UNUSED)
]
OTHERS = (
    "hydra",
    "hydra._internal.hydra",
    "hydra.core.override_parser.overrides_visitor",
    "megatron.core.dist_checkpointing.strategies.filesystem_async",
    "megatron.core.dist_checkpointing.strategies.torch",
    "megatron.core.distributed",
    "megatron.core.models.gpt.gpt_layer_specs",
    "megatron.core.optimizer",
    "megatron.core.pipeline_parallel",
    "megatron.core.transformer.attention",
    "pandas",  # by pyarrow's first array
    "pytest",
    "tests.faults",
    "tests.harness",
    "torch._dynamo",  # by the first optimizer
)
DEEPSPEED = (
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.runtime.superoffload.superoffload_stage3",
    "deepspeed.runtime.zero.muon.muon_optimizer",
)
"""What it imports when an engine is made."""
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # "Apex is not installed"
    for name in (*OURS, *OTHERS):
        importlib.import_module(name)
    sys.modules["megaopus.engine.deepspeed.engine"].import_deepspeed(on_cpu=True)
    for name in DEEPSPEED:
        importlib.import_module(name)
gc.freeze()  # else a fork's first collection copies every page
