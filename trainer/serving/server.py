"""Recipe `serve`: load the champion, listen, and end so that no request is lost.

    python -m trainer serve --config serve/default --registered_model graftrec-target

Where there is no such version, or the port is taken, the command ends before it listens: one line, exit code 2.
"""

import asyncio
import datetime as dt
import signal
import socket
from types import FrameType

import uvicorn

from etl.settings import GraftrecError
from trainer.config import ServeConfig
from trainer.parallel.cores import use_threads
from trainer.serving.following import Followed, Place
from trainer.serving.front import Front, Parts
from trainer.serving.metrics import Metrics
from trainer.serving.served_log import ServedLog
from trainer.serving.shelf import Shelf

CONNECTIONS_WAITING = 2048  # of the listening socket


def run(config: ServeConfig) -> None:
    """Serve until a signal. Raises GraftrecError."""
    use_threads(config.threads)
    server = made(config)
    server.run(sockets=[server.listener])


def made(config: ServeConfig) -> "Server":
    """A server that has loaded its model and listens; `run` it. Raises GraftrecError."""
    metrics = Metrics()
    listener = _bound(config)
    try:
        parts = _parts(config, metrics)
    except BaseException:
        listener.close()
        raise
    listener.listen(CONNECTIONS_WAITING)
    front = Front(parts, config.limits, metrics, say)
    settings = uvicorn.Config(
        front.app(),
        log_config=None,
        log_level="error",
        access_log=False,  # addresses are personal data
        server_header=False,
        timeout_keep_alive=config.limits.idle_seconds,
        timeout_graceful_shutdown=config.shutdown_seconds,
    )
    server = Server(settings, front, listener, config.drain_seconds)
    beside = "" if parts.other is None else f", and {parts.other.current.label} {config.split.share:.0%} of the users,"
    say(f"{parts.followed.current.label}{beside} answers at {server.address}/invocations")
    return server


def _parts(config: ServeConfig, metrics: Metrics) -> Parts:
    def followed(model: str, arm: str) -> Followed:
        place = Place(config.registered_model, model, arm)
        return Followed(place, seconds=config.follow_seconds, metrics=metrics, say=say)

    other = config.split.model
    return Parts(
        followed(config.model, "model"),
        None if other is None else followed(other, "split"),
        config.split,
        Shelf(config.shelf, metrics, say),
        ServedLog(config.log, metrics, say),
    )


def say(line: str) -> None:
    """A line of the log: never what a request holds."""
    print(f"{dt.datetime.now(dt.UTC):%Y-%m-%dT%H:%M:%SZ} serve: {line}", flush=True)


def _bound(config: ServeConfig) -> socket.socket:
    """A socket that is bound, and does not listen yet. Raises GraftrecError."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(
            config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise GraftrecError(
            f"expected to listen at {config.host} port {config.port}, found: {error.strerror or error}; set --host or "
            "--port"
        ) from None
    return listener


class Server(uvicorn.Server):
    """Uvicorn, which takes requests for `drain_seconds` after a first signal, so that those who send them can stop."""

    def __init__(self, config: uvicorn.Config, front: Front, listener: socket.socket, drain_seconds: float) -> None:
        super().__init__(config)
        self.listener, self._front, self._drain_seconds = listener, front, drain_seconds

    @property
    def address(self) -> str:
        host, port = self.listener.getsockname()[:2]
        return f"http://{f'[{host}]' if ':' in host else host}:{port}"

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """At the first signal say that no more requests are wanted; at a second one end at once."""
        if self._front.draining or not self._drain_seconds or sig == signal.SIGINT:
            self._front.draining = True
            super().handle_exit(sig, frame)
            return
        self._front.draining = True
        say(f"stopping: requests are taken for {self._drain_seconds:g} s more")
        asyncio.get_running_loop().call_later(self._drain_seconds, super().handle_exit, sig, frame)
