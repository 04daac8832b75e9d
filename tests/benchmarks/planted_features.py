"""Whether three arms find what is planted: generated logs whose features tell of tastes, and their noise twins.

A run is a log of its own: tables, vectors, trainings of three arms over seeds, and the verdict on cold items. Verdicts
are kept in <work>/planted/results.json: the same command continues after an interruption, and repeats what was made by
other code.

How many seeds there are was chosen on the logs 0 to 4, by power: with their spreads twelve seeds show a gain as theirs
on five logs of five with probability 0.985, five seeds with 0.25 (tests/trainer/evaluation/test_three_arms.py has the
simulation). Model and settings were chosen on log 0. So the bars are of logs that nothing was chosen on.
"""

import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from etl.settings import config_hash
from tests.benchmarks.__main__ import Options
from tests.benchmarks.harness import Numbers, Report
from tests.fixtures.planted import found, planted
from trainer.code_hash import code_hash

PLANTED, TWINS = range(5, 10), range(5, 45)  # seeds of logs
SEEDS = tuple(range(12))  # of the trainings on a log
MOST_FALSE = 2  # of the twins
COLUMNS = ("log", "none", "real", "shuffled", "over none", "p", "over shuffled", "p", "verdict", "seconds")


def measure(report: Report, options: Options) -> None:
    folder = options.work / "planted"
    folder.mkdir(parents=True, exist_ok=True)
    verdicts: dict[str, list[str]] = {}
    for name, strength, logs in (("planted", 1.0, PLANTED), ("noise twin", 0.0, TWINS)):
        runs = []
        for seed in logs:
            runs.append(made(folder, seed, strength))
            report.say(f"{name} {seed}: {runs[-1]['verdict']}, {runs[-1]['seconds']:.0f} s")
        rows = [_row(seed, run) for seed, run in zip(logs, runs, strict=True)]
        report.table(f"{name}: NDCG@10 among cold items", COLUMNS, rows)
        verdicts[name] = [run["verdict"] for run in runs]
    report.bar("planted logs that say helps", verdicts["planted"].count("helps"), at_least=len(PLANTED))
    report.bar("noise twins that say helps", verdicts["noise twin"].count("helps"), at_most=MOST_FALSE)


def made(folder: Path, seed: int, strength: float) -> Numbers:
    """The claim on a log, now or before."""
    kept = folder / "results.json"
    known = json.loads(kept.read_text()) if kept.exists() else {}
    name = f"{strength:g}-{seed}"
    settings = config_hash(planted(Path("."), seed=seed, strength=strength, seeds=SEEDS))
    key = {"code": code_hash("trainer.experiment.arms"), "settings": settings}
    if name in known and known[name]["key"] == key:
        return dict(known[name]["claim"])
    here, begun = folder / name, time.monotonic()
    claim = found(planted(here, seed=seed, strength=strength, seeds=SEEDS))
    claim["seconds"] = time.monotonic() - begun
    kept.write_text(json.dumps(known | {name: {"key": key, "claim": claim}}, indent=1))
    shutil.rmtree(here)
    return claim


def _row(seed: int, run: Numbers) -> Sequence[object]:
    gains = [value for name in ("over_none", "over_shuffled") for value in (run[name]["gain"], run[name]["p_value"])]
    means = [run["means"][arm] for arm in ("none", "real", "shuffled")]
    return [seed, *means, *gains, run["verdict"], run["seconds"]]
