"""The folder of a training run: one holder, and what may be cleared in it."""

import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from etl.settings import GraftrecError, RunAgain
from trainer import tracking
from trainer.inference.model_folder import MANIFEST
from trainer.parallel.distributed import World
from trainer.training import checkpoint

DONE = "done.json"
IDENTITY = "identity"  # marks a run's folder
_OWN = ("checkpoints", "model", "evaluation", DONE, "history.json", "transfer.json", IDENTITY)  # what lies in it
MLFLOW_UID = "mlflow-uid"  # of the MLflow run, until all is done: a resumed run continues in it


class RunError(GraftrecError):
    """A run that can't use its folder."""


class RunBusy(RunAgain, RunError):
    """Another process holds the run's folder."""


@contextmanager
def alone(folder: Path, world: World) -> Iterator[Path]:
    """The run's folder, held by this run alone: two processes in one would mix their checkpoints. Raises RunError."""
    if not world.first:
        yield folder
        return
    _check_own(folder)  # before a lock file is left in what is somebody else's
    folder.mkdir(parents=True, exist_ok=True)
    with tracking.file_lock(folder / "lock", wait=False) as held:
        if not held:
            raise RunBusy(f"another process is training in {folder}; wait for it, or give this run another name")
        _check_own(folder)
        checkpoint.tidy(folder / "checkpoints")
        try:
            yield folder
        finally:
            checkpoint.tidy(folder / "checkpoints")
            shutil.rmtree(folder / "model.new", ignore_errors=True)


def clear_other(folder: Path, identity: str, world: World, say: Callable[[str], None]) -> None:
    """Remove the files of a run of another identity under this name; keep the checkpoints of this one."""
    note = folder / IDENTITY
    if world.first and not (note.is_file() and note.read_text() == identity):
        if (folder / "checkpoints").exists() or (folder / "model" / MANIFEST).exists():
            say(f"{folder} holds a run with other settings, data or code: it is replaced")
        for name in ("checkpoints", "model", "evaluation"):
            shutil.rmtree(folder / name, ignore_errors=True)
        for name in (DONE, MLFLOW_UID):
            (folder / name).unlink(missing_ok=True)
        unfinished = note.with_name(IDENTITY + ".new")
        unfinished.write_text(identity)
        unfinished.rename(note)
    world.wait()


@contextmanager
def noted(folder: Path, world: World) -> Iterator[None]:
    """Mark the training as done once MLflow's run has ended or is queued. A process that is killed before leaves a
    finished checkpoint, and the next one writes to MLflow again."""
    yield
    if world.first:
        (folder / (DONE + ".new")).replace(folder / DONE)
    tidy(folder, world)


def tidy(folder: Path, world: World) -> None:
    """Remove files that a finished run no longer needs; a kill may have left them."""
    if world.first:
        (folder / MLFLOW_UID).unlink(missing_ok=True)
        checkpoint.clear(folder / "checkpoints")


def _check_own(folder: Path) -> None:
    """Raises RunError for a folder with files that a run would replace, unless a run has written it."""
    try:
        marked = _MARK.match((folder / IDENTITY).read_text())
    except (OSError, UnicodeDecodeError):
        marked = None
    if not marked and (found := [name for name in _OWN if (folder / name).exists()]):
        raise RunError(
            f"{folder}: expected a new folder, or one of an earlier training, found {', '.join(found)} of something "
            "else, which the training would replace; set another name or output"
        )


_MARK = re.compile(r"$|[0-9a-f]+:[0-9a-f]+:\{")  # how an identity begins; empty where a kill cut it short
