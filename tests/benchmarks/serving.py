"""`serve` beside `mlflow models serve`: the demo's champion, 8 connections that each wait for their answer.

Both servers run alone on the same two cores, which the client shares with them, in alternating rounds: 500 requests of
warm-up, then 5,000. Histories are of the demo's users. The demo runs first where <work>/serving has none.
"""

import http.client
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import polars as pl

from tests.benchmarks.__main__ import Options
from tests.benchmarks.harness import ROOT, Report
from tests.fixtures.ports import free_port

ROUNDS = 3
CONNECTIONS, WARM_UP, REQUESTS = 8, 500, 5_000
CORES = 2
MODEL = "graftrec-target"
OURS, MLFLOW = "serve", "mlflow models serve"
START_SECONDS = 300
AIM_RATE, AIM_P99_MS = 400, 60


def measure(report: Report, options: Options) -> None:
    folder = options.work / "serving"
    if not (folder / "done").exists():
        _demo(folder)
    bodies = _bodies(folder)
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[:CORES])  # servers inherit it
    rounds: dict[str, list[tuple[float, list[float]]]] = {OURS: [], MLFLOW: []}
    lists: dict[str, list[list[str]]] = {}
    try:
        for number in range(ROUNDS):
            for name in (OURS, MLFLOW) if number % 2 == 0 else (MLFLOW, OURS):
                with _server(name, folder) as port:
                    _load(port, bodies, WARM_UP)
                    rounds[name].append(_load(port, bodies, REQUESTS))
                    lists[name] = [_answer(port, body) for body in bodies[:100]]
    finally:
        os.sched_setaffinity(0, before)
    found = {name: [_numbers(*one) for one in of_one] for name, of_one in rounds.items()}
    middle = {
        name: [statistics.median(column) for column in zip(*of_one, strict=True)] for name, of_one in found.items()
    }
    report.table(
        f"{REQUESTS:,} requests by {CONNECTIONS} connections, {CORES} cores with the client; median of {ROUNDS} rounds",
        ["server", "requests/s", "p50 ms", "p99 ms", "requests/s of each round"],
        [[name, *middle[name], ", ".join(f"{one[0]:.0f}" for one in found[name])] for name in (OURS, MLFLOW)],
    )
    same = sum(one == other for one, other in zip(lists[OURS], lists[MLFLOW], strict=True))
    report.bar("serving: lists that are MLflow's, of 100", same, at_least=100)
    report.bar("serving: rate over MLflow's one worker", middle[OURS][0] / middle[MLFLOW][0], at_least=2.2)
    report.bar("serving: p99 over MLflow's", middle[OURS][2] / middle[MLFLOW][2], at_most=0.3)
    report.say(
        f"aim: {AIM_RATE} requests/s, p99 {AIM_P99_MS} ms; found {middle[OURS][0]:.0f} and {middle[OURS][2]:.0f}"
    )


def _demo(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(ROOT / "mlflow_projects" / "pipeline.py"), "--config", "pipeline/demo"]
    subprocess.run(command, cwd=folder, env=_environment(folder), check=True)
    (folder / "done").touch()


def _environment(folder: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    path = f"{Path(sys.executable).parent}:{kept['PATH']}"
    own = {"PYTHONPATH": f"{ROOT}:{kept.get('PYTHONPATH', '')}", "GRAFTREC_CONF": str(ROOT / "conf"), "PATH": path}
    return kept | own | {"MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db"}


def _bodies(folder: Path) -> list[bytes]:
    """Histories of the demo's users in the target domain, each without its last items."""
    lake = folder / "lake"
    raw = dict(pl.read_delta(str(lake / "items")).select("index", "item").iter_rows())
    rows = pl.read_delta(str(lake / "sequences")).filter((pl.col("domain") == "target") & (pl.col("split") == "last-5"))
    bodies = []
    for items, end in rows.sort("user").select("items", "test_start").iter_rows():
        history = [raw[item] for item in items[:end]]
        bodies.append(json.dumps({"dataframe_records": [{"items": history}], "params": {"k": 10}}).encode())
    random.Random(0).shuffle(bodies)
    return bodies


@contextmanager
def _server(name: str, folder: Path) -> Iterator[int]:
    """A server of the champion; yields its port."""
    port = free_port()
    command = {
        OURS: ["trainer", "serve", "--config", "serve/default", "--registered_model", MODEL, "--port", str(port)],
        MLFLOW: ["mlflow", *f"models serve -m models:/{MODEL}@champion --env-manager local --port {port}".split()],
    }[name]
    environment = _environment(folder)
    if name == MLFLOW:  # it runs the code that the version carries
        environment["PYTHONPATH"] = os.environ.get("PYTHONPATH", "").replace(str(ROOT), "")
    with (folder / "server.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", *command],
            cwd=folder,
            env=environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + START_SECONDS
        while not _is_up(port):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{name} did not start: {(folder / 'server.log').read_text()[-2_000:]}")
            time.sleep(0.2)
        yield port
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()


def _is_up(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
    try:
        for path in ("/ready", "/ping"):
            connection.request("GET", path)
            answer = connection.getresponse()
            answer.read()
            if answer.status == 200:
                return True
    except OSError:
        pass
    finally:
        connection.close()
    return False


def _load(port: int, bodies: Sequence[bytes], count: int) -> tuple[float, list[float]]:
    """(seconds of all, milliseconds of each) of `count` requests over CONNECTIONS connections."""
    numbers = iter(range(count))
    taking, took = threading.Lock(), [0.0] * count
    failed: list[str] = []

    def ask() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        while not failed:
            with taking:
                number = next(numbers, None)
            if number is None:
                return
            begun = time.perf_counter()
            connection.request(
                "POST", "/invocations", bodies[number % len(bodies)], {"Content-Type": "application/json"}
            )
            answer = connection.getresponse()
            body = answer.read()
            took[number] = (time.perf_counter() - begun) * 1_000
            if answer.status != 200:
                failed.append(f"{answer.status}: {body[:500]!r}")

    begun = time.perf_counter()
    threads = [threading.Thread(target=ask) for _ in range(CONNECTIONS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise RuntimeError(f"a request failed: {failed[0]}")
    return time.perf_counter() - begun, took


def _numbers(seconds: float, took: Sequence[float]) -> tuple[float, float, float]:
    """Requests a second, and percentiles 50 and 99 in milliseconds."""
    in_order = sorted(took)
    return len(took) / seconds, in_order[len(took) // 2], in_order[int(len(took) * 0.99)]


def _answer(port: int, body: bytes) -> list[str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("POST", "/invocations", body, {"Content-Type": "application/json"})
    found: list[str] = json.loads(connection.getresponse().read())["predictions"][0]["items"]
    connection.close()
    return found
