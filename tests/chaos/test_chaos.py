"""The chaos run itself: every invariant can fail, damage can be undone, and a round is drawn from seed and number."""

import json
import random
import shutil
import sqlite3
import sys
import threading
from collections.abc import Iterable
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import requests
import yaml
from deltalake import CommitProperties, DeltaTable, write_deltalake

from tests.chaos import damage, invariants
from tests.chaos.__main__ import KEPT, kept_plans
from tests.chaos.after import named
from tests.chaos.commands import NEIGHBOURS, Command, Ended, Running, write_start
from tests.chaos.contents import EMPTY, Contents, TrackedRun, read_contents, registry, relocate, tracked_runs
from tests.chaos.faults import FAULTS, RIVALS
from tests.chaos.plans import NEWER_SITUATIONS, SITUATIONS, draw_plan
from tests.chaos.server import proxied
from tests.chaos.watch import Changes


def numbers(violations: Iterable[str]) -> list[str]:
    """Of the invariants that were violated."""
    return [violation.partition(":")[0] for violation in violations]


def write_table(lake: Path, name: str, rows: list[dict[str, Any]], **recorded: str) -> None:
    properties = CommitProperties(custom_metadata={"app": f"job/{name}", **recorded})
    data = pa.Table.from_pylist(rows)
    write_deltalake(lake / name, data, mode="overwrite", schema_mode="overwrite", commit_properties=properties)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A lake of `users`, `items` made of it, and a release of both."""
    lake = tmp_path / "lake"
    write_table(lake, "users", [{"user": "a"}, {"user": "b"}])
    write_table(lake, "items", [{"item": "i"}], inputs=json.dumps({"users": 0}))
    tables = [{"table": name, "version": 0} for name in ("users", "items")]
    write_table(lake, "releases", [{"release": 1, "created": 5, "tables": tables, "config": "{}"}])
    for name, text in NEIGHBOURS.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


# --- 1, 2, 3: tables, releases, weights, registry ---------------------------------------------------------------------


def test_rows_of_no_undisturbed_run_are_found(folder: Path) -> None:
    known = [read_contents(folder)]
    assert not list(invariants.only_known_rows(read_contents(folder), known))
    assert not list(invariants.as_expected(read_contents(folder), known))
    write_table(folder / "lake", "users", [{"user": "a"}, {"user": "c"}])
    found = read_contents(folder)
    assert numbers(invariants.only_known_rows(found, known)) == ["1"]  # the release names the version before
    assert list(invariants.as_expected(found, known)) == ["1: not as undisturbed: tables: users"]


def test_order_of_rows_is_no_difference(folder: Path) -> None:
    before = read_contents(folder)
    write_table(folder / "lake", "users", [{"user": "b"}, {"user": "a"}])
    assert read_contents(folder) == before


def test_a_log_without_a_commit_is_no_table_yet(folder: Path) -> None:
    before = read_contents(folder)
    for name in ("domains", "negatives"):  # as a kill leaves it
        (folder / "lake" / name / "_delta_log").mkdir(parents=True)
    (folder / "lake" / "domains" / "_delta_log" / "00000000000000000000.json#1").write_text("{")
    assert read_contents(folder) == before


def test_release_of_two_runs_is_found() -> None:
    one, other = Contents(released={"users": "1", "items": "1"}), Contents(released={"users": "2", "items": "2"})
    mixed = Contents(released={"users": "1", "items": "2"})
    assert numbers(invariants.only_known_rows(mixed, [one, other])) == ["2"]
    assert not list(invariants.only_known_rows(Contents(tables={"users": EMPTY}), [Contents()]))  # begun, not written


def test_release_whose_tables_were_not_made_from_each_other_is_found(folder: Path) -> None:
    assert not list(invariants.releases_fit(folder / "lake"))
    write_table(folder / "lake", "items", [{"item": "i"}], inputs=json.dumps({"users": 3}))
    tables = [{"table": "users", "version": 0}, {"table": "items", "version": 1}]
    write_table(folder / "lake", "releases", [{"release": 1, "tables": tables}])
    assert numbers(invariants.releases_fit(folder / "lake")) == ["2"]


def test_other_weights_and_double_versions_are_found(folder: Path) -> None:
    (folder / "runs/deep/model").mkdir(parents=True)
    (folder / "runs/deep/model/weights.safetensors").write_bytes(b"1")
    before = read_contents(folder)
    (folder / "runs/deep/model/weights.safetensors").write_bytes(b"2")
    assert numbers(invariants.as_expected(read_contents(folder), [before])) == ["3"]
    assert numbers(invariants.only_known_rows(read_contents(folder), [before])) == ["3"]
    twice = Contents(registry={"chaos": {"versions": ["x", "x"], "champion": "y"}})
    assert numbers(invariants.one_version_a_hash(twice)) == ["3", "3"]


def test_model_of_a_trial_is_compared_by_its_score(folder: Path) -> None:
    """Between its end and its removal it is no violation; another score of it is."""
    best, other = (folder / f"runs/search/trials/pretrain-000{number}/model" for number in (0, 1))
    best.mkdir(parents=True)
    (best / "weights.safetensors").write_bytes(b"0")
    trials = folder / "runs/search/pretrain/trials.json"
    trials.parent.mkdir()
    trials.write_text(json.dumps([{"score": 0.2, "seconds": 1.0}, {"score": 0.1, "seconds": 1.0}]))
    known = [read_contents(folder)]
    other.mkdir(parents=True)
    (other / "weights.safetensors").write_bytes(b"1")
    assert not list(invariants.only_known_rows(read_contents(folder), known))
    assert numbers(invariants.as_expected(read_contents(folder), known)) == ["3"]
    (best / "weights.safetensors").write_bytes(b"2")
    assert numbers(invariants.only_known_rows(read_contents(folder), known)) == ["3"]
    (other / "weights.safetensors").unlink()
    (best / "weights.safetensors").write_bytes(b"0")
    trials.write_text(json.dumps([{"score": 0.2, "seconds": 2.0}, {"score": 0.1, "seconds": 3.0}]))
    assert not list(invariants.as_expected(read_contents(folder), known))
    trials.write_text(json.dumps([{"score": 0.2, "seconds": 2.0}, {"score": 0.3, "seconds": 3.0}]))
    assert numbers(invariants.as_expected(read_contents(folder), known)) == ["3"]


def test_log_whose_first_commit_was_killed_is_no_table(folder: Path) -> None:
    known = [read_contents(folder)]
    for name in ("knowledge", "releases"):
        shutil.rmtree(folder / "lake" / name, ignore_errors=True)
        (folder / "lake" / name / "_delta_log").mkdir(parents=True)
        (folder / "lake" / name / "_delta_log" / "00000000000000000000.json#1").write_text("{")
    found = read_contents(folder)
    assert set(found.tables) == {"users", "items"}
    assert not list(invariants.only_known_rows(found, [*known, Contents()]))
    assert not list(invariants.no_secrets([folder], ["s3cr+t"]))


def store(path: Path, *, status: str = "FINISHED", score: float = 0.5) -> Path:
    """The tables of MLflow's database that are read."""
    with sqlite3.connect(path) as database:
        database.executescript(
            f"""
            CREATE TABLE experiments (experiment_id INTEGER, name VARCHAR(9), artifact_location VARCHAR(99));
            INSERT INTO experiments VALUES (1, 'graftrec', 'file://{path.parent}/mlartifacts');
            CREATE TABLE runs (run_uuid TEXT, name TEXT, status TEXT, experiment_id INTEGER);
            INSERT INTO runs VALUES ('r1', 'deep', '{status}', 1);
            CREATE TABLE tags (run_uuid TEXT, key TEXT, value TEXT);
            INSERT INTO tags VALUES ('r1', 'graftrec.model_hash', 'x');
            CREATE TABLE latest_metrics (run_uuid TEXT, key TEXT, value FLOAT);
            INSERT INTO latest_metrics VALUES ('r1', 'best/NDCG_10', {score});
            CREATE TABLE model_versions (name TEXT, version INTEGER, current_stage TEXT);
            INSERT INTO model_versions VALUES ('chaos', 1, 'None');
            CREATE TABLE model_version_tags (name TEXT, version INTEGER, key TEXT, value TEXT);
            INSERT INTO model_version_tags VALUES ('chaos', 1, 'graftrec.hash', 'x');
            CREATE TABLE registered_model_aliases (name TEXT, version INTEGER, alias TEXT);
            INSERT INTO registered_model_aliases VALUES ('chaos', 1, 'champion');
            """
        )
    return path


def test_registry_is_read_and_a_copied_store_points_to_its_own_artifacts(tmp_path: Path) -> None:
    path = store(tmp_path / "mlflow.db")
    assert registry(path) == {"chaos": {"versions": ["x"], "champion": "x"}}
    assert registry(path, "cha") == {"os": {"versions": ["x"], "champion": "x"}}
    relocate(path, tmp_path, Path("/new"))
    assert sqlite3.connect(path).execute("SELECT artifact_location FROM experiments").fetchall() == [
        ("file:///new/mlartifacts",)
    ]


def test_store_that_is_no_database_is_found(tmp_path: Path) -> None:
    store(tmp_path / "mlflow.db")
    assert not list(invariants.store_opens(tmp_path))
    (tmp_path / "mlflow.db").write_bytes(b"no" * 5_000)
    assert numbers(invariants.store_opens(tmp_path)) == ["3"]


# --- 4: MLflow --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "score", "found"), [("FINISHED", 0.5, []), ("RUNNING", 0.5, ["4", "4"]), ("FINISHED", 0.4, ["4"])]
)
def test_run_without_end_or_result_is_found(tmp_path: Path, status: str, score: float, found: list[str]) -> None:
    (tmp_path / "runs/deep").mkdir(parents=True)
    done = {"hash": "x", "metrics": {"validation/NDCG@10": 0.5}}
    (tmp_path / "runs/deep/done.json").write_text(json.dumps(done))
    runs = tracked_runs(store(tmp_path / "mlflow.db", status=status, score=score))
    assert numbers(invariants.runs_finished(tmp_path, runs)) == found
    assert numbers(invariants.runs_finished(tmp_path, [TrackedRun("r2", "deep", "FINISHED", "y", {})])) == ["4"]


# --- 5: how a command ends --------------------------------------------------------------------------------------------

COMMAND = Command("etl", ("-m", "etl"))


@pytest.mark.parametrize(
    ("ended", "count"),
    [
        (Ended(COMMAND, 0, 1.0, "fine", ""), 0),
        (Ended(COMMAND, 2, 1.0, "", "etl: expected this, found that\n"), 0),
        (Ended(COMMAND, 5, 1.0, "", "tracking: MLflow does not answer\netl: run again\n"), 0),
        (Ended(COMMAND, -9, 1.0, "", "", killed=True), 0),
        (Ended(COMMAND, -9, 1.0, "", ""), 1),
        (Ended(COMMAND, 1, 1.0, "", ""), 1),
        (Ended(COMMAND, 2, 1.0, "", ""), 1),
        (Ended(COMMAND, 2, 1.0, "", "two\nlines\n"), 1),
        (Ended(COMMAND, 0, 1.0, "", "Traceback (most recent call last):\n  E\n"), 1),
        (Ended(COMMAND, 0, 1.0, "thread 'x' panicked at y", ""), 1),
        (Ended(COMMAND, -9, 9.0, "", "", hung=True), 1),
    ],
)
def test_end_of_a_command(ended: Ended, count: int) -> None:
    assert numbers(invariants.ended_well(ended, 5.0)) == ["5"] * count


def test_command_that_runs_too_long_is_ended_with_its_children(tmp_path: Path) -> None:
    script = f"import subprocess, time; subprocess.Popen([{sys.executable!r}, '-c', 'import time; time.sleep(99)'])"
    command = Command("sleeps", ("-c", f"{script}; print('on', flush=True); time.sleep(99)"))
    ended = Running(command, tmp_path, tmp_path / "logs").end(1.0)
    assert ended.hung
    assert numbers(invariants.ended_well(ended, 1.0)) == ["5"]


# --- 6, 7: what must not be there -------------------------------------------------------------------------------------


def test_secrets_are_found_wherever_they_are(folder: Path) -> None:
    secret = "s3cr+t/12345"
    assert not list(invariants.no_secrets([folder], [secret]))
    (folder / "message.txt").write_text("http://me:s3cr%2Bt%2F12345@host")
    (folder / "s3cr%2Bt%2F12345").touch()
    write_table(folder / "lake", "releases", [{"release": 1, "tables": [], "config": secret * 9}])
    assert "6: the table releases holds a secret" in list(invariants.no_secrets([folder], [secret]))
    assert len(list(invariants.no_secrets([folder], [secret]))) >= 3


def test_leftovers_of_more_than_the_interrupted_writes_are_found(folder: Path) -> None:
    assert not list(invariants.left_behind(folder, interrupted=0))
    for name in ("users", "items"):
        (folder / "lake" / name / "part-x.parquet").touch()
    assert not list(invariants.left_behind(folder, interrupted=2))
    assert numbers(invariants.left_behind(folder, interrupted=1)) == ["7"]
    (folder / "runs/done.json.new").touch()
    assert numbers(invariants.left_behind(folder, interrupted=2)) == ["7"]
    (folder / "notes/thesis.txt").write_text("changed")
    assert numbers(invariants.left_behind(folder, interrupted=2)) == ["7", "7"]


# --- faults -----------------------------------------------------------------------------------------------------------


def test_flipped_byte_is_undone_unless_the_file_is_another_now(folder: Path) -> None:
    before = read_contents(folder)
    found = damage.flip(folder, "table", random.Random(0))
    assert found is not None
    assert sum(a != b for a, b in zip(found.before, found.after, strict=True)) == 1
    found.undo()
    assert read_contents(folder) == before
    found = damage.cut_log(folder, random.Random(1))
    assert found is not None
    found.path.write_bytes(b"new")
    found.undo()
    assert found.path.read_bytes() == b"new"


def test_changes_are_counted_in_new_folders_too(tmp_path: Path) -> None:
    with Changes(tmp_path) as counted:
        (tmp_path / "new").mkdir()
        assert counted.reached(1, 5)
        for name in "abc":
            (tmp_path / "new" / name).write_text(name)
        assert counted.reached(7, 5)  # the folder; each file created and closed
        assert not counted.reached(99, 0.1)


class _Upstream(BaseHTTPRequestHandler):
    """Answers with what it was sent."""

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


def test_proxy_passes_on_then_fails_then_is_whole_again() -> None:
    upstream = ThreadingHTTPServer(("127.0.0.1", 0), _Upstream)
    threading.Thread(target=upstream.serve_forever, args=(0.05,), daemon=True).start()
    with proxied(upstream.server_address[1], "500", whole=2, delay_seconds=0) as proxy:
        put = partial(requests.put, proxy.uri, timeout=10)
        assert put(data=b"sent").content == b"sent"
        assert put(data=iter([b"in ", b"chunks"])).content == b"in chunks"
        assert put(data=b"sent").status_code == 500
        proxy.mode = "dead"
        with pytest.raises(requests.ConnectionError):
            put(data=b"sent")
        proxy.mode = "whole"
        assert put(data=b"sent").content == b"sent"
    upstream.shutdown()
    upstream.server_close()


# --- draws ------------------------------------------------------------------------------------------------------------


def test_rounds_are_drawn_from_seed_and_number() -> None:
    plans = [draw_plan(3, number) for number in range(300)]
    assert plans == [draw_plan(3, number) for number in range(300)]
    assert plans != [draw_plan(4, number) for number in range(300)]
    assert {plan.fault for plan in plans} == FAULTS.keys()
    assert {
        (plan.before, plan.command.partition("@")[0]) for plan in plans
    } == SITUATIONS.keys() | NEWER_SITUATIONS.keys()
    assert all(named(name) for plan in plans for name in (*plan.before, plan.command, *RIVALS.get(plan.command, ())))


def test_kept_rounds_are_still_the_ones_that_failed() -> None:
    kept = yaml.safe_load(KEPT.read_text())
    assert [one["plan"] for one in kept] == [str(plan) for plan in kept_plans()]


def test_start_is_the_same_each_time(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_start(tmp_path / name)
    files = [path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file()]
    assert len(files) > 10
    assert all((tmp_path / "a" / path).read_bytes() == (tmp_path / "b" / path).read_bytes() for path in files)
    assert not list((tmp_path / "a").rglob("_delta_log"))
    assert DeltaTable.is_deltatable(str(tmp_path / "a" / "lake")) is False
