#!/usr/bin/env bash
# The Python packages of the images: docker/install.sh cpu|cuda, with $PYTHON (default python3).
#   cpu:  every package as constraints.txt pins it; torch from $TORCH_INDEX, if that is set.
#   cuda: torch, and whatever else the base image pins, stays as it is there; the rest as constraints.txt pins it.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}

fail() {
  echo "install.sh: $1" >&2
  exit 2
}

pins=$(mktemp)
trap 'rm -f "$pins"' EXIT
case ${1:-} in
  cpu)
    cp constraints.txt "$pins"
    "$python" -m pip install --no-cache-dir ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} -c "$pins" torch
    ;;
  cuda)
    image=${IMAGE_CONSTRAINTS:-/etc/pip/constraint.txt}
    [[ -f $image ]] || fail "$image is missing: this is no NGC PyTorch image (25.03 or later)"
    "$python" - constraints.txt "$image" > "$pins" << 'PYTHON'
import re
import sys
from importlib import metadata
from pathlib import Path


def pinned(path):
    lines = [line.strip() for line in Path(path).read_text().splitlines() if re.match(r"\s*[A-Za-z0-9]", line)]
    return {re.sub(r"[-_.]+", "-", re.match(r"[A-Za-z0-9._-]+", line)[0]).lower(): line for line in lines}


ours, image = map(pinned, sys.argv[1:])
pins = ours | image | {"torch": f"torch=={metadata.version('torch')}"}
print(*pins.values(), sep="\n")
PYTHON
    ;;
  *) fail "say for which image: docker/install.sh cpu|cuda" ;;
esac
unset PIP_CONSTRAINT # the image's own, now part of the pins
"$python" -m pip install --no-cache-dir -c "$pins" -e '.[data,deepspeed,lion,wandb]'
"$python" -m megaopus --version
