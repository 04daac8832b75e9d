"""Real processes under torchrun, on the tiny lake."""

import pytest

from trainer.parallel.cores import use_threads


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    use_threads(1)
