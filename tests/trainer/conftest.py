"""Shared by the trainers' tests: a tiny lake, made once."""

import pytest
from lakes import build_tiny_lake

from trainer.parallel.cores import use_threads


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Tiny tensors: a second thread only waits, and on a shared machine it waits long."""
    use_threads(1)


@pytest.fixture(scope="session")
def tiny_lake(tmp_path_factory) -> str:
    """A lake of 60 users and 40 items in two domains, read only (see lakes.py); `build_tiny_lake` makes others."""
    return build_tiny_lake(tmp_path_factory.mktemp("tiny") / "lake")
