"""An object store on this machine, which can be taken away and brought back with what it holds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from megaopus.data import store

pytest.importorskip("s3fs", reason="extra s3 is not installed")
server = pytest.importorskip("moto.server", reason="moto is not installed")


class Away:
    """A store that can be taken away and brought back, with what it holds."""

    def __init__(self) -> None:
        self.server = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        self.server.start()
        self.port = self.server.get_host_and_port()[1]

    def leave(self) -> None:
        self.server.stop()

    def come_back(self) -> None:
        self.server = server.ThreadedMotoServer(ip_address="127.0.0.1", port=self.port, verbose=False)
        self.server.start()


@contextmanager
def object_store(cache: Path, patch: pytest.MonkeyPatch) -> Iterator[Away]:
    """Run a store with a bucket, which the environment names, and an empty cache."""
    import s3fs
    from moto import backends

    services = list(backends.list_of_moto_modules())  # which it lists anew for every request: 4 ms
    patch.setattr(backends, "list_of_moto_modules", lambda: services)
    there = Away()
    keys = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_DEFAULT_REGION": "us-east-1"}
    for name, value in {**keys, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{there.port}"}.items():
        patch.setenv(name, value)
    patch.setenv(store.CACHE, str(cache))
    s3fs.S3FileSystem.clear_instance_cache()
    if not (system := s3fs.S3FileSystem()).exists("bucket"):  # what it holds outlives a server
        system.mkdir("bucket")
    try:
        yield there
    finally:
        there.leave()
        s3fs.S3FileSystem.clear_instance_cache()


def put(here: Path, address: str) -> None:
    """Copy a file or folder there."""
    import s3fs

    s3fs.S3FileSystem().put(str(here), address, recursive=here.is_dir())


def put_once(here: Path, address: str) -> None:
    """Copy a folder there, unless it is there: what a store holds outlives a server."""
    import s3fs

    if not s3fs.S3FileSystem().exists(f"{address}/manifest.json"):
        put(here, address)


def put_bytes(content: bytes, address: str) -> None:
    """Write an object there."""
    import s3fs

    s3fs.S3FileSystem().pipe(address, content)
