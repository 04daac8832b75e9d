"""Raw logs as Spark frames: one file per raw format, one protocol (`Source`)."""

from collections.abc import Callable

from pyspark.sql import SparkSession

from etl.config import EtlConfig, GeneratorSource, LogSource, MovielensSource
from etl.sources.generator import Generator
from etl.sources.log import FileLog
from etl.sources.movielens import movielens
from etl.sources.schema import Source

__all__ = ["Source", "open_source"]


def open_source(config: EtlConfig, session: Callable[[], SparkSession] | None = None) -> Source:
    """The source that `config.source` describes. Raises GraftrecError where its files can't be found.

    `session` gives the session that tables are read by.
    """
    match config.source:
        case LogSource():
            return FileLog(config.source, config.cleaning, session=session)
        case MovielensSource():
            return movielens(config.source, config.cleaning)
        case GeneratorSource():
            return Generator(config.source)
