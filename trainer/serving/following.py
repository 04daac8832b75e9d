"""The model that answers: the version at an alias, loaded anew when the alias, or what stands beside it, moves.

A new version is loaded and tried beside the old one, which answers meanwhile; then it takes its place in one
assignment. One that can't be loaded, or a registry that doesn't answer, changes nothing: the old one goes on.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from etl.redaction import one_line
from etl.settings import GraftrecError
from trainer.inference.model_folder import MANIFEST, model_hash
from trainer.registry import Registry
from trainer.registry.loading import Beside, Served, load
from trainer.serving.metrics import Metrics

PATIENCE_SECONDS = 60.0  # the longest pause after failures


@dataclass(frozen=True)
class Current:
    """What answers now."""

    served: Served
    label: str
    beside: Beside


@dataclass(frozen=True)
class Place:
    """Where a model is: an alias or number of a registered model, or a folder. `arm`: what metrics call it."""

    registered_model: str
    model: str
    arm: str


class Followed:
    """A model by alias, number or folder. Made, it is ready to answer. Raises GraftrecError where there is none."""

    def __init__(self, place: Place, *, seconds: float, metrics: Metrics, say: Callable[[str], None]) -> None:
        self._seconds, self._metrics, self._say = seconds, metrics, say
        registered_model, model, self._arm = place.registered_model, place.model, place.arm
        self._model = model
        self._registry = None if _is_folder(model) else Registry(registered_model)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="follow", daemon=True)
        if self._registry is None:
            self.current = _loaded(Path(model), f"unregistered-{model_hash(model)[:12]}")
        else:
            version = self._registry.version(model)
            self.current = _loaded(self._registry.stored(version), version.label)
        self._noted(None)

    def start(self) -> None:
        """Follow, until `stop`."""
        if self._registry is not None:
            self._thread.start()

    def stop(self) -> None:
        self._ended.set()

    def _follow(self) -> None:
        pause = self._seconds
        failed = ""
        while not self._ended.wait(pause):
            try:
                self._look()
                pause, failed = self._seconds, ""
            except Exception as error:  # whatever it is, the version at hand goes on answering
                self._metrics.failures.inc()
                told = one_line(error) if isinstance(error, GraftrecError) else type(error).__name__
                if told != failed:
                    self._say(f"{self.current.label} goes on answering: {told}")
                pause, failed = min(2 * pause, max(PATIENCE_SECONDS, self._seconds)), told

    def _look(self) -> None:
        """Load what the alias stands at, where it has moved."""
        assert self._registry is not None
        version = self._registry.version(self._model) if self._model.isdecimal() else self._registry.find(self._model)
        if version is None:
            raise GraftrecError(
                f"expected a version at the alias {self._model} of {self._registry.name}, found none; promote one"
            )
        before = self.current
        if version.label != before.label or before.beside.moved():
            begun = time.monotonic()
            self.current = _loaded(self._registry.stored(version), version.label)
            self._metrics.changes.inc()
            self._say(f"{version.label} answers after {before.label}, loaded in {time.monotonic() - begun:.1f} s")
        self._noted(before.label)

    def _noted(self, before: str | None) -> None:
        self._metrics.serves(self.current.label, before, self._arm)
        self._metrics.followed.set(time.time())


def _is_folder(model: str) -> bool:
    return (Path(model) / MANIFEST).is_file() or "/" in model


def _loaded(folder: Path, label: str) -> Current:
    beside = Beside()
    served = load(folder, label, beside)
    served.prepare()
    return Current(served, label, beside)
