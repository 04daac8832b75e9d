"""Which source a configuration describes."""

from collections.abc import Callable

from pyspark.sql import SparkSession

from etl.config import EtlConfig, GeneratorSource, LogSource, MovielensSource
from etl.generator.synthetic_log import Generator
from etl.sources.log import FileLog
from etl.sources.movielens import movielens
from etl.sources.schema import Source


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
