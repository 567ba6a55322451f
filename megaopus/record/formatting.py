"""Writes numbers as a person reads them: counts, sizes, durations, learning rates, shares."""

from __future__ import annotations

import re


def format_count(value: float) -> str:
    """1234567 -> "1.23M": three significant digits."""
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * limit:
            scaled = value / limit
            return f"{scaled:.{0 if scaled >= 99.95 else 1 if scaled >= 9.995 else 2}f}{unit}"
    return f"{value:.0f}"


def format_bytes(size: float) -> str:
    """1288490189 -> "1.2G": in powers of 1024, one decimal below a hundred."""
    for limit, unit in ((2**40, "T"), (2**30, "G"), (2**20, "M"), (2**10, "K")):
        if size >= 0.9995 * limit:
            scaled = size / limit
            return f"{scaled:.{0 if scaled >= 99.95 else 1}f}{unit}"
    return f"{size:.0f}B"


def format_duration(seconds: float) -> str:
    """7440 -> "2h04m", 185 -> "3m05s", 42 -> "42s"."""
    whole = round(seconds)
    if whole >= 86400:
        return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"
    if whole >= 3600:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 60}m{whole % 60:02d}s" if whole >= 60 else f"{whole}s"


def format_lr(lr: float) -> str:
    """0.0003 -> "3.0e-4"."""
    return re.sub(r"e([-+])0*(\d)", lambda found: f"e{found[1].replace('+', '')}{found[2]}", f"{lr:.1e}")


def format_share(share: float) -> str:
    """0.25 -> ".25"."""
    text = f"{share:.2f}"
    return text[1:] if text.startswith("0") else text
