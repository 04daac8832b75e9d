"""What `graftrec doctor` finds: each thing that is needed and missing is one line and code 2."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from graftrec import machine
from graftrec.doctor import main, requirements, unmet
from tests.fixtures.object_store import BUCKET, seaweed, settings
from tests.fixtures.places import ROOT
from tests.fixtures.ports import free_port


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, and a store of its own."""
    for name in ("MLFLOW_TRACKING_URI", "GRAFTREC_CONF", "SPARK_REMOTE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_all_is_well_here_and_nothing_is_made(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    for line in (
        r"cores +\d+ usable of \d+, ",
        r"memory +[\d.]+ GiB.*, [\d.]+ GiB free",
        r"torch +2\.",
        r"sail +yes",
        r"lake +lake: no tables yet",
        rf"MLflow +{re.escape(str(place.resolve()))}/mlflow\.db: not there yet",
        r"threads +runtime\.threads: null is \d+",
        r"precision +runtime\.precision: auto is (fp32|bf16)",
        r"engine +spark\.engine: auto is (spark|sail)",
    ):
        assert re.search(rf"^  {line}", printed.out, re.MULTILINE), line
    assert list(place.iterdir()) == []


def test_a_lake_and_a_store_are_opened(place: Path, tiny_lake: str, capsys: pytest.CaptureFixture[str]) -> None:
    from trainer import tracking

    tracking.connect(f"sqlite:///{place}/mlflow.db")
    assert main(["--lake", tiny_lake]) == 0
    printed = capsys.readouterr().out
    assert re.search(rf"^  lake +{re.escape(tiny_lake)}: version \d+ of its releases$", printed, re.MULTILINE)
    assert re.search(r"^  MLflow +\S+/mlflow\.db: opens$", printed, re.MULTILINE)


def faults(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    assert main(arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert all(line.startswith("doctor: ") for line in lines)
    return [line.removeprefix("doctor: ") for line in lines]


def test_each_fault_is_one_line(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "file").write_text("x")
    (place / "mlflow.db").write_text("no database")
    monkeypatch.setenv("GRAFTREC_CONF", "nowhere")
    conf, lake, store = faults(capsys, "--lake", "file")
    assert conf == "GRAFTREC_CONF: expected a folder of YAML files, found none at nowhere; mend it"
    assert lake.startswith("file: expected a lake (a folder of Delta tables), found a file")
    assert re.match(r"expected an MLflow store at sqlite:\S+, found none that opens; mend or remove it", store)


def test_servers_that_do_not_answer_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    dead = f"127.0.0.1:{free_port()}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://{dead}")
    monkeypatch.setenv("SPARK_REMOTE", f"sc://{dead}")
    for name, value in settings(f"http://{dead}").items():
        monkeypatch.setenv(name, value)
    connect, lake, store = faults(capsys, "--lake", "s3://bucket/lake")
    assert connect.startswith(f"sc://{dead}: expected a Spark Connect server, found none")
    assert lake.startswith("s3://bucket/lake/releases: expected an object store that answers")
    assert store.startswith(
        f"expected an MLflow store at http://{dead}, found none that opens; start the server, or mend"
    )


def test_a_lake_of_an_object_store_is_reached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with seaweed(tmp_path / "store") as endpoint:
        for name, value in settings(endpoint).items():
            monkeypatch.setenv(name, value)
        assert main(["--lake", f"s3://{BUCKET}/lake"]) == 0
        assert f"s3://{BUCKET}/lake: no tables yet" in capsys.readouterr().out
        (lake,) = faults(capsys, "--lake", "s3://no-such-bucket/lake")
        assert "make the bucket" in lake


def test_what_a_configuration_needs_is_checked(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (log,) = faults(capsys, "--config", "etl/ml1m")
    assert log.startswith("source.root: expected the folder of the log, found none at ")
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setenv("PATH", str(place))
    assert main(["--config", "pipeline/demo"]) == 0
    assert "spark.engine: auto is sail" in capsys.readouterr().out
    (place / "etl.yaml").write_text("{base: etl/demo, spark: {engine: spark}}")
    (java,) = faults(capsys, "--config", "etl.yaml")
    assert java.startswith("Spark needs Java 17 or newer, found none on the PATH; ")


def test_packages_are_compared_with_what_is_needed() -> None:
    assert dict(unmet()) == {}
    assert any(one.startswith("torch") for one in requirements())
    wanted = [
        "nobodys-package>=1",
        "numpy>=99",
        "numpy>=1",
        'absent>=3; extra == "dev"',
        'absent; python_version < "3"',
    ]
    assert dict(unmet(wanted)) == {
        "nobodys-package": (
            "nobodys-package: expected the package nobodys-package>=1, found none; pip install 'nobodys-package>=1'"
        ),
        "numpy": f"numpy: expected numpy>=99, found {__import__('numpy').__version__}; pip install 'numpy>=99'",
    }


def test_a_package_that_does_not_load_is_a_fault_of_its_own(place: Path) -> None:
    script = "import sys; sys.modules['torch'] = None; from graftrec.doctor import main; sys.exit(main([]))"
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=place,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert re.fullmatch(r"doctor: expected torch to work, found: ModuleNotFoundError: .*\n", done.stderr)
    assert "engines" in done.stdout, "the rest is looked at all the same"


# --- the machine ------------------------------------------------------------------------------------------------------

XEON = "model name\t: Intel(R) Xeon(R)\nflags\t\t: fpu avx2 avx512f avx512_bf16 amx_bf16 amx_tile\n\nflags\t: fpu"
GRAVITON = "processor\t: 0\nFeatures\t: fp asimd sve bf16\n"


@pytest.mark.parametrize(
    ("text", "sets"),
    [
        (XEON, ("AVX2", "AVX-512", "AVX-512 BF16", "AMX BF16")),
        (GRAVITON, ("NEON", "SVE", "Arm BF16")),
        ("model name: old\nflags: fpu sse2\n", ()),
        ("", ()),
    ],
)
def test_instruction_sets_are_named(text: str, sets: tuple[str, ...]) -> None:
    assert machine.parse_cpuinfo(text)[1] == sets


def test_a_containers_memory_counts(tmp_path: Path) -> None:
    (tmp_path / "cgroup").write_text("0::/pod/one\n")
    group = tmp_path / "mount" / "pod"
    (group / "one").mkdir(parents=True)
    (group / "one" / "memory.max").write_text("max\n")
    assert machine.cgroup_memory(tmp_path / "cgroup", tmp_path / "mount") == (None, 0)
    (group / "memory.max").write_text("1000\n")
    (group / "memory.current").write_text("300\n")
    assert machine.cgroup_memory(tmp_path / "cgroup", tmp_path / "mount") == (1000, 300)
    (tmp_path / "cgroup").write_text("4:cpu:/\n3:memory:/pod\n")
    (tmp_path / "mount" / "memory" / "pod").mkdir(parents=True)
    (tmp_path / "mount" / "memory" / "pod" / "memory.limit_in_bytes").write_text("500\n")
    assert machine.cgroup_memory(tmp_path / "cgroup", tmp_path / "mount") == (500, 0)
    assert machine.cgroup_memory(tmp_path / "none", tmp_path) == (None, 0)
