"""Features that tell of tastes help cold items, and those of the noise twin don't; 40 twins: `make bench-planted`."""

from pathlib import Path

import pytest

from tests.fixtures.planted import SEEDS, found, planted

pytestmark = pytest.mark.slow


def test_planted_features_help_cold_items(tmp_path: Path) -> None:
    claim = found(planted(tmp_path, seed=0, strength=1.0, seeds=SEEDS))
    assert claim["verdict"] == "helps"
    assert claim["means"]["real"] > 1.5 * max(claim["means"]["none"], claim["means"]["shuffled"])
    assert {"predicted popularity", "content kNN", "ridge, features onto factors"} <= set(claim["baselines"])


@pytest.mark.parametrize("seed", [0, 1])
def test_the_noise_twins_features_do_not(tmp_path: Path, seed: int) -> None:
    claim = found(planted(tmp_path, seed=seed, strength=0.0, seeds=SEEDS))
    assert claim["verdict"] != "helps"
