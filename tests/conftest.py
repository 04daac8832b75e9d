"""Shared by all tests: one Spark session, one tiny lake."""

import os
import signal
from collections.abc import Iterator

import pytest
from pyspark.sql import SparkSession

from etl.config import SparkConfig
from etl.session import spark_session

os.environ.setdefault("NUMBA_DISABLE_JIT", "1")  # ranx: to compile it takes longer than our small lists


def pytest_configure(config: pytest.Config) -> None:
    # A shell starts what runs in the background with SIGINT ignored, and processes hand that on to those that tests
    # start and interrupt.
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def spark() -> Iterator[SparkSession]:
    # Tiny frames: the JVM's optimising compiler would cost more than it gains.
    settings = {"spark.driver.defaultJavaOptions": "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC"}
    config = SparkConfig(master="local[2]", shuffle_partitions=4, driver_memory="1g", settings=settings)
    session = spark_session(config, name="tests")
    yield session
    session.stop()


@pytest.fixture(scope="session")
def tiny_lake(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A lake of 60 users and 40 items in two domains, read only; `build_tiny_lake` makes others."""
    from tests.fixtures.lakes import build_tiny_lake  # imports torch, which tests of ETL don't need

    return build_tiny_lake(tmp_path_factory.mktemp("tiny") / "lake")
