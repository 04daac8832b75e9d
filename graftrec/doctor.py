"""``graftrec doctor``: what this machine has, what it lacks, and which settings follow.

Exit codes: 0 where everything needed is there; 2 otherwise, with one line on stderr for each thing that isn't. It
changes nothing: no lake, store or folder is made.
"""

import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stderr
from importlib import metadata
from io import StringIO
from pathlib import Path

from etl.command import CommandParser, configurations, run_command, version
from etl.config import EtlConfig, SparkConfig, check_root
from etl.redaction import one_line, redact
from etl.settings import CONF_VARIABLE, GraftrecError, conf_roots, load
from graftrec import machine

GIB = 2**30
LEAST_MEMORY, LEAST_DISK = 2 * GIB, 1 * GIB  # a heap of spark.driver_memory (1g), and torch beside it
PACKAGES = ("torch", "mlflow", "pyspark", "pysail", "deltalake", "pyarrow", "numpy")  # whose versions matter most


class Examination:
    """Facts, printed as they are found, and faults, each with what to do."""

    def __init__(self) -> None:
        self.faults: list[str] = []

    def title(self, name: str) -> None:
        print(f"\n{name}", flush=True)

    def fact(self, name: str, *texts: str) -> None:
        for number, text in enumerate(texts):
            print(f"  {name if number == 0 else '':<13} {redact(text)}", flush=True)

    def fault(self, name: str, text: str) -> None:
        self.fact(name, f"FAULT: {text}")
        self.faults.append(text)

    def attempt(self, name: str, check: Callable[[], str]) -> bool:
        """Whether a check passes: its text is a fact, what it raises is a fault."""
        try:
            self.fact(name, check())
        except GraftrecError as error:
            self.fault(name, str(error))
        except Exception as error:  # a package that doesn't load, a file that can't be read
            self.fault(name, f"expected {name} to work, found: {type(error).__name__}: {one_line(error, 200)}; mend it")
        else:
            return True
        return False


def main(arguments: Sequence[str] | None = None, *, program: str = "graftrec doctor") -> int:
    parser = CommandParser(
        program,
        description=(
            "What this machine has, what it lacks, and which settings follow. Ends with 2, and a line for each fault, "
            f"where something needed is missing.\n\n{configurations('etl', 'pipeline')}"
        ),
    )
    parser.add_argument("--config", help="of etl or a pipeline: its engine, log and lake are checked")
    parser.add_argument("--lake", help="a folder or s3://bucket/folder; without it the configuration's, else lake")
    given = parser.parse_args(arguments)

    def work() -> int:
        etl = configured(given.config) if given.config else None
        return examine(etl, given.lake or (etl.lake if etl else "lake"))

    return run_command("doctor", work)


def configured(name: str) -> EtlConfig:
    """The settings of tables in a configuration of etl or of a pipeline. Raises ConfigError."""
    from trainer.recipes.pipeline_plan import PipelineConfig

    try:
        return load(EtlConfig, name)
    except GraftrecError:
        if name.startswith("etl/"):
            raise
        return load(PipelineConfig, name).etl


def examine(etl: EtlConfig | None, lake: str) -> int:
    """Print everything; gives the exit code."""
    found = Examination()
    print(f"graftrec {version()}, Python {platform.python_version()}, {platform.system()} {platform.machine()}")
    _machine(found)
    works = _packages(found)
    spark = etl.spark if etl else SparkConfig()
    engine = _engines(found, spark, works) if works["pyspark"] else "none"
    _places(found, etl, lake, works)
    if works["torch"]:
        _settings(found, spark, engine)
    for fault in found.faults:
        print(f"doctor: {redact(fault)}", file=sys.stderr, flush=True)
    return GraftrecError.exit_code if found.faults else 0


# --- the parts --------------------------------------------------------------------------------------------------------


def _machine(found: Examination) -> None:
    found.title("machine")
    usable, total = machine.cores()
    name, sets = machine.processor()
    found.fact("cores", f"{usable} usable of {total}, {name}")
    found.fact("instructions", ", ".join(sets) or "none of those that matter here is known to be there")
    found.attempt("memory", _memory)
    lines, trouble = machine.gpus()
    found.fact("GPU", *(lines or [trouble or "none"]))
    found.attempt("disk", _disk)


def _memory() -> str:
    memory = machine.memory()
    if memory.usable < LEAST_MEMORY:
        raise GraftrecError(
            f"memory: expected {LEAST_MEMORY / GIB:.0f} GiB, found {memory.usable / GIB:.1f} GiB; take a larger "
            "machine, or raise the container's limit"
        )
    limit = f" ({memory.total / GIB:.1f} GiB in the machine)" if memory.usable < memory.total else ""
    return f"{memory.usable / GIB:.1f} GiB{limit}, {memory.available / GIB:.1f} GiB free"


def _disk() -> str:
    here = Path.cwd()
    free = shutil.disk_usage(here).free
    if not os.access(here, os.W_OK):
        raise GraftrecError(f"{here}: expected a folder that can be written, found one that can't; change to another")
    if free < LEAST_DISK:
        raise GraftrecError(f"{here}: expected {LEAST_DISK / GIB:.0f} GiB of disk, found {free / GIB:.1f}; make room")
    return f"{free / GIB:.1f} GiB free in {here}"


def _packages(found: Examination) -> dict[str, bool]:
    """Which of PACKAGES load."""
    found.title("packages")
    for requirement, problem in unmet():
        found.fault(requirement.partition(" ")[0], problem)
    return {name: found.attempt(name, lambda name=name: _loaded(name)) for name in PACKAGES}  # type: ignore[misc]


def _loaded(name: str) -> str:
    module = __import__(name)
    return str(getattr(module, "__version__", "") or metadata.version(name))


def requirements() -> list[str]:
    """What graftrec needs, as pip spells it: of the installed package, else of this checkout."""
    try:
        return metadata.requires("graftrec") or []
    except metadata.PackageNotFoundError:
        import tomllib

        text = (Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8")
        return list(tomllib.loads(text)["project"]["dependencies"])


def unmet(required: Sequence[str] | None = None) -> Iterator[tuple[str, str]]:
    """Name and fault of each package that is missing, or of another version than graftrec needs."""
    from packaging.requirements import Requirement

    for text in requirements() if required is None else required:
        one = Requirement(text)
        if one.marker is not None and not one.marker.evaluate({"extra": ""}):
            continue
        wanted = f"{one.name}{one.specifier}"
        try:
            there = metadata.version(one.name)
        except metadata.PackageNotFoundError:
            yield one.name, f"{one.name}: expected the package {wanted}, found none; pip install '{wanted}'"
            continue
        if not one.specifier.contains(there, prereleases=True):
            yield one.name, f"{one.name}: expected {wanted}, found {there}; pip install '{wanted}'"


def _engines(found: Examination, spark: SparkConfig, works: dict[str, bool]) -> str:
    """The engine that would run."""
    from etl.session import check_java, choose_engine, java_version

    found.title("engines")
    try:
        java = check_java()
        found.fact("Java", f"{java_version(java)}, {java}")
        found.fact("spark", "yes, in this process or on a cluster that spark.master names")
    except GraftrecError as error:
        found.fact("Java", str(error))
        found.fact("spark", "no, for want of Java")
    connect = spark.master if spark.master.startswith("sc://") else os.environ.get("SPARK_REMOTE")
    found.fact("connect", connect or "no server is named: spark.master sc://host:port, or $SPARK_REMOTE")
    found.fact("sail", "yes, in this process, without Java" if works["pysail"] else "no, for want of pysail")
    with redirect_stderr(StringIO()):  # it says there that Java is missing, too
        engine = choose_engine(spark)
    if engine == "spark" and spark.engine == "spark" and spark.master.startswith("local"):
        found.attempt("chosen", lambda: f"spark, as spark.engine says, with {check_java()}")
    elif engine == "sail" and not works["pysail"]:
        found.fault("chosen", "spark.engine: expected Java 17 or the package pysail, found neither; install one")
    elif engine == "connect":
        found.attempt("chosen", lambda: f"connect; {_listening(str(connect))}")
    else:
        found.fact("chosen", f"{engine}, as spark.engine: {spark.engine} says")
    return engine


def _listening(url: str) -> str:
    """Raises GraftrecError unless a server takes connections."""
    import socket
    from urllib.parse import urlparse

    place = urlparse(url)
    try:
        socket.create_connection((place.hostname or "localhost", place.port or 15002), timeout=5).close()
    except OSError as error:
        raise GraftrecError(f"{url}: expected a Spark Connect server, found none ({error}); start it") from None
    return f"a server takes connections at {url}"


def _places(found: Examination, etl: EtlConfig | None, lake: str, works: dict[str, bool]) -> None:
    found.title("places")
    found.attempt("configurations", _configurations)
    if etl is not None:
        found.attempt("log", lambda: _log(etl))
    if works["deltalake"] and works["pyarrow"]:
        found.attempt("lake", lambda: _lake(lake))
    if works["mlflow"] and works["torch"]:  # runs hold what torch made
        found.attempt("MLflow", _store)


def _configurations() -> str:
    roots = conf_roots()
    if CONF_VARIABLE in os.environ and not roots[0].is_dir():
        raise GraftrecError(f"{CONF_VARIABLE}: expected a folder of YAML files, found none at {roots[0]}; mend it")
    return ", then ".join(f"{root}/" for root in roots)


def _log(etl: EtlConfig) -> str:
    check_root(etl.source)
    return str(getattr(etl.source, "root", "generated"))


def _lake(lake: str) -> str:
    from etl import tables
    from etl.lake.snapshots import current_version, local_path

    newest = current_version(lake, tables.RELEASES)
    local = local_path(lake)
    if local is not None:
        above = next(folder for folder in (local.absolute(), *local.absolute().parents) if folder.exists())
        if not os.access(above, os.W_OK):
            raise GraftrecError(f"{above}: expected a folder that can be written, found one that can't; set --lake")
    return f"{lake}: {'no tables yet' if newest is None else f'version {newest} of its releases'}"


def _store() -> str:
    from trainer import tracking
    from trainer.tracking.store import sqlite_file

    for name, value in (("MLFLOW_HTTP_REQUEST_TIMEOUT", "20"), ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")):
        os.environ.setdefault(name, value)
    tracking.quieten()
    uri = tracking.tracking_uri()
    file, folder = sqlite_file(uri), tracking.local_folder(uri)
    place = file or folder
    if place is not None and not place.exists():
        return f"{place.resolve()}: not there yet, the first run makes it"
    try:
        with tracking.translated("MLflow"):
            tracking.connect(uri).search_experiments(max_results=1)
    except tracking.TrackingError as error:
        advice = "mend or remove it" if place else f"start the server, or mend {tracking.URI_VARIABLE}"
        raise GraftrecError(f"expected an MLflow store at {uri}, found none that opens; {advice} ({error})") from None
    return f"{place.resolve()}: opens" if place else f"{uri}: answers"


def _settings(found: Examination, spark: SparkConfig, engine: str) -> None:
    from trainer.config import RuntimeConfig
    from trainer.parallel import distributed
    from trainer.parallel.cores import default_threads
    from trainer.recipes.pipeline import jobs_of

    found.title("settings that follow")
    world = distributed.join(RuntimeConfig())
    precision = "bf16" if world.autocast else "fp32"
    found.fact("device", f"runtime.device: auto is {world.device.type}")
    bf16 = [name for name in machine.processor()[1] if "BF16" in name]
    wider = f"; {' and '.join(bf16)} may make bf16 faster for models of width 128 and more" if bf16 else ""
    found.fact("precision", f"runtime.precision: auto is {precision}{'' if world.device.type == 'cuda' else wider}")
    found.fact("threads", f"runtime.threads: null is {default_threads()}")
    found.fact("trainings", f"jobs: null is {jobs_of(None, RuntimeConfig(threads=1), 1_000)} side by side")
    found.fact("engine", f"spark.engine: {spark.engine} is {engine}")
    third = max(1, machine.memory().usable // 3 // GIB)
    found.fact("memory", f"spark.driver_memory is {spark.driver_memory}; up to {third}g here for a large log")


if __name__ == "__main__":
    sys.exit(main())
