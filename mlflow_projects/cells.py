"""Training runs of an experiment in parallel processes: each done once, whatever is killed when."""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from etl.config import GraftrecError
from trainer import pretrain, tracking

if TYPE_CHECKING:
    from experiment import Cell

ROOT = Path(__file__).resolve().parent.parent
POLL_SECONDS = 0.1
STOP_SECONDS = 30.0  # a stopped run writes a checkpoint first
_SCORE = "NDCG@10"
_PR_SET_PDEATHSIG = 1


def run(cells: Sequence["Cell"], *, folder: Path, jobs: int, environment: Mapping[str, str]) -> None:
    """Train all cells, at most `jobs` at a time; sets `is_done` or `failure` of each. The output of a cell is in
    <folder>/logs. What has failed is tried again by the next call."""
    for name in ("logs", "settings"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    waiting, running = list(cells), dict[int, tuple["Cell", subprocess.Popen[bytes], float]]()
    finished = 0

    def end(cell: "Cell", how: str) -> None:
        nonlocal finished
        finished += 1
        print(f"[{finished}/{len(cells)}] {cell.name}: {cell.failure or how}", flush=True)

    try:
        while waiting or running:
            while len(running) < jobs and (cell := _ready(waiting)) is not None:
                if cell.parent is not None and not cell.parent.is_done:
                    cell.failure = f"its pre-training, {cell.parent.name}, failed: {cell.parent.failure}"
                    end(cell, "")
                elif (done := _finished(cell)) is not None:
                    end(cell, f"stands, {done}")
                else:
                    running[id(cell)] = (cell, _start(cell, folder, environment), time.monotonic())
            for key, (cell, process, begun) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[key]
                done = _finished(cell) if process.returncode == 0 else None
                if done is None:
                    cell.failure = _reason(folder / "logs" / f"{cell.name}.log", process.returncode)
                end(cell, f"{done}, {time.monotonic() - begun:.0f} s")
            if running:
                time.sleep(POLL_SECONDS)
    finally:
        _stop([process for _, process, _ in running.values()])


def _ready(waiting: list["Cell"]) -> "Cell | None":
    """The first that waits for no other; it is taken out."""
    for place, cell in enumerate(waiting):
        if cell.parent is None or cell.parent.is_done or cell.parent.failure:
            return waiting.pop(place)
    return None


def _finished(cell: "Cell") -> str | None:
    """How good its model is, where there is one of these settings, code and data; sets is_done."""
    try:
        done = pretrain.finished(cell.config)
    except GraftrecError:
        return None  # its own process will say what is wrong
    if done is None:
        return None
    cell.is_done = True
    return f"validation {_SCORE} {done.metrics[f'validation/{_SCORE}']:.4f}"


def _start(cell: "Cell", folder: Path, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    settings = folder / "settings" / f"{cell.name}.yaml"
    settings.write_text(yaml.safe_dump(cell.config.model_dump(mode="json"), sort_keys=False), encoding="utf-8")
    cell.folder.mkdir(parents=True, exist_ok=True)
    with tracking.file_lock(cell.folder / "lock"):  # a process of a killed experiment may be ending
        pass
    path = os.pathsep.join(filter(None, (str(ROOT), environment.get("PYTHONPATH"))))
    with (folder / "logs" / f"{cell.name}.log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "trainer", cell.recipe, "--config", str(settings)],
            env={**environment, "PYTHONPATH": path}, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
            preexec_fn=_die_with(os.getpid()) if _LIBC is not None else None,
        )  # fmt: skip


_LIBC: Any = ctypes.CDLL(None) if sys.platform == "linux" else None


def _die_with(parent: int) -> Any:
    """What a child runs first, so that the kernel stops it when the experiment is killed (on Linux)."""

    def ask() -> None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            os._exit(1)

    return ask


def _reason(log: Path, code: int) -> str:
    """One line: what the process said last, or how it was killed."""
    if code < 0:
        return f"killed by {signal.Signals(-code).name}; see {log}"
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    told = lines[-1] if lines else f"ended with {code}"
    return told.removeprefix("pretrain: ").removeprefix("finetune: ")


def _stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        process.terminate()
    for process in processes:
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
