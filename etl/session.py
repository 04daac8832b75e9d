"""The Spark session on whichever engine: classic Spark, a Spark Connect server, or Sail, which needs no Java.

Relied on everywhere: session time zone UTC, Parquet timestamps in microseconds, Arrow between the engine and Python,
functions of ours that run in this very Python. Sail (Rust, DataFusion) runs inside this process and is spoken to as a
Spark Connect server. A process has one engine: pyspark can't hold a classic and a Connect session beside each other.
"""

import atexit
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Literal

from pyspark.errors import PySparkException
from pyspark.sql import DataFrame, SparkSession

from etl.config import SparkConfig
from etl.plain_path import plain_path
from etl.redaction import redact
from etl.settings import ConfigError, GraftrecError
from etl.stopping import is_stopped

if TYPE_CHECKING:
    from pyspark import SparkConf, SparkContext

EngineName = Literal["spark", "connect", "sail"]

MIN_JAVA = 17
SAIL_RETRIES = 3  # of a call, within a second
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

    Raises JavaError where an embedded Spark would find no Java ≥ 17, ConfigError where an engine's settings lack
    something.
    """
    session = SparkSession.getActiveSession()
    if session is None:
        match choose_engine(config):
            case "spark":
                session = _embedded(config, name)
            case "connect":
                session = _remote(_connect_url(config), name)
            case "sail":
                session = _sail(config, name)
    for key, value in _sql_settings(config).items():
        session.conf.set(key, value)
    return session


def choose_engine(config: SparkConfig) -> EngineName:
    """What `spark.engine: auto` means here: a Connect server where one is named, else Spark where it can run (a cluster
    is named, or there is Java), else Sail."""
    if config.engine != "auto":
        return config.engine
    if config.master.startswith("sc://") or "SPARK_REMOTE" in os.environ:
        return "connect"
    if not config.master.startswith("local") or "PYSPARK_GATEWAY_PORT" in os.environ:
        return "spark"
    try:
        check_java()
    except JavaError as error:
        print(f"{error}; going on with Sail", file=sys.stderr)
        return "sail"
    return "spark"


def engine_of(spark: SparkSession) -> EngineName:
    """Which engine a session runs on. The first time, one query to the server."""
    if type(spark).__module__ != "pyspark.sql.connect.session":
        return "spark"
    if spark.session_id not in _engines:
        row = spark.sql("select version()").first()  # Sail's own, or Spark's, as its clients have it
        assert row is not None
        _engines[spark.session_id] = "connect" if str(row[0]).startswith(spark.version) else "sail"
    return _engines[spark.session_id]


_engines: dict[str, EngineName] = {}  # session id -> engine


def held(frame: DataFrame) -> DataFrame:
    """The frame's rows, computed now and once, cut off from the plan that made them; for as long as the session lives.

    For what is read several times, or is dear. Spark keeps them in its block manager (memory, then disk), Sail in
    Parquet files of a temporary folder. `persist` wouldn't do: Sail ignores it.
    """
    return frame.localCheckpoint(eager=True)


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
    """Turn what a user can mend, and the engine has wrapped in an error of its own, into a GraftrecError: one that was
    raised inside an executor, and Sail's memory, which can't grow past its bound.
    """
    try:
        yield
    except PySparkException as error:
        if exhausted := re.search(r"(Failed to allocate additional .+)", str(error)):
            raise GraftrecError(
                f"Sail found no room within spark.driver_memory for a step that can't be spilled to disk "
                f"({exhausted[1]}); raise it"
            ) from None
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
        # What is persisted is read once or twice: packing it costs more.
        "spark.sql.inMemoryColumnarStorage.compressed": "false",
    }
    return fixed | {k: v for k, v in config.settings.items() if k in fixed}


def _connect_url(config: SparkConfig) -> str:
    url = config.master if config.master.startswith("sc://") else os.environ.get("SPARK_REMOTE")
    if url is None:
        raise ConfigError(
            f"spark.engine connect: expected spark.master sc://host:port, or $SPARK_REMOTE, found {config.master!r}; "
            f"name the server"
        )
    return url


def _remote(url: str, name: str) -> SparkSession:
    try:
        return SparkSession.builder.remote(url).appName(name).getOrCreate()
    except PySparkException as error:
        raise GraftrecError(f"no Spark Connect server answers at {url} ({_first_line(error)}); start it") from None


def _sail(config: SparkConfig, name: str) -> SparkSession:
    """A Sail server in this process, stopped when it ends, and a session on it.

    `driver_memory` bounds what its operators hold, shared out fairly so that sorts and aggregations spill (one side of
    a hash join can't; our own functions' memory isn't counted), `master: local[n]` sets its threads, and settings
    `sail.x.y` become its own x.y, as $SAIL_X__Y does.
    """
    from pyspark.sql.connect.client.retries import DefaultPolicy

    try:
        from pysail.spark import SparkConnectServer
    except ImportError:
        raise GraftrecError("spark.engine sail: expected the package pysail, found none; pip install pysail") from None
    made = tempfile.mkdtemp(prefix="graftrec-sail-", dir=config.settings.get("spark.local.dir"))
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    folder = plain_path(made)
    threads = re.fullmatch(r"local\[(\d+)\]", config.master)
    settings = {
        "execution.default_parallelism": threads[1] if threads else "1" if config.master == "local" else "0",
        "execution.checkpoint.path": Path(folder).as_uri(),
        "runtime.memory_pool.type": "fair",
        "runtime.memory_pool.fair.max_size": str(num_bytes(config.driver_memory)),
        "runtime.temporary_files.paths": f'["{folder}"]',
    }
    settings |= {key.removeprefix("sail."): value for key, value in config.settings.items() if key.startswith("sail.")}
    for key, value in settings.items():
        os.environ.setdefault(f"SAIL_{key.replace('.', '__').upper()}", value)
    os.environ.setdefault("RUST_LOG", "error")
    # Sail sorts the rows of a window without partitions in parallel, and merges.
    warnings.filterwarnings("ignore", message=".*No Partition Defined for Window")
    server = SparkConnectServer("127.0.0.1", 0)
    server.start(background=True)
    atexit.register(server.stop)
    assert server.listening_address is not None
    host, port = server.listening_address
    session = _remote(f"sc://{host}:{port}", name)
    # The server ends with this process, or has ended by the signal that ends it: no call may wait long for it.
    session.release_session_on_close = False
    session.client.set_retry_policies([DefaultPolicy(max_retries=SAIL_RETRIES)])
    atexit.register(session.stop)
    _engines[session.session_id] = "sail"
    return session


def num_bytes(text: str) -> int:
    """Bytes of a size as Spark spells them, e.g. 512m or 1g. Raises ConfigError."""
    found = re.fullmatch(r"(\d+)([kmgt]?)b?", text.strip().lower())
    if found is None:
        raise ConfigError(f"spark.driver_memory: expected a size such as 512m or 4g, found {text!r}; mend it")
    return int(found[1]) << {"": 0, "k": 10, "m": 20, "g": 30, "t": 40}[found[2]]


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _embedded(config: SparkConfig, name: str) -> SparkSession:
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    os.environ.setdefault("PYSPARK_DRIVER_PYTHON", sys.executable)
    if os.environ.get("LC_ALL") in ("C", "POSIX"):  # in which Java opens no file with a name beyond ASCII
        os.environ["LC_ALL"] = "C.UTF-8"
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
    given = {key: value for key, value in config.settings.items() if key.startswith("spark.")}
    if config.master.startswith("local"):
        settings["spark.driver.host"] = settings["spark.driver.bindAddress"] = "127.0.0.1"
    from pyspark import SparkConf

    conf = SparkConf(loadDefaults=False).setAll(list((settings | given).items()))
    return SparkSession(_context(conf))


def _context(conf: "SparkConf") -> "SparkContext":
    """A context whose JVM writes to a filter of start-up noise instead of straight to the terminal."""
    from pyspark import SparkContext
    from pyspark.java_gateway import launch_gateway

    if SparkContext._active_spark_context is not None or "PYSPARK_GATEWAY_PORT" in os.environ:
        return SparkContext.getOrCreate(conf)
    reader, writer = os.pipe()
    threading.Thread(target=_filter, args=(os.fdopen(reader, errors="replace"),), daemon=True).start()
    interrupt = signal.getsignal(signal.SIGINT)
    try:
        gateway = launch_gateway(conf, popen_kwargs={"stderr": writer})
    finally:
        os.close(writer)
    context = SparkContext(conf=conf, gateway=gateway)
    if threading.current_thread() is threading.main_thread() and interrupt is not None:
        signal.signal(signal.SIGINT, interrupt)  # pyspark's own calls the JVM, maybe amid another call
    return context


def _filter(lines: IO[str]) -> None:
    for line in lines:
        if not _NOISE.search(line) and not is_stopped():
            print(redact(line), end="", file=sys.__stderr__, flush=True)
