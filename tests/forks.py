"""Starts processes that have every import done: each is forked from a server that made them once."""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

from megaopus.distributed.launcher import without_launcher

ROOT = Path(__file__).parents[1]
TIMEOUT_S = 900.0
"""After which a process counts as hung: many times what the slowest takes, for machines with other work to do."""
_starting = threading.Lock()


def start(function: Callable[..., Any], *args: Any, environment: dict[str, str] | None = None) -> Any:
    """Start ``function(*args)`` in a process of its own, in the root of the sources; returns the process.

    ``environment`` replaces this process's.
    It ends with this process, however that ends. Nothing that it changes is seen by anything else.
    """
    context = multiprocessing.get_context("forkserver")
    with _starting:
        _ensure_server()
        variables = dict(os.environ) if environment is None else environment
        process = context.Process(target=_run, args=(variables, function, args), daemon=True)
        process.start()
    return process


def _ensure_server() -> None:
    """Start the server if none runs; it finds ``tests`` wherever this process is, and has one thread."""
    forkserver.set_forkserver_preload(["tests.preload"])
    before = {name: os.environ.get(name) for name in ("PYTHONPATH", "OMP_NUM_THREADS")}
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), before["PYTHONPATH"])))
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        forkserver.ensure_running()
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _run(variables: dict[str, str], function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    import tests.preload  # noqa: F401  an import that failed in the server fails here, and says how

    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]  may have children
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(ROOT)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    function(*args)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


class Program:
    """A process that is ``sys.exit(function(*args))``, what it says kept; ``function`` must be importable."""

    def __init__(self, function: Callable[..., int | None], *args: Any, environment: dict[str, str] | None = None):
        variables = without_launcher(os.environ)
        self._args = (function.__qualname__, *args)
        self._folder = tempfile.TemporaryDirectory()
        self._said = [Path(self._folder.name) / name for name in ("out", "err")]
        self._process = start(_say, self._said, function, args, environment={**variables, **(environment or {})})
        self.pid: int = self._process.pid

    def result(self, timeout_s: float = TIMEOUT_S) -> subprocess.CompletedProcess[str]:
        """Wait for its end; AssertionError with what it said if that does not come."""
        self._process.join(timeout_s)
        late = self._process.exitcode is None
        self.kill()
        out, err = (path.read_text(errors="replace") if path.exists() else "" for path in self._said)
        self._folder.cleanup()
        if late:
            raise AssertionError(f"{self._args}: no end in {timeout_s:.0f} s\n{out}\n{err}")
        return subprocess.CompletedProcess(self._args, self._process.exitcode, out, err)

    def kill(self) -> None:
        self._process.kill()
        self._process.join()


def _say(said: list[Path], function: Callable[..., int | None], args: tuple[Any, ...]) -> None:
    for number, path in enumerate(said, start=1):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.exit(function(*args))


def call(function: Callable[..., int | None], *args: Any) -> subprocess.CompletedProcess[str]:
    """Give what a program that is ``sys.exit(function(*args))`` gives."""
    return Program(function, *args).result()


def program(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Give what ``python -m module arguments`` from the root of the sources gives, its imports done beforehand."""
    return call(main, module, *arguments)


def main(module: str, *arguments: str) -> None:
    """Be ``python -m module arguments`` from here on."""
    sys.argv = [module, *arguments]
    found = importlib.util.find_spec(module)
    is_package = found is not None and found.submodule_search_locations is not None
    sys.modules.pop(f"{module}.__main__" if is_package else module, None)  # it is run as the main program
    runpy.run_module(module, run_name="__main__", alter_sys=True)
