"""Training runs in parallel, each in its own process. Finished runs are not repeated, also after a kill.

On Linux processes are forked from a server that has imported what a run needs, which saves several seconds each;
elsewhere they are spawned.
"""

import atexit
import ctypes
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import forkserver, resource_tracker
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal

import yaml

from etl.settings import GraftrecError, RunAgain
from etl.stopping import SIGNALS
from trainer.config import PretrainConfig

POLL_SECONDS = 0.05
CHANGED = "expected a model of these settings, code and data, found that one of them changed meanwhile; run again"
STOP_SECONDS = 30.0  # a stopped run writes a checkpoint first
# The recipes, and what they import only when needed: for torch's optimizers, MLflow's database, pictures.
_PRELOADED = (
    "trainer.recipes.pretrain",
    "trainer.recipes.finetune",
    "torch._dynamo",
    "mlflow.data.polars_dataset",
    "mlflow.store.tracking.sqlalchemy_store",
    "mlflow.utils.search_logged_model_utils",
    "alembic.config",
    "sqlalchemy.dialects.sqlite",
    "matplotlib.backends.backend_agg",
)
_CRASHES = {signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGFPE, signal.SIGILL}
_PR_SET_PDEATHSIG = 1
_LIBC: Any = ctypes.CDLL(None) if sys.platform == "linux" else None


@dataclass(eq=False)
class TrainingJob:
    """One training run."""

    name: str  # of its log
    recipe: Literal["pretrain", "finetune"]
    config: PretrainConfig
    parent: "TrainingJob | None" = None
    failure: str = ""  # why it has no model
    exit_code: int = 0  # of its process
    is_done: bool = False
    metrics: dict[str, float] | None = None  # of the finished run
    run_id: str = ""  # of the finished run in MLflow

    @property
    def folder(self) -> Path:
        return Path(self.config.output) / self.config.name

    @property
    def model(self) -> Path:
        return self.folder / "model"


def run(trainings: Sequence[TrainingJob], *, folder: Path, jobs: int, environment: Mapping[str, str]) -> None:
    """Train all cells, at most `jobs` at a time; sets `is_done` and `metrics`, or `failure`, of each. The output of a
    cell is in <folder>/logs. The next call tries failed cells again."""
    from trainer import tracking

    for name in ("logs", "settings"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    context = _context()
    waiting, running = list(trainings), dict[int, tuple[TrainingJob, BaseProcess, float]]()
    finished, trained, begun_all = 0, 0, time.monotonic()

    def end(training: TrainingJob, how: str) -> None:
        nonlocal finished
        finished += 1
        each = (time.monotonic() - begun_all) / max(trained, 1)  # what is unchanged takes no time
        left = ""
        if trained and finished < len(trainings) and each > 0.5:
            left = f"  (about {each * (len(trainings) - finished):.0f} s left)"
        print(f"[{finished}/{len(trainings)}] {training.name}: {training.failure or how}{left}", flush=True)

    try:
        while waiting or running:
            while len(running) < jobs and (training := _ready(waiting)) is not None:
                if training.parent is not None and not training.parent.is_done:
                    training.failure = f"its pre-training, {training.parent.name}, failed: {training.parent.failure}"
                    end(training, "")
                elif (done := _finished(training)) is not None:
                    tracking.note_reused(training.name, training.run_id)
                    end(training, f"unchanged, {done}")
                else:
                    running[id(training)] = (training, _start(context, training, folder, environment), time.monotonic())
            for key, (training, process, begun) in list(running.items()):
                if process.exitcode is None:
                    continue
                del running[key]
                trained += 1
                training.exit_code = _exit_code(process.exitcode)
                done = _finished(training) if process.exitcode == 0 else None
                if done is None and process.exitcode == 0:
                    training.exit_code = RunAgain.exit_code
                    training.failure = CHANGED
                elif done is None:
                    training.failure = _reason(folder / "logs" / f"{_file(training)}.log", process.exitcode)
                end(training, f"{done}, {time.monotonic() - begun:.0f} s")
            if running:
                time.sleep(POLL_SECONDS)
    finally:
        _stop([process for _, process, _ in running.values()])


def _ready(waiting: list[TrainingJob]) -> TrainingJob | None:
    """Removes and returns the first job that waits for no other."""
    for place, training in enumerate(waiting):
        if training.parent is None or training.parent.is_done or training.parent.failure:
            return waiting.pop(place)
    return None


def _finished(training: TrainingJob) -> str | None:
    """How good its model is, where there is one of these settings, code and data; sets is_done."""
    from trainer.evaluation.evaluators import monitor
    from trainer.recipes.run_result import finished

    try:
        done = finished(training.config)
    except GraftrecError:
        return None  # its process will report what is wrong
    if done is None:
        return None
    training.is_done, training.metrics, training.run_id = True, done.metrics, done.run_id
    epochs = f"best epoch {done.metrics['best_epoch']:.0f} of {done.metrics['epochs']:.0f}"
    score = monitor(training.config.task)
    value = done.metrics.get(f"validation/{score}")
    return f"no validation, {epochs}" if value is None else f"validation {score} {value:.4f}, {epochs}"


# --- a process --------------------------------------------------------------------------------------------------------


def prepare() -> None:
    """Start the process that runs are forked from, which imports what they need in the background."""
    if sys.platform == "linux":
        _context()
        with _unsignalled():
            forkserver.ensure_running()
        atexit.register(_end_server, forkserver._forkserver)


@contextmanager
def _unsignalled() -> Iterator[None]:
    """Start processes that no signal reaches: a terminal sends it to all, and it is for the starter to stop the others.
    They inherit the mask; a training takes SIGTERM out of it."""
    resource_tracker.ensure_running()  # would end the mask
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_server(server: Any) -> None:
    """It would see the end of its starter only after its imports."""
    with suppress(TypeError, ProcessLookupError):  # TypeError: it has not been started
        os.kill(server._forkserver_pid, signal.SIGKILL)


def _context() -> Any:
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(_PRELOADED))
    return context


def _file(training: TrainingJob) -> str:
    return training.name.replace("/", "-")


def _start(context: Any, training: TrainingJob, folder: Path, environment: Mapping[str, str]) -> BaseProcess:
    from trainer import tracking

    settings = folder / "settings" / f"{_file(training)}.yaml"
    settings.write_text(yaml.safe_dump(training.config.model_dump(mode="json"), sort_keys=False), encoding="utf-8")
    training.folder.mkdir(parents=True, exist_ok=True)
    with tracking.file_lock(training.folder / "lock"):  # a process of a killed pipeline may be ending
        pass
    log = folder / "logs" / f"{_file(training)}.log"
    process: BaseProcess = context.Process(
        target=_train,
        args=(training.recipe, training.config, str(log), dict(environment), os.getpid()),
        name=training.name,
    )
    with _unsignalled():
        process.start()
    return process


def _train(recipe: str, config: PretrainConfig, log: str, environment: dict[str, str], starter: int) -> None:
    """The child process: train, write output to `log`, and end with the recipe's exit code."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)  # the parent is the fork server, which ends with the starter
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
    if not _is_alive(starter):
        os._exit(1)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for descriptor in (1, 2):
        os.dup2(output, descriptor)
    os.environ.clear()
    os.environ.update(environment)
    from trainer.recipes.dispatch import run_recipe

    code = run_recipe(recipe, config)
    sys.stdout.flush()
    sys.exit(code)


def _is_alive(process: int) -> bool:
    with suppress(ProcessLookupError):
        os.kill(process, 0)
        return True
    return False


def _exit_code(code: int) -> int:
    """143 for a process that SIGTERM ended, 1 for one that crashed, 5 ("run again") for one that was killed."""
    if code >= 0:
        return code
    return 143 if -code == signal.SIGTERM else 1 if -code in _CRASHES else 5


def _reason(log: Path, code: int | None) -> str:
    """One line: the last line of the process, or how it was killed."""
    if code is not None and code < 0:
        return f"killed by {signal.Signals(-code).name}; see {log}"
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() if log.exists() else []
    said = lines[-1] if lines else f"ended with {code}; see {log}"
    return said.removeprefix("pretrain: ").removeprefix("finetune: ")


def _stop(processes: Sequence[BaseProcess]) -> None:
    for process in processes:
        process.terminate()
    for process in processes:
        process.join(STOP_SECONDS)
        if process.exitcode is None:
            process.kill()
            process.join()
