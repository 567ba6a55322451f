"""Lets a program import what it carries along as wheels of plain Python: ``--wheels FOLDER`` on its command line.

It acts when it is imported, which has to come before imports of what the wheels hold.
"""

from __future__ import annotations

import os
import sys
import tempfile
import zipfile
from pathlib import Path


def use_wheels(folder: Path) -> Path:
    """Let this process and its children import what the wheels in a folder hold; returns where that lies now.

    Raises FileNotFoundError where there are none.
    """
    wheels = sorted(folder.glob("*.whl"))
    if not wheels:
        raise FileNotFoundError(f"no wheels in {folder}")
    place = Path(tempfile.mkdtemp(prefix="wheels-"))
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as packed:
            packed.extractall(place)
    sys.path.append(str(place))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(place)]))
    return place


if "--wheels" in sys.argv[:-1]:
    use_wheels(Path(sys.argv[sys.argv.index("--wheels") + 1]))
