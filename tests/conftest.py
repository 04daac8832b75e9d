"""Shared by all tests: one Spark session."""

from collections.abc import Iterator

import pytest
from pyspark.sql import SparkSession

from etl.config import SparkConfig
from etl.session import spark_session


@pytest.fixture(scope="session")
def spark() -> Iterator[SparkSession]:
    session = spark_session(SparkConfig(master="local[2]", shuffle_partitions=4, driver_memory="1g"), name="tests")
    yield session
    session.stop()
