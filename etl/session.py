"""The Spark session: checks Java, keeps the terminal quiet, and sets what every job relies on.

Relied on everywhere: session time zone UTC, Parquet timestamps in microseconds, Arrow between Spark and Python,
executors that run this very Python. A `master` of ``sc://…`` (Spark Connect, Sail) opens a client session instead of
a JVM.
"""

import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from pyspark import SparkConf, SparkContext
from pyspark.errors import PySparkException
from pyspark.java_gateway import launch_gateway
from pyspark.sql import SparkSession

from etl.config import GraftrecError, SparkConfig

MIN_JAVA = 17
_INSTALL = "on Debian or Ubuntu: apt-get install openjdk-17-jre-headless; on macOS: brew install openjdk@17"

# What the JVM, the launcher and log4j say at start-up whatever their levels; everything else passes.
_NOISE = re.compile(
    r"WARNING: Using incubator modules|WARNING: package \S+ not in \S+|Using Spark's default log4j profile|^\s*$"
    r"|Setting (default|Spark) log level|To adjust logging level|Unable to load native-hadoop|:: loading settings"
    r"|WARNING: An illegal reflective"
    r"|WARNING: sun.misc.Unsafe|WARNING: A terminally deprecated|WARNING: Please consider|WARNING: A restricted method"
    r"|WARNING: java.lang.System|WARNING: Use --enable-native-access|WARNING: Restricted methods"
)
_LOGGING = Path(__file__).with_name("log4j2.properties")


class JavaError(GraftrecError):
    """No Java, or one that is too old for Spark."""


def spark_session(config: SparkConfig, *, name: str = "graftrec") -> SparkSession:
    """The session for `config`: the active one if there is any (SQL settings are then brought up to date), else a new
    one.

    Raises JavaError where an embedded Spark would find no Java ≥ 17.
    """
    sql = _sql_settings(config)
    if "://" in config.master and config.master.startswith("sc"):
        session = SparkSession.builder.remote(config.master).appName(name).getOrCreate()
    else:
        session = SparkSession.getActiveSession() or _embedded(config, name)
    for key, value in sql.items():
        session.conf.set(key, value)
    return session


def java_version(java: str) -> int | None:
    """Major version of a `java` executable, e.g. 17; 8 for "1.8.0_392". None where it doesn't run."""
    try:
        done = subprocess.run([java, "-version"], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return parse_java_version(done.stderr + done.stdout) if done.returncode == 0 else None


def parse_java_version(text: str) -> int | None:
    """Major version in what ``java -version`` prints, None where there is none."""
    found = re.search(r'version "(\d+)(?:\.(\d+))?', text)
    if not found:
        return None
    major = int(found[1])
    return int(found[2] or 0) if major == 1 else major


def check_java() -> str:
    """The `java` Spark will start: $JAVA_HOME's, else the PATH's. Raises JavaError with what to install."""
    home = os.environ.get("JAVA_HOME")
    java = str(Path(home) / "bin" / "java") if home else shutil.which("java")
    where = f"JAVA_HOME={home}" if home else "the PATH"
    if java is None:
        raise JavaError(f"Spark needs Java {MIN_JAVA} or newer, found none on {where}; {_INSTALL}")
    version = java_version(java)
    if version is None:
        raise JavaError(f"Spark needs Java {MIN_JAVA} or newer, but {java} ({where}) does not run; {_INSTALL}")
    if version < MIN_JAVA:
        raise JavaError(f"Spark needs Java {MIN_JAVA} or newer, found Java {version} by {where} ({java}); {_INSTALL}")
    return java


@contextmanager
def user_errors() -> Iterator[None]:
    """Turn a GraftrecError that was raised inside an executor, which arrives wrapped by Spark, back into one."""
    try:
        yield
    except PySparkException as error:
        found = re.search(r"^\S*GraftrecError: (.+)$", str(error), re.MULTILINE)
        if found is None:
            raise
        raise GraftrecError(found[1]) from None


def _sql_settings(config: SparkConfig) -> dict[str, str]:
    fixed = {
        "spark.sql.session.timeZone": "UTC",
        "spark.sql.parquet.outputTimestampType": "TIMESTAMP_MICROS",
        "spark.sql.execution.arrow.pyspark.enabled": "true",
        "spark.sql.shuffle.partitions": str(config.shuffle_partitions),
    }
    return fixed | {k: v for k, v in config.settings.items() if k in fixed}


def _embedded(config: SparkConfig, name: str) -> SparkSession:
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    os.environ.setdefault("PYSPARK_DRIVER_PYTHON", sys.executable)
    if "PYSPARK_GATEWAY_PORT" not in os.environ:  # else spark-submit has started the JVM
        check_java()
    settings = {
        "spark.app.name": name,
        "spark.master": config.master,
        "spark.driver.memory": config.driver_memory,
        "spark.driver.extraJavaOptions": f"-Dlog4j2.configurationFile={_LOGGING.as_uri()}",
        "spark.ui.enabled": "false",
        "spark.ui.showConsoleProgress": "false",
        "spark.pyspark.python": os.environ["PYSPARK_PYTHON"],
        **_sql_settings(config),
    }
    if config.master.startswith("local"):
        settings["spark.driver.host"] = settings["spark.driver.bindAddress"] = "127.0.0.1"
    conf = SparkConf(loadDefaults=False).setAll(list((settings | config.settings).items()))
    return SparkSession(_context(conf))


def _context(conf: SparkConf) -> SparkContext:
    """A context whose JVM writes to a filter of start-up noise instead of straight to the terminal."""
    if SparkContext._active_spark_context is not None or "PYSPARK_GATEWAY_PORT" in os.environ:
        return SparkContext.getOrCreate(conf)
    reader, writer = os.pipe()
    threading.Thread(target=_filter, args=(os.fdopen(reader, errors="replace"),), daemon=True).start()
    try:
        gateway = launch_gateway(conf, popen_kwargs={"stderr": writer})
    finally:
        os.close(writer)
    return SparkContext(conf=conf, gateway=gateway)


def _filter(lines: IO[str]) -> None:
    for line in lines:
        if not _NOISE.search(line):
            print(line, end="", file=sys.__stderr__, flush=True)
