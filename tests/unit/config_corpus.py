"""A corpus folder as far as validation looks into it: its manifest."""

import json


def write_manifest(folder, tokens=100_000, tokenizer="one", counts=None, eod="<|end|>"):
    """Make ``folder`` with a manifest: domains docs and code with ``tokens`` in every split, unless ``counts``."""
    splits = {split: {"documents": 10, "tokens": tokens} for split in ("pool", "proxy", "validation")}
    manifest = {
        "vocab_size": 500,
        "eod_token": eod,
        "counts": counts or {"docs": splits, "code": splits},
        "files": {"tokenizer.json": {"sha256": tokenizer}},
    }
    folder.mkdir()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder
