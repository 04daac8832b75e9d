"""What features are worth for items that nobody has had: models with and without them beside a ridge regression,
predicted popularity and content kNN, paired on the same draws of cold items.

    python -m tests.benchmarks.cold_items --lake LAKE --work FOLDER --draws 0 1 2 --out results.json

`LAKE`: by `etl/ml1m_cold_items`, with features by `features/flags_ml1m`. For each draw (a
seed of the hash) a model of `conf/pretrain/ml1m_cold_items.yaml` is trained, and one without features; `evaluate`
scores them on the test part beside the baselines. Tests are of users and draws, crossed, and of users alone.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from etl.settings import load, replaced
from trainer.config import EvaluateConfig, EvaluationConfig, PretrainConfig
from trainer.config.evaluation import BaselinesConfig, EvaluatedModel
from trainer.evaluation.baselines.names import OF_COLD_ITEMS
from trainer.evaluation.significance import Comparison, compare, paired_t
from trainer.recipes import evaluate, pretrain

METRIC = "NDCG@10"
FEATURES, NONE = "features", "none"
PROTOCOLS = ("cold", "warm")


def draw(number: int, lake: str, work: Path, overrides: list[str]) -> pl.DataFrame:
    """Each user's metric of one draw: label, protocol, user (raw id), value."""
    given = ["--data.lake", lake, "--data.split", f"cold-items-{number}", "--output", str(work), *overrides]
    given += ["--tracking.enabled", "false", "--runtime.progress", "false"]
    config = load(PretrainConfig, "pretrain/ml1m_cold_items", given)
    with_features = replaced(config, name=f"features-{number}")
    model = replaced(config.model, features=type(config.model.features)())
    # Without features nothing is learned of cold items: the best epoch is that of warm ones.
    by_warm = EvaluationConfig(protocols=("warm", "cold"))
    without = replaced(config, name=f"none-{number}", model=model, evaluation=by_warm)
    folders = {FEATURES: pretrain.run(with_features).model, NONE: pretrain.run(without).model}
    report = evaluate.run(
        EvaluateConfig(
            name=f"evaluate-{number}",
            output=str(work),
            models=tuple(EvaluatedModel(model=str(folder), label=label) for label, folder in folders.items()),
            against=NONE,
            baselines=BaselinesConfig(encoders=config.model.features.encoders),
            evaluation=EvaluationConfig(protocols=PROTOCOLS),
            tracking=config.tracking,
            runtime=config.runtime,
        )
    )
    print(report.text, flush=True)
    users = pl.read_parquet(report.folder / "users.parquet").filter(pl.col("convention") == "list")
    return users.select("label", "protocol", "user", pl.col(METRIC).alias("value"))


def paired(draws: list[pl.DataFrame], label: str, other: str, protocol: str) -> tuple[Comparison, Comparison]:
    """Of users who hold out something in every draw: over users and draws, which speaks of other draws too, and over
    users with these draws alone, by each user's mean."""

    def values(name: str) -> list[dict[str, float]]:
        found = []
        for one in draws:
            own = one.filter((pl.col("label") == name) & (pl.col("protocol") == protocol))
            found.append({u: v for u, v in zip(own["user"], own["value"], strict=True) if v == v})
        return found

    ours, theirs = values(label), values(other)
    users = sorted(set.intersection(*(set(one) for one in (*ours, *theirs))))
    left, right = (np.array([[one[user] for user in users] for one in both]) for both in (ours, theirs))
    return compare(left, right), paired_t(left.mean(0), right.mean(0))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--lake", required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--draws", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path)
    own, overrides = parser.parse_known_args()
    draws = [draw(number, own.lake, own.work, overrides) for number in own.draws]
    report: dict[str, Any] = {"metric": METRIC, "draws": own.draws, "means": {}, "gains": {}}
    for protocol in PROTOCOLS:
        for label in draws[0]["label"].unique(maintain_order=True):
            of_draw = [
                one.filter((pl.col("label") == label) & (pl.col("protocol") == protocol))["value"].fill_nan(None).mean()
                for one in draws
            ]
            report["means"].setdefault(protocol, {})[label] = of_draw
            shown = ", ".join(f"{value:.4f}" for value in of_draw)
            print(f"{protocol:5} {label:32} {np.mean(of_draw):.4f} ({shown})")
    for protocol in PROTOCOLS:
        for other in (NONE, *OF_COLD_ITEMS):
            gain, of_users = paired(draws, FEATURES, other, protocol)
            report["gains"].setdefault(protocol, {})[other] = {
                "gain": gain.gain, "low": gain.low, "high": gain.high, "p": gain.p_value,
                "p_of_users": of_users.p_value,
                "users": gain.num_users, "draws": gain.num_seeds, "relative": gain.relative_gain,
            }  # fmt: skip
            print(
                f"{protocol:5} {FEATURES} over {other:32} {gain.gain:+.4f} [{gain.low:+.4f}, {gain.high:+.4f}], "
                f"{gain.relative_gain:+.1%}, p {gain.p_value:.2g} over users and draws, "
                f"{of_users.p_value:.2g} over users with these draws ({gain.num_users:,} users, {gain.num_seeds} draws)"
            )
    if own.out:
        own.out.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
