"""Shared by all tests: one Spark session."""

from collections.abc import Iterator

import pytest
from pyspark.sql import SparkSession

from etl.config import SparkConfig
from etl.session import spark_session


@pytest.fixture(scope="session")
def spark() -> Iterator[SparkSession]:
    # Tiny frames: the JVM's optimising compiler would cost more than it gains.
    settings = {"spark.driver.defaultJavaOptions": "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC"}
    config = SparkConfig(master="local[2]", shuffle_partitions=4, driver_memory="1g", settings=settings)
    session = spark_session(config, name="tests")
    yield session
    session.stop()
