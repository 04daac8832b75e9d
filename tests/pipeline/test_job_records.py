"""What a run of jobs says to machines: JSON records, MLflow metrics, OpenLineage events."""

import http.server
import importlib.util
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fixtures.daily_log import environment, etl, write_log
from tests.fixtures.stores import runs_of

pytest.importorskip("pysail")


def records(text: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in text.splitlines()]


def test_each_line_is_a_record_and_jobs_have_numbers(tmp_path: Path) -> None:
    write_log(tmp_path)
    done = etl(tmp_path, "--log", "json")
    found = records(done.stdout)
    assert {record["level"] for record in found} == {"info"}
    assert {record["command"] for record in found} == {"etl"}
    jobs = {record["job"]: record for record in found if "job" in record}
    assert next(iter(jobs)) == "interactions"
    assert jobs["interactions"]["rejected"] == 2
    lines = (tmp_path / "days" / "day-01.csv").read_text().splitlines()
    assert jobs["interactions"]["rows"] == len(lines) - 3
    assert float(str(jobs["interactions"]["seconds"])) > 0
    (release,) = [record for record in found if "release" in record]
    assert (release["release"], release["new"]) == (1, True)
    again = records(etl(tmp_path, GRAFTREC_LOG="json").stdout)
    assert all(record["unchanged"] for record in again if "job" in record)
    (tmp_path / "etl.yaml").unlink()
    failed = records(etl(tmp_path, "--log", "json", code=2).stderr)
    assert [record["level"] for record in failed] == ["error"]
    assert "etl.yaml" in str(failed[0]["message"])


def test_a_words_output_is_as_before_without_it(tmp_path: Path) -> None:
    write_log(tmp_path)
    said = etl(tmp_path).stdout
    assert said.splitlines()[0].startswith("[1/11] interactions")
    assert "release 1 (new) in" in said


def test_jobs_are_metrics_of_the_run(tmp_path: Path) -> None:
    write_log(tmp_path)
    script = "from trainer.recipes.run_etl import main; import sys; sys.exit(main(sys.argv[1:]))"
    words = [sys.executable, "-c", script, "all", "--config", str(tmp_path / "etl.yaml")]
    done = subprocess.run(words, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    metrics = runs_of(tmp_path)["etl"].data.metrics
    assert metrics["job/interactions/rejected"] == 2
    assert metrics["job/interactions/rows"] > 1_000
    assert metrics["job/sequences/seconds"] > 0


@pytest.fixture
def listener() -> Iterator[tuple[str, list[dict[str, object]]]]:
    """A server that takes OpenLineage events; its address and what it got."""
    got: list[dict[str, object]] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            got.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(201)
            self.end_headers()

        def log_message(self, *given: object) -> None:
            return

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", got
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.skipif(importlib.util.find_spec("openlineage") is None, reason="openlineage-python is not installed")
def test_a_lineage_server_gets_what_jobs_read_and_wrote(
    tmp_path: Path, listener: tuple[str, list[dict[str, object]]]
) -> None:
    write_log(tmp_path)
    url, got = listener
    etl(tmp_path, OPENLINEAGE_URL=url, PYTHONPATH=environment()["PYTHONPATH"] + ":" + ":".join(sys.path))
    by_job: dict[str, list[dict[str, object]]] = {}
    for event in got:
        by_job.setdefault(event["job"]["name"], []).append(event)  # type: ignore[index]
    assert len(by_job) == 11
    for name, events in by_job.items():
        assert [event["eventType"] for event in events] == ["START", "COMPLETE"], name
        assert events[0]["run"]["runId"] == events[1]["run"]["runId"]  # type: ignore[index]
    read, written = (by_job["etl.users"][1][kind] for kind in ("inputs", "outputs"))
    assert {one["name"] for one in read} == {
        str(tmp_path),
        *(f"{tmp_path}/lake/{n}" for n in ("interactions", "items")),
    }  # type: ignore[index]
    assert [one["name"] for one in written] == [f"{tmp_path}/lake/users"]  # type: ignore[index]
    assert written[0]["outputFacets"]["outputStatistics"]["rowCount"] == 60  # type: ignore[index]
    got.clear()
    etl(tmp_path, OPENLINEAGE_URL=url, PYTHONPATH=environment()["PYTHONPATH"] + ":" + ":".join(sys.path))
    assert got == [], "jobs that have nothing to do run nothing"


@pytest.mark.skipif(importlib.util.find_spec("openlineage") is None, reason="openlineage-python is not installed")
def test_a_dead_lineage_server_is_a_warning(tmp_path: Path) -> None:
    write_log(tmp_path)
    more = {"PYTHONPATH": environment()["PYTHONPATH"] + ":" + ":".join(sys.path)}
    done = etl(tmp_path, OPENLINEAGE_URL="http://127.0.0.1:9", **more)
    assert "release 1 (new)" in done.stdout
    assert done.stderr.count("OpenLineage did not take an event") >= 1


@pytest.mark.skipif(importlib.util.find_spec("openlineage") is not None, reason="openlineage-python is installed")
def test_events_that_nobody_can_send_are_refused_before_anything_runs(tmp_path: Path) -> None:
    write_log(tmp_path)
    done = etl(tmp_path, OPENLINEAGE_URL="http://127.0.0.1:9", code=2)
    assert "expected the package openlineage-python" in done.stderr
    assert not (tmp_path / "lake").exists()
