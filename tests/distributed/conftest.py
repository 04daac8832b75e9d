"""Real processes under torchrun, on the tiny lake of the trainers' tests."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "trainer"))

from lakes import build_tiny_lake

from trainer.parallel.cores import use_threads


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    use_threads(1)


@pytest.fixture(scope="session")
def tiny_lake(tmp_path_factory) -> str:
    return build_tiny_lake(tmp_path_factory.mktemp("shared-out") / "lake")
