"""Every optimizer by the name that ``optim.name`` gives it. A new one is a file beside this and a line here
(docs/optimizers.md)."""

from __future__ import annotations

from megaopus.optim.base import Spec
from megaopus.optim.conda import CONDA
from megaopus.optim.lion import LION
from megaopus.optim.muon import MUON
from megaopus.optim.namo import NAMO_D_SPEC, NAMO_SPEC
from megaopus.optim.sgd_sai import SGD_SAI
from megaopus.optim.sophia import SOPHIA_G
from megaopus.optim.standard import ADAMW, SGD

CATALOG: dict[str, Spec] = {
    "sgd": SGD,
    "adamw": ADAMW,
    "lion": LION,
    "muon": MUON,
    "namo": NAMO_SPEC,
    "namo_d": NAMO_D_SPEC,
    "conda": CONDA,
    "sophia_g": SOPHIA_G,
    "sgd_sai": SGD_SAI,
}
