"""The demo's verdict over generator seeds, thread counts and precisions, and on logs whose source domain is random.

A run is `make demo` as a user starts it, with a folder and an MLflow store of its own; runs of one generator seed share
its tables. Results are kept in <work>/demo/results.json by name: the same command continues after an interruption, and
repeats only the runs whose code or settings have changed.
"""

import fnmatch
import functools
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from tests.benchmarks.__main__ import Options
from tests.benchmarks.harness import ROOT, Numbers, Report
from tests.benchmarks.log_statistics import read_log, statistics
from trainer.evaluation.significance import compare

SEEDS = (0, 1, 2, 3, 4)
BF16_SEEDS = (0, 1)
METRIC = "NDCG@10"
SCRATCH, TRANSITIONS = "none", "transitions"
LEVEL = 0.01
PASSED, REFUSED = 0, 3  # exit codes of the pipeline
TIMEOUT = 3_600


@dataclass(frozen=True)
class Run:
    """One run of the demo."""

    seed: int  # of the generator
    threads: int
    precision: str
    teaches: bool = True

    @property
    def name(self) -> str:
        if not self.teaches:
            return f"null-{self.seed}"
        return f"seed-{self.seed}-{self.precision}-{self.threads}"

    @property
    def log(self) -> str:
        return f"lake-{self.seed}" if self.teaches else f"lake-null-{self.seed}"

    def settings(self, folder: Path) -> list[str]:
        given = {"etl.source.seed": self.seed, "etl.lake": folder.parent / self.log, "runs": folder / "runs"}
        for section in ("pretrain", "finetune"):
            given[f"{section}.runtime.threads"] = self.threads
        for section in ("pretrain", "finetune", "evaluate", "promote"):
            given[f"{section}.runtime.precision"] = self.precision
        if not self.teaches:
            given["etl.source.source_teaches"] = "false"
        return [text for key, value in given.items() for text in (f"--{key}", str(value))]


RUNS = (
    *(Run(seed, threads, "fp32") for seed in SEEDS for threads in (1, 2)),
    *(Run(seed, 1, "bf16") for seed in BF16_SEEDS),
    *(Run(seed, 1, "fp32", teaches=False) for seed in SEEDS),
)
COLUMNS = (
    "run",
    "champion",
    METRIC,
    "from scratch",
    "gain %",
    "p",
    "best baseline",
    METRIC,
    "its p",
    "of champion",
    TRANSITIONS,
    "its p",
    "gate",
    "seconds",
)


def measure(report: Report, options: Options) -> None:
    folder = options.work / "demo"
    folder.mkdir(parents=True, exist_ok=True)
    chosen = [run for run in RUNS if _is_chosen(run.name, options.only)]
    found: dict[str, Numbers] = {}
    for run in chosen:
        found[run.name] = made(run, folder)
        report.say(f"{run.name}: {_verdict(found[run.name])}, {found[run.name]['seconds']:.0f} s")
    taught = [run for run in chosen if run.teaches]
    null = [run for run in chosen if not run.teaches]
    for title, runs in (("The demo", taught), ("Its source drawn by popularity alone, in random order", null)):
        if runs:
            report.table(
                f"{title}: {METRIC} of {_protocol(found[runs[0].name])}",
                COLUMNS,
                [_row(run.name, found[run.name]) for run in runs],
            )
    if _is_chosen("statistics", options.only):
        _show_statistics(report, folder, [run for run in chosen if run.teaches][:1], options.data)
    _hold(report, [found[run.name] for run in taught], [found[run.name] for run in null])


def _is_chosen(name: str, only: Sequence[str]) -> bool:
    return not only or any(fnmatch.fnmatch(name, f"{wanted}*") for wanted in only)


def _hold(report: Report, taught: Sequence[Numbers], null: Sequence[Numbers]) -> None:
    """The bars, over the runs that were chosen."""
    bar = functools.partial(report.bar, seen_on=("AVX512-bf16", "AMX"))
    if taught:
        better = [run for run in taught if run["gain"] > 0 and run["p"] <= LEVEL]
        above = [run for run in taught if all(b["gain"] > 0 and b["p"] <= LEVEL for b in run["baselines"].values())]
        bar("runs that the gate passes", sum(r["passed"] for r in taught), at_least=len(taught))
        bar(f"runs above from-scratch, p ≤ {LEVEL}", len(better), at_least=len(taught))
        bar(f"runs above every untrained baseline, p ≤ {LEVEL}", len(above), at_least=len(taught))
        ratios = [run["baselines"][run["best_baseline"]]["mean"] / run["mean"] for run in taught]
        bar("best untrained baseline over champion, least", min(ratios), at_least=0.70)
        bar("best untrained baseline over champion, most", max(ratios), at_most=0.95)
        gains = [100 * run["gain"] / run["scratch"] for run in taught]
        bar("gain over from-scratch, %, least", min(gains), at_least=5)
        bar("gain over from-scratch, %, most", max(gains), at_most=40)
    if null:
        bar("runs that the gate passes, of a source that teaches nothing", sum(r["passed"] for r in null), at_most=1)


# --- one run ----------------------------------------------------------------------------------------------------------


def made(run: Run, folder: Path) -> Numbers:
    """What the run gave, now or before. Raises RuntimeError where the pipeline fails."""
    results = folder / "results.json"
    kept = json.loads(results.read_text()) if results.exists() else {}
    here = folder / run.name
    settings = run.settings(here)
    key = {"code": source_code(), "run": asdict(run)}
    if run.name in kept and kept[run.name]["key"] == key:
        return dict(kept[run.name]["numbers"])
    shutil.rmtree(here, ignore_errors=True)
    here.mkdir(parents=True)
    seconds, code = pipeline(settings, here)
    numbers = {"seconds": seconds, "passed": code == PASSED, **read_run(here / "runs")}
    kept = json.loads(results.read_text()) if results.exists() else {}
    kept[run.name] = {"key": key, "numbers": numbers}
    unfinished = results.with_suffix(".new")
    unfinished.write_text(json.dumps(kept, indent=1))
    unfinished.rename(results)
    return numbers


def pipeline(settings: Sequence[str], folder: Path) -> tuple[float, int]:
    """Run the demo's pipeline in `folder`; seconds and exit code. Raises RuntimeError for any but 0 and 3."""
    command = [sys.executable, "-m", "graftrec", "pipeline", "--config", "pipeline/demo", *settings]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db"}
    begun = time.monotonic()
    with (folder / "output.txt").open("w") as output:
        done = subprocess.run(
            command, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT, timeout=TIMEOUT
        )
    if done.returncode not in (PASSED, REFUSED):
        end = (folder / "output.txt").read_text(errors="replace")[-2_000:]
        raise RuntimeError(f"{folder.name}: exit {done.returncode}: {end}")
    return time.monotonic() - begun, done.returncode


def source_code() -> str:
    """A hash of all that a run depends on beside its settings."""
    digest = hashlib.sha256()
    for pattern in ("etl/**/*.py", "trainer/**/*.py", "graftrec/**/*.py", "conf/**/*.yaml"):
        for path in sorted(ROOT.glob(pattern)):
            digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def read_run(runs: Path) -> Numbers:
    """Champion, from-scratch and baselines from the files of a finished run: models' validation metrics, and the
    evaluation's metrics of every user."""
    (evaluation,) = runs.glob("**/evaluate/evaluation/summary.json")
    protocol = str(json.loads(evaluation.read_text())["rows"][0]["protocol"])
    table = pq.read_table(evaluation.with_name("users.parquet")).to_pandas()
    table = table[(table["protocol"] == protocol) & (table["convention"] == "list")].sort_values(["seed", "user"])
    models, baselines = {}, {}
    scores = _validation(runs)
    for label, rows in table.groupby("label"):
        users = rows["user"].nunique()
        (models if label in scores else baselines)[label] = rows[METRIC].to_numpy().reshape(-1, users)
    champion = max((label for label in models if label != SCRATCH), key=lambda label: float(np.mean(scores[label])))
    ours = models[champion]
    over_scratch = compare(ours, models[SCRATCH])
    against = {}
    for label, (values,) in baselines.items():
        over = compare(ours, values)
        against[label] = {"mean": float(values.mean()), "gain": over.gain, "p": over.p_value}
    return {
        "protocol": protocol,
        "users": ours.shape[1],
        "champion": champion,
        "mean": float(ours.mean()),
        "scratch": float(models[SCRATCH].mean()),
        "gain": over_scratch.gain,
        "p": over_scratch.p_value,
        "models": {label: float(values.mean()) for label, values in models.items()},
        "best_baseline": max(against, key=lambda label: against[label]["mean"]),
        "baselines": against,
    }


def _validation(runs: Path) -> dict[str, list[float]]:
    """Label (a fine-tuned model's folder without its seed) -> validation metric of each seed."""
    found: dict[str, list[float]] = {}
    for done in runs.glob("**/done.json"):
        label = done.parent.name.rpartition("-")[0]
        if label != "pretrain":
            found.setdefault(label, []).append(json.loads(done.read_text())["metrics"][f"validation/{METRIC}"])
    return found


# --- what is shown ----------------------------------------------------------------------------------------------------


def _row(name: str, found: Numbers) -> list[object]:
    best, directed = found["baselines"][found["best_baseline"]], found["baselines"][TRANSITIONS]
    return [
        name,
        found["champion"],
        _four(found["mean"]),
        _four(found["scratch"]),
        f"{100 * found['gain'] / found['scratch']:+.1f}",
        f"{found['p']:.1g}",
        found["best_baseline"],
        _four(best["mean"]),
        f"{best['p']:.1g}",
        f"{best['mean'] / found['mean']:.2f}",
        _four(directed["mean"]),
        f"{directed['p']:.1g}",
        _verdict(found),
        f"{found['seconds']:.0f}",
    ]


def _four(value: float) -> str:
    return f"{value:.4f}"


def _verdict(found: Numbers) -> str:
    return "passed" if found["passed"] else "refused"


def _protocol(found: Numbers) -> str:
    return f"{found['protocol']} ranking, {found['users']:,} users"


def _show_statistics(report: Report, folder: Path, runs: Sequence[Run], data: Path | None) -> None:
    """The demo's log beside MovieLens-1M."""
    columns: dict[str, dict[str, Any]] = {}
    for run in runs:
        columns[f"the demo's, seed {run.seed}"] = statistics(read_log(str(folder / run.log)))
    if data is not None and (data / "ratings.dat").exists():
        columns["MovieLens-1M"] = statistics(read_log(str(_movielens(folder, data))))
    else:
        report.say("MovieLens-1M stands beside it where DATA names its folder (ratings.dat)")
    if columns:
        names = list(next(iter(columns.values())))
        rows = [[name, *(column[name] for column in columns.values())] for name in names]
        report.table("What the logs look like", ["", *columns], rows)


def _movielens(folder: Path, data: Path) -> Path:
    """A lake of MovieLens-1M's log; made once."""
    lake = folder / "lake-ml1m"
    command = [sys.executable, "-m", "etl", "all", "--config", "etl/ml1m", "--lake", str(lake)]
    command += ["--source.root", str(data.absolute()), "--knowledge.files", "[]"]
    command += ["--splits", json.dumps([{"name": "last-5", "validation": 2, "test": 3}])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"etl/ml1m: exit {done.returncode}: {(done.stderr or done.stdout)[-2_000:]}")
    return lake
