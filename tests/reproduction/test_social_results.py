"""What friends are worth on HetRec 2011 Last.fm, from the log on.

GRAFTREC_DATA=<folder of MovieLens-1M> python -m pytest -m slow tests/reproduction/test_social_results.py: Last.fm is
read from the folder lastfm-2k beside it.
"""

import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from etl.settings import load
from tests.fixtures.places import ROOT
from trainer.config import FriendsConfig
from trainer.evaluation.significance import paired_t
from trainer.recipes import friends

LASTFM = Path(os.environ.get("GRAFTREC_DATA", "/nowhere")).resolve().parent / "lastfm-2k"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3_600),
    pytest.mark.skipif(not LASTFM.is_dir(), reason="GRAFTREC_DATA names no folder beside which lastfm-2k lies"),
]


@pytest.fixture(scope="module")
def lake(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("lastfm") / "lake"
    command = [sys.executable, "-m", "etl", "all", "--config", "etl/lastfm_social", "--lake", str(folder)]
    done = subprocess.run([*command, "--source.root", str(LASTFM)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return str(folder)


def test_friends_recommend_to_users_without_a_history(lake: str, tmp_path: Path) -> None:
    settings = ["--lake", lake, "--output", str(tmp_path), "--tracking.enabled", "false"]
    result = friends.run(load(FriendsConfig, "friends/lastfm", settings))
    rows = pq.read_table(result.folder / "users.parquet")
    assert len(rows) == len(set(rows["user"].to_pylist())) == 1_892
    ours, counted = (rows[f"{label}/NDCG@10"].to_numpy() for label in ("attention over friends", "friends' items"))
    gain = paired_t(ours, counted)
    assert counted.mean() == pytest.approx(0.451, abs=0.003)
    assert ours.mean() >= 0.48
    assert gain.gain > 0
    assert gain.p_value < 0.01
    assert result.metrics["attention_swapped/NDCG@10"] < counted.mean()
