"""A real MLflow server, and before it a proxy on loopback that can be dead, slow, or answer 500."""

import http.client
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Literal

from tests.fixtures.ports import free_port

Mode = Literal["whole", "dead", "slow", "500"]
_START_SECONDS = 180.0


class Server:
    """`mlflow server` on an SQLite store, started on first use."""

    def __init__(self, folder: Path) -> None:
        self.store = folder / "mlflow.db"
        self._folder, self._lock = folder, threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._port = 0

    def port(self) -> int:
        with self._lock:
            if self._process is None:
                self._start()
            return self._port

    def _start(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._port = free_port()
        arguments = [
            "--host",
            "127.0.0.1",
            "--port",
            str(self._port),
            "--workers",
            "1",
            "--backend-store-uri",
            f"sqlite:///{self.store}",
            "--artifacts-destination",
            str(self._folder / "artifacts"),
        ]
        quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with (self._folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "mlflow", "server", *arguments],
                cwd=self._folder,
                stdout=log,
                stderr=log,
                env=os.environ | quiet,
                start_new_session=True,
            )
        deadline = time.monotonic() + _START_SECONDS
        while time.monotonic() < deadline:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self._port}/health", timeout=5):
                    return
            except OSError:
                time.sleep(0.2)
        raise RuntimeError(f"mlflow server did not start; see {self._folder / 'server.log'}")

    def close(self) -> None:
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


class Proxy(ThreadingHTTPServer):
    """Passes `whole` requests on, then becomes what `mode` says; `mode` may be changed at any time."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, upstream: int, mode: Mode, *, whole: int, delay_seconds: float) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream, self.mode, self.left, self.delay_seconds = upstream, mode, whole, delay_seconds
        self.failed = 0  # requests that were not passed on as they came

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def current_mode(self) -> Mode:
        if self.left > 0:
            self.left -= 1
            return "whole"
        self.failed += self.mode != "whole"
        return self.mode

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that has gone is none."""


class _Handler(BaseHTTPRequestHandler):
    server: Proxy

    def _answer(self) -> None:
        mode = self.server.current_mode()
        body = self._body()
        self.close_connection = True
        if mode == "dead":
            return
        if mode == "slow":
            time.sleep(self.server.delay_seconds)
        if mode == "500":
            self.send_response(500)
            self.end_headers()
            self.wfile.write(b"no")
            return
        upstream = http.client.HTTPConnection("127.0.0.1", self.server.upstream, timeout=60)
        dropped = ("host", "connection", "transfer-encoding", "content-length")
        headers = {name: value for name, value in self.headers.items() if name.lower() not in dropped}
        headers |= {"Connection": "close", "Content-Length": str(len(body))}
        upstream.request(self.command, self.path, body, headers)
        answer = upstream.getresponse()
        data = answer.read()
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("transfer-encoding", "connection", "content-length"):
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
        upstream.close()

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        data = b""
        while length := int(self.rfile.readline().split(b";")[0], 16):
            data += self.rfile.read(length)
            self.rfile.readline()
        self.rfile.readline()
        return data

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _answer

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: a round says what was found."""


@contextmanager
def proxied(upstream: int, mode: Mode, *, whole: int, delay_seconds: float) -> Iterator[Proxy]:
    proxy = Proxy(upstream, mode, whole=whole, delay_seconds=delay_seconds)
    thread = threading.Thread(target=proxy.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.shutdown()
        proxy.server_close()
        thread.join()
