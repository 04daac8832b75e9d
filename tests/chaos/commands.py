"""The commands that rounds run, their settings and logs, and a process of one: its output, exit code and seconds."""

import contextlib
import dataclasses
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
NUM_USERS, NUM_ITEMS = 300, 120
CLOSE_SECONDS = 20  # tracking.close_seconds
REQUEST_SECONDS = 2  # MLFLOW_HTTP_REQUEST_TIMEOUT
NEIGHBOURS = {  # files of somebody else, beside ours
    "notes/thesis.txt": "not yours\n",
    "runs/someone/model/weights.safetensors": "not yours either\n",
    "runs/someone/evaluation/notes.txt": "nor this\n",
}


@dataclass(frozen=True)
class Command:
    """`arguments` follow the interpreter. `adds`: files put in place before, as (from, to) within the folder."""

    name: str
    arguments: tuple[str, ...]
    adds: tuple[tuple[str, str], ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def tracked(self) -> bool:
        """Whether it talks to MLflow."""
        return "etl" not in self.arguments[:2]

    def on(self, engine: str) -> "Command":
        """The same on Spark: in one process, or on a `cluster` of two executors."""
        master = {"spark": "local[2]", "cluster": "local-cluster[2,1,1024]"}[engine]
        more = ("--spark.engine", "spark", "--spark.master", master)
        return dataclasses.replace(self, name=f"{self.name}@{engine}", arguments=(*self.arguments, *more))


def _etl(name: str, *more: str, job: str = "all", **given: tuple[tuple[str, str], ...]) -> Command:
    return Command(name, ("-m", "etl", job, "--config", "etl.yaml", *more), **given)


def _train(name: str, recipe: str, *more: str) -> Command:
    return Command(name, ("-m", "trainer", recipe, "--config", f"{recipe}.yaml", *more))


def _none(seed: int) -> Command:
    return _train(f"none-{seed}", "finetune", "--name", f"none-{seed}", "--transfer", "none", "--train.seed", str(seed))


_RANKS = ("-m", "torch.distributed.run", "--nproc-per-node=2", "--redirects", "3", "--log-dir", "../logs/ranks")
_DATES = '"train_until": "1970-01-12T14:00Z", "validate_until": "1970-01-12T15:00Z"'
_BY_TIME = '[{"name": "last-5"}, {"name": "by-time", ' + _DATES + "}]"
COMMANDS = {
    command.name: command
    for command in (
        _etl("etl"),
        _etl("etl-day", adds=(("later/day2.csv", "days/day2.csv"),)),
        _etl("etl-kcore", "--kcore.min_item", "8"),
        _etl("etl-day-kcore", "--kcore.min_item", "8", adds=(("later/day2.csv", "days/day2.csv"),)),
        _etl("etl-other", "--source.root", "other"),
        _etl("etl-interactions", job="interactions"),
        _etl("etl-mended", adds=(("later/day1.csv", "days/day1.csv"),)),
        _etl("etl-by-time", "--splits", _BY_TIME),
        _train("pretrain", "pretrain"),
        _train("pretrain-other", "pretrain", "--train.seed", "7"),
        _train("deep", "finetune", "--name", "deep", "--parent", "runs/pretrain/model"),
        _none(0),
        _none(1),
        Command("ranks", (*_RANKS, "-m", "trainer", "pretrain", "--config", "pretrain.yaml", "--name", "ranks")),
        _train("search", "search"),
        _train("evaluate", "evaluate", "--models", "[{model: runs/none-0/model}, {model: runs/none-1/model}]"),
        _train("promote-0", "promote", "--candidate", "runs/none-0/model"),
        _train("promote-1", "promote", "--candidate", "runs/none-1/model"),
        _train("recommend", "recommend"),
        _train("recommend-5", "recommend", "--k", "5"),
        Command("pipeline", ("-m", "graftrec", "pipeline", "--config", "pipeline.yaml")),
    )
}


# --- the folder that rounds begin with ------------------------------------------------------------------------------


def write_start(folder: Path) -> None:
    """Raw logs, settings, and files of neighbours."""
    for name, text in (NEIGHBOURS | _logs()).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    for name, settings in _settings().items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))


def _logs() -> dict[str, str]:
    items = ["id|title|year|genres|director"]
    for item in range(NUM_ITEMS):
        items.append(f"i{item}|Title {item}|{1990 + item % 30}|{'Drama' if item % 3 else 'Comedy'}|Person {item % 20}")
    users = ["id,group", *(f"u{user},{'ab'[user % 2]}" for user in range(NUM_USERS + 40))]
    found = {"days/day1.csv": _events(0, range(NUM_USERS), 20), "later/day2.csv": _events(1, range(250, 340), 5)}
    first = found["days/day1.csv"].splitlines(keepends=True)
    found["later/day1.csv"] = "".join([*first[:5], first[5].replace(",i", ",i9"), *first[6:]])  # of another item
    found["other/days/day1.csv"] = _events(2, range(100, 400), 15)
    for root in ("", "other/"):
        found |= {f"{root}items.txt": "\n".join(items) + "\n", f"{root}users.csv": "\n".join(users) + "\n"}
    return found


def _events(day: int, users: range, mean: int) -> str:
    """Each user walks through items near one of their own taste."""
    draw = random.Random(day)
    lines = ["user,item,ts"]
    for user in users:
        for event in range(draw.randint(mean // 2, 2 * mean)):
            item = (user * 7 + event * 3 + draw.randint(0, 12) ** 2) % NUM_ITEMS
            lines.append(f"u{user},i{item},{1_000_000 * (day + 1) + 600 * event + user % 600}")
    return "\n".join(lines) + "\n"


def _settings() -> dict[str, dict[str, object]]:
    etl = {
        "lake": "lake",
        "source": {
            "kind": "log",
            "events": {"path": "days", "columns": {"user": "user", "item": "item", "time": "ts"}},
            "items": {
                "path": "items.txt",
                "separator": "|",
                "id": "id",
                "title": "title",
                "year": "year",
                "categories": "genres",
                "people": {"director": ["director"]},
            },
            "users": {"path": "users.csv", "id": "id", "attributes": {"group": "group"}},
        },
        "kcore": {"min_user": 2, "min_item": 2},
        "domains": [{"name": "source", "any_of": ["Drama"]}, {"name": "target", "any_of": ["Comedy"]}],
        "baskets": {"gap_minutes": 30},
        "buckets": 2,
        "spark": {"engine": "sail", "shuffle_partitions": 2},
    }
    tracking = {"system_metrics": False, "close_seconds": CLOSE_SECONDS}
    runtime = {"threads": 1, "precision": "fp32", "progress": False}
    pretrain = {
        "name": "pretrain",
        "data": {"lake": "lake", "domain": "source"},
        "model": {
            "width": 16,
            "blocks": 1,
            "max_length": 24,
            "user_width": 8,
            "knowledge_width": 4,
            "knowledge": {"director": 1},
        },
        "task": {"kind": "next_item"},
        "train": {
            "epochs": 3,
            "min_epochs": 1,
            "patience": 3,
            "batch_size": 64,
            "learning_rate": 0.01,
            "warmup_steps": 5,
            "checkpoint_seconds": 0.2,
        },
        "evaluation": {"protocols": ["full"]},
        "runtime": runtime,
        "tracking": tracking,
    }
    finetune = pretrain | {"name": "finetune", "data": {"lake": "lake", "domain": "target"}}
    gate = {
        "level": 0.99,
        "min_seeds": 1,
        "min_users": 10,
        "champion_margin": 10.0,
        "slice_margin": 10.0,
        "must_beat": [],
    }
    promote = {
        "registered_model": "chaos",
        "gate": gate,
        "baselines": {"enabled": False},
        "runtime": runtime,
        "tracking": tracking,
    }
    recommend = {"registered_model": "chaos", "spark": etl["spark"], "tracking": tracking}
    evaluate = {"name": "evaluate", "runtime": runtime, "tracking": tracking, "evaluation": {"protocols": ["full"]}}
    search = {
        "name": "search",
        "pretrain": pretrain,
        "trials": 2,
        "random_trials": 1,
        "tracking": tracking,
        "space": {"train.learning_rate": {"low": 0.001, "high": 0.01}},
    }
    pipeline = {
        "runs": "runs/pipeline",
        "registered_model": "piped",
        "etl": etl,
        "pretrain": pretrain,
        "finetune": finetune,
        "promote": promote,
        "evaluate": evaluate,
        "recommend": recommend,
        "transfers": ["none", "deep"],
        "seeds": [0],
        "reads_all": False,
        "cold_users": False,
        "jobs": 1,
        "tracking": tracking,
    }
    return {
        "etl": etl,
        "pretrain": pretrain,
        "finetune": finetune,
        "promote": promote,
        "recommend": recommend,
        "evaluate": evaluate,
        "search": search,
        "pipeline": pipeline,
    }


def add_files(command: Command, folder: Path) -> None:
    for source, target in command.adds:
        shutil.copy2(folder / source, folder / target)


# --- processes --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ended:
    """A command that has ended. `code`: negative for a signal's number, as of subprocess; `hung`: it ran too long."""

    command: Command
    code: int
    seconds: float
    output: str
    errors: str
    hung: bool = False
    killed: bool = False  # by the round


class Running:
    """A command in a process group of its own."""

    def __init__(
        self, command: Command, folder: Path, logs: Path, *, more: Mapping[str, str] | None = None, limit: int = 0
    ) -> None:
        """`more`: of the environment; `limit`: the largest file, in bytes (0: none)."""
        logs.mkdir(parents=True, exist_ok=True)
        number = len(list(logs.glob("*.out")))
        self.command, self._logs = command, [logs / f"{number}-{command.name}.{kind}" for kind in ("out", "err")]
        prefix = ["prlimit", f"--fsize={limit}"] if limit else []
        self._begun, self.killed = time.monotonic(), False
        with self._logs[0].open("wb") as out, self._logs[1].open("wb") as err:
            self.process = subprocess.Popen(
                [*prefix, sys.executable, *command.arguments],
                cwd=folder,
                stdout=out,
                stderr=err,
                stdin=subprocess.DEVNULL,
                env=_environment() | dict(command.environment) | dict(more or {}),
                start_new_session=True,
            )

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal to the whole group."""
        self.killed = True
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def end(self, limit_seconds: float) -> Ended:
        hung = False
        try:
            self.process.wait(max(1.0, limit_seconds - (time.monotonic() - self._begun)))
        except subprocess.TimeoutExpired:
            hung = True
        seconds = time.monotonic() - self._begun
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)  # what it has left behind, too
        code = self.process.wait()
        out, err = (path.read_text(errors="replace") for path in self._logs)
        return Ended(self.command, code, seconds, out, err, hung, self.killed)


def _environment() -> dict[str, str]:
    ours = {key: value for key, value in os.environ.items() if not key.startswith(("MLFLOW", "GRAFTREC", "SPARK"))}
    return ours | {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": str(REQUEST_SECONDS),
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    }
