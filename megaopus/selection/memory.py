"""Says what passes take and what is free: the scoring micro-batch is found by running it, not by a formula."""

from __future__ import annotations

import math
import os
import re
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode

from megaopus.selection.candidates import tensors_of


class Meter(TorchDispatchMode):
    """Context manager: ``peak`` is the most bytes of tensors made inside that were alive at once, on any device.

    Counts each storage once, from the operation that made it until it is freed, backward passes included. Not seen:
    memory that an operation uses inside itself, and storages resized in place.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        """Alive now."""
        self.peak = 0
        self._alive: dict[int, weakref.ref[UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = {storage._cdata for storage in _storages((args, kwargs))}
        result = func(*args, **kwargs)
        for storage in _storages(result):
            if storage._cdata not in given and storage._cdata not in self._alive:  # neither a view nor in place
                self._count(storage)
        return result

    def _count(self, storage: UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()

        def freed(_: Any) -> None:
            del self._alive[key]
            self.bytes -= size

        self._alive[key] = weakref.ref(storage, freed)
        self.bytes += size
        self.peak = max(self.peak, self.bytes)


def _storages(tree: Any) -> Iterator[UntypedStorage]:
    return (tensor.untyped_storage() for tensor in tensors_of(tree) if tensor.layout == torch.strided)


def peak_bytes(run: Callable[[], Any], device: torch.device) -> int:
    """Most bytes of tensors that ``run()`` made and held at once. Resets CUDA's own peak statistics."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    # Code first met inside a dispatch mode is never compiled after, unless compilation is off there.
    with torch.compiler.set_stance("force_eager"), Meter() as meter:
        run()
    return meter.peak


def free_bytes(device: torch.device) -> int:
    """Memory that this process may still take for tensors on ``device``.

    CUDA: what the device has left and what the allocator holds unused. Else a share of the host's, the same for each of
    the LOCAL_WORLD_SIZE processes: what Linux calls available, within the limits of its control groups; where the
    system does not say (macOS), half of the physical memory.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return max(0, host_free(Path("/"))) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def host_free(root: Path) -> int:
    """Free memory of the host by the files under ``root``, for all processes together; negative beyond a limit."""
    meminfo = re.search(r"MemAvailable:\s+(\d+) kB", _text(root / "proc/meminfo"))
    if meminfo is None:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return min([1024 * int(meminfo[1]), *_within_limits(_text(root / "proc/self/cgroup"), root / "sys/fs/cgroup")])


def _within_limits(groups: str, mount: Path) -> Iterator[int]:
    """Limit less use of the control groups (v1 or v2) above this process; cached files do not count as used."""
    for line in groups.splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            base, limit_file, used_file, prefix = mount, "memory.max", "memory.current", ""
        elif "memory" in controllers.split(","):
            base, prefix = mount / "memory", "total_"
            limit_file, used_file = "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        folder = base / path.strip("/")  # not all of it is there inside a container
        for group in (folder, *folder.parents):
            limit, used = _text(group / limit_file).strip(), _text(group / used_file)
            if limit.isdecimal() and used and group.is_relative_to(base):
                stat = _text(group / "memory.stat")
                cached = re.findall(rf"^{prefix}(?:in)?active_file (\d+)$", stat, re.MULTILINE)
                yield int(limit) - int(used) + sum(map(int, cached))


def _text(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""


def find_micro_batch_size(
    run: Callable[[int], Any],
    most: int,
    device: torch.device,
    least: Callable[[int], int],
    *,
    first: int = 1,
    what: str = "scoring",
) -> tuple[int, str]:
    """(largest size up to ``most`` whose run stays within half of the free memory, at least ``first``; in words).

    Sizes are ``first`` times a power of two. Half, since other processes take memory too, and operations and allocators
    use more than tensors hold.

    ``run``: a whole estimate at a micro-batch size. ``least``: a number of this rank -> the smallest over all ranks,
    so that all run the same sizes. ``first`` is known to fit; another size that is returned has itself been run.
    """
    highest = (most // first).bit_length() - 1
    if highest < 1:
        return first, f"{what} micro-batch {first}"
    peak_bytes(partial(run, first), device)  # makes what is made once and kept, which is not of a pass
    peaks: dict[int, int] = {}
    power, agreed = -1, 0
    while agreed > power:
        fitted, power = max(peaks, default=None), agreed
        size, free = first * 2**power, free_bytes(device)
        peaks[power] = peak = peak_bytes(partial(run, size), device)
        wish = fitted or 0
        if peak <= free / 2:
            # k times the sequences take k times the memory at most, less where some of it is there at any size: then
            # go on by one, unless the line through the last two, which memory never falls below, is over
            wish = power + int(math.log2(free / 2 / max(peak, 1)))
            slope = 0 if fitted is None else (peak - peaks[fitted]) / (size - first * 2**fitted)
            wish += wish == power and peak + slope * size <= free / 2
        agreed = least(min(wish, highest))
    size = first * 2**agreed
    return size, f"{what} micro-batch {size} (takes {_readable(peaks[agreed])}, {_readable(free)} free)"


def _readable(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
