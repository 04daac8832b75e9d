"""A night of a pipeline: new files, recommendations of users with new events, and training that goes on."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest
import torch
import yaml
from deltalake import DeltaTable
from safetensors.torch import load_file

from etl.tables import FIRST_INDEX
from tests.fixtures.daily_log import START, command, environment, etl, events_of, rows_of, user, write_day, write_log
from tests.fixtures.daily_run import TINY, make_champion, train_model
from trainer.inference.model_folder import load_model

pytest.importorskip("pysail")
NAME = "shop-music"
ROOT = Path(__file__).parents[2]


def write_pipeline(folder: Path) -> Path:
    config = {
        "name": "shop",
        "runs": str(folder / "runs"),
        "registered_model": "shop",
        "etl": yaml.safe_load((folder / "etl.yaml").read_text()),
        "pretrain": {**TINY, "data": {"domain": "books"}},
        "finetune": {**TINY, "data": {"domain": "music"}},
        "promote": {"gate": {"min_seeds": 1, "min_users": 10, "champion_margin": 0.9, "must_beat": []}},
        "recommend": {"k": 5},
        "source": "books",
        "targets": ["music"],
        "cold_users": False,
        "reads_all": False,  # whose split the first lake lacks
        "seeds": [0, 1],
        "tracking": {"system_metrics": False},
        "mode": "daily",
    }
    path = folder / "pipeline.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.fixture(scope="module")
def first_day(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A log, its lake, and a champion with recommendations."""
    folder = tmp_path_factory.mktemp("daily")
    write_log(folder)
    write_pipeline(folder)
    etl(folder)
    make_champion(folder, "first", register=NAME)
    recommend(folder)
    return folder


@pytest.fixture
def place(first_day: Path, tmp_path: Path) -> Path:
    """The same, in the same folder (models name their lake): what the test before it changed is undone."""
    kept = first_day.with_name("kept")
    if not kept.exists():
        shutil.copytree(first_day, kept)
    else:
        shutil.rmtree(first_day)
        shutil.copytree(kept, first_day)
    return first_day


def recommend(folder: Path, *more: str) -> str:
    words = ["--config", "recommend/default", "--registered_model", NAME, "--k", "5", "--spark.engine", "sail"]
    return command("trainer", "recommend", *words, *more, cwd=folder).stdout


def night(folder: Path, *more: str, code: int | None = 0) -> "subprocess.CompletedProcess[str]":
    words = [sys.executable, str(ROOT / "mlflow_projects" / "pipeline.py"), "--config", str(folder / "pipeline.yaml")]
    done = subprocess.run([*words, *more], cwd=folder, env=environment(), capture_output=True, text=True, timeout=1200)
    assert code in (None, done.returncode), f"{done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def without_release(rows: list[dict[str, object]]) -> list[tuple[object, ...]]:
    return sorted((row["user"], row["rank"], row["item"], round(float(str(row["score"])), 4)) for row in rows)


def files(folder: Path) -> dict[str, set[str]]:
    """Bucket -> files of the recommendations' newest version."""
    found: dict[str, set[str]] = {}
    actions = pa.table(DeltaTable(folder / "lake" / "recommendations").get_add_actions(flatten=True)).to_pydict()
    for path, bucket in zip(actions["path"], actions["partition.bucket"], strict=True):
        found.setdefault(str(bucket), set()).add(path)
    return found


def test_only_users_with_new_events_are_scored_again(place: Path, tmp_path: Path) -> None:
    from etl.tables import bucket_of

    before = {row["user"]: row for row in rows_of(place / "lake", "recommendations")}
    old_files = files(place)
    write_day(place, 2, [*events_of([7, 8], 2), f"person-new,item000,{START}", f"person-new,item002,{START}"])
    said = night(place, "--daily.retrain_days", "null").stdout
    rows = rows_of(place / "lake", "recommendations")
    changed = {user(7), user(8), "person-new"}
    assert {row["user"] for row in rows if row["release"] == 2} == changed, said
    assert {row["user"] for row in rows} == before.keys() | changed
    new_files = files(place)
    touched = {str(bucket_of(one, 4)) for one in changed}
    for bucket in old_files:
        assert (old_files[bucket] == new_files[bucket]) == (bucket not in touched), bucket
    assert "histories of 3 users" in said
    assert "training          not wanted" in said
    recommend(place, "--release", "2")  # the same release, all users: the rows must be those
    assert without_release(rows_of(place / "lake", "recommendations")) == without_release(rows)


def test_a_night_without_news_changes_nothing(place: Path) -> None:
    version = DeltaTable(place / "lake" / "recommendations").version()
    said = night(place, "--daily.retrain_days", "null").stdout
    assert "release 1 (unchanged)" in said
    assert "unchanged" in said.split("recommend: ")[1]
    assert DeltaTable(place / "lake" / "recommendations").version() == version


def test_another_champion_or_k_scores_everybody(place: Path) -> None:
    write_day(place, 2, events_of([7], 2))
    said = night(place, "--daily.retrain_days", "null", "--recommend.k", "4").stdout
    assert "histories of" not in said
    rows = rows_of(place / "lake", "recommendations")
    assert {row["release"] for row in rows} == {2}
    assert max(int(str(row["rank"])) for row in rows) == 4


def test_training_goes_on_from_the_champions_weights(place: Path) -> None:
    """With a user and an item that are new; the gate decides, and what it promotes recommends."""
    champion = load_model(place / "runs" / "first" / "model")
    items = (place / "items.csv").read_text() + "item900,New,music\n"
    (place / "items.csv").write_text(items)
    new = [f"{user(n)},item900,{START + 2 * 86_400 + n}" for n in range(12)]
    write_day(
        place, 2, [*new, *events_of([1, 2], 2), *[f"person-new,item{n:03d},{START + n}" for n in range(0, 20, 2)]]
    )
    for seed in (0, 1):
        train_model(place, f"music/none-{seed}", train={**TINY["train"], "epochs": 1, "min_epochs": 1, "seed": seed})
    words = ["--daily.retrain_days", "0", "--daily.epochs", "1", "--daily.learning_rate_factor", "0.001"]
    run = night(place, *words, code=None)
    assert run.returncode in (0, 3), run.stdout + run.stderr
    folder = place / "runs" / "music" / "continued-2-0" / "model"
    went_on = load_model(folder)
    assert went_on.release == 2
    assert went_on.parent == champion.hash
    assert "item900" in list(went_on.catalogue.raw_ids)
    assert "person-new" in went_on.users
    assert [
        name for name in went_on.users if went_on.users[name] != champion.users.get(name, went_on.users[name])
    ] == []
    own, theirs = load_file(folder / "weights.safetensors"), load_file(place / "runs/first/model/weights.safetensors")
    table = "item_embedding.weight"
    rows = {raw: row for row, raw in enumerate(went_on.catalogue.raw_ids)}
    for row, raw in enumerate(champion.catalogue.raw_ids):
        if row >= FIRST_INDEX:
            assert torch.allclose(own[table][rows[raw]], theirs[table][row], atol=1e-4), "it begins where that ended"
    decision = json.loads((place / "runs" / "music" / "promote-daily" / "decision.json").read_text())
    assert decision["release"] == 2
    names = {check["name"] for check in decision["checks"]}
    assert {"from-scratch", "champion"} <= names, names
    aliases = "gate             passed" if run.returncode == 0 else "gate             refused"
    assert aliases in run.stdout


def test_without_a_champion_it_says_what_to_run_first(tmp_path: Path) -> None:
    write_log(tmp_path)
    write_pipeline(tmp_path)
    said = night(tmp_path).stdout
    assert "none yet: run the pipeline without --mode daily first" in said
