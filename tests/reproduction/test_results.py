"""Results that are kept in the repository: each can be drawn as a report, and one row of each comes out again.

GRAFTREC_DATA=<folder of MovieLens-1M> python -m pytest -m slow tests/reproduction; without it those of generated logs.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from etl.config import MovielensSource
from etl.settings import load
from tests.fixtures.places import ROOT
from trainer.evaluation.card import ProtocolCard
from trainer.experiment.arms_plan import ArmsConfig
from trainer.experiment.plan import ExperimentConfig
from trainer.report import report

KEPT = sorted((Path(__file__).parent / "results").glob("*.json"))
ARMS = sorted((Path(__file__).parent / "results" / "arms").glob("*.json"))  # experiments on features
DATA = os.environ.get("GRAFTREC_DATA")


@pytest.mark.parametrize("path", KEPT, ids=lambda path: path.stem)
def test_kept_results_say_where_they_come_from_and_can_be_drawn(path: Path, tmp_path: Path) -> None:
    found = json.loads(path.read_text(encoding="utf-8"))
    assert path.stem == f"{found['experiment']}-{found['preset']}"
    done = [row for row in found["rows"] if row["status"] == "done" and row["kind"] != "baseline"]
    assert done
    for row in done:
        for places in row["metrics"].values():
            for metrics in places.values():
                for value in metrics.values():
                    assert len(value["seeds"]) == len(row["seeds"])
                    assert value["mean"] == pytest.approx(sum(value["seeds"]) / len(value["seeds"]))
        assert all(run["model_hash"] and run["seconds"] > 0 for run in row["seeds"])
    for entry in found.get("cards", ()):
        card = ProtocolCard.model_validate(entry["card"])
        assert (card.hash, card.text()) == (entry["hash"], entry["text"])
        assert set(entry["labels"]) <= {row["id"] for row in found["rows"]}
    assert report.write(found, tmp_path).is_file()


@pytest.mark.parametrize("path", ARMS, ids=lambda path: path.stem)
def test_kept_claims_on_features_follow_their_tests(path: Path) -> None:
    found = json.loads(path.read_text(encoding="utf-8"))
    settings = [load(ArmsConfig, file) for file in sorted((ROOT / "conf" / "arms").glob("*.yaml"))]
    (config,) = [one for one in settings if one.name == path.stem == found["experiment"]]
    assert not found["missing"]
    assert found["claims"]
    wanted = {
        (slice_name, transfer, features)
        for slice_name in config.slices
        for transfer in config.transfers
        for features in config.compared
    }
    assert {(one["slice"], one["transfer"], one["features"]) for one in found["claims"]} == wanted
    for claim in found["claims"]:
        means, tests = claim["means"], (claim["over_none"], claim["over_shuffled"])
        for test, other in zip(tests, ("none", "shuffled"), strict=True):
            assert test["gain"] == pytest.approx(means["real"] - means[other], abs=1e-9)
            assert test["num_seeds"] == len(found["seeds"])
        helps = all(test["gain"] > 0 and test["p_value"] <= found["level"] for test in tests)
        assert claim["verdict"] != "helps" or helps  # adjusted over all claims it is no easier
        assert claim["verdict"] != "hurts" or (tests[0]["gain"] < 0 and tests[0]["p_value"] <= found["level"])
    for pair in found["pairs"]:
        assert pair["gain"]["low"] <= pair["gain"]["gain"] <= pair["gain"]["high"]
    for entry in (entry for entries in found["cards"].values() for entry in entries):
        assert ProtocolCard.model_validate(entry["card"]).hash == entry["hash"]
    assert path.with_suffix(".png").is_file()
    assert f"results/arms/{path.stem}.png" in (Path(__file__).parent / "README.md").read_text(encoding="utf-8")


def settings_of(kept: dict[str, Any]) -> Path:
    """The file of conf/experiment that the results are of."""
    for file in sorted((ROOT / "conf" / "experiment").glob("*.yaml")):
        config = load(ExperimentConfig, file)
        if (config.name, config.preset) == (kept["experiment"], kept["preset"]):
            return file
    raise AssertionError(f"no file of conf/experiment is of {kept['experiment']}, {kept['preset']}")


@pytest.mark.slow
@pytest.mark.timeout(7_200)
@pytest.mark.parametrize("path", KEPT, ids=lambda path: path.stem)
def test_one_row_comes_out_again(path: Path, tmp_path: Path) -> None:
    """Its first seed. Other processors and torch versions round otherwise, so the numbers are near, not equal: as near
    as two seeds are."""
    kept = json.loads(path.read_text(encoding="utf-8"))
    file = settings_of(kept)
    needs_data = isinstance(load(ExperimentConfig, file).etl.source, MovielensSource)  # type: ignore[union-attr]
    if needs_data and DATA is None:
        pytest.skip("GRAFTREC_DATA does not name a folder of MovieLens-1M")
    row = next(row for row in kept["rows"] if row["seeds"] and row["transfer"] == "none")
    seed = row["seeds"][0]["seed"]
    command = [
        sys.executable,
        "-m",
        "graftrec",
        "experiment",
        "--experiment",
        str(file),
        "--rows",
        f"[{row['id']}]",
        "--seeds",
        f"[{seed}]",
        *(["--data", str(DATA)] if needs_data else []),
    ]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MLFLOW_")}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (again,) = tmp_path.glob("runs/*/results.json")
    found = {row["id"]: row for row in json.loads(again.read_text())["rows"]}
    for protocol, convention in ((p, c) for p in kept["protocols"] for c in kept["conventions"]):
        old, new = (rows["metrics"][protocol][convention]["NDCG@10"]["seeds"][0] for rows in (row, found[row["id"]]))
        assert new == pytest.approx(old, rel=0.05), f"{protocol}, {convention}"
    for old in (row for row in kept["rows"] if row["kind"] == "baseline"):  # these count, so they are the same
        for protocol in kept["protocols"]:
            was, now = (rows["metrics"][protocol]["list"]["NDCG@10"]["mean"] for rows in (old, found[old["id"]]))
            assert now == pytest.approx(was, rel=1e-3)
