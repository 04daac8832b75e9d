"""Shared by the trainers' tests."""

import pytest

from trainer.parallel.cores import use_threads


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Tiny tensors: a second thread only waits, and on a shared machine it waits long."""
    use_threads(1)
