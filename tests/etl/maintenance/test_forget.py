"""Forgetting users: out of every table and version, and they don't come back."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from etl.lake.readers import mark_reading, stop_reading
from etl.lake.snapshots import LakeError
from etl.lake.suppression import KEY_FILE, SUPPRESSED, hash_of, suppression
from etl.maintenance.forget import JOURNAL, Reading, forget
from tests.fixtures.daily_log import contents, environment, etl, events_of, rows_of, user, write_day, write_log
from tests.fixtures.mentions import mentions

pytest.importorskip("pysail")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A log and its lake after two days; the second has all users of the first ten."""
    folder = tmp_path_factory.mktemp("forget")
    write_log(folder)
    etl(folder)
    write_day(folder, 2, events_of(list(range(10)), 2))
    etl(folder)
    return folder


@pytest.fixture
def log(built: Path, tmp_path: Path) -> Path:
    """A copy."""
    shutil.copytree(built, tmp_path / "copy")
    for name in ("etl.yaml",):
        path = tmp_path / "copy" / name
        path.write_text(path.read_text().replace(str(built), str(tmp_path / "copy")))
    return tmp_path / "copy"


def test_nothing_of_a_user_is_left_and_the_next_run_has_nothing_to_do(log: Path) -> None:
    lake = log / "lake"
    before = contents(lake)
    assert len(mentions(lake, user(0))) > 8, "in tables, old versions and statistics of the logs"
    index = next(row["index"] for row in rows_of(lake, "users") if row["user"] == user(0))
    done = forget(str(lake), [user(0)])
    assert mentions(lake, user(0)) == []
    assert done.rows["interactions"] == sum(user(0) in row for row in before["interactions"])
    assert done.rows["users"] == 1
    assert done.rows["social"] == 4
    assert done.texts == 2
    assert (done.releases, done.release) == ([1, 2], 3)
    for name in ("sequences", "baskets", "negatives"):
        assert not [row for row in rows_of(lake, name) if row["user"] == index], name
        assert rows_of(lake, name)
    others = [row for row in before["interactions"] if user(0) not in row]
    assert contents(lake)["interactions"] == others
    said = etl(log).stdout
    assert said.count("unchanged, skipped") == 11, said
    assert "release 3 (unchanged)" in said


def test_degrees_are_those_of_a_log_without_the_user(log: Path) -> None:
    lake = log / "lake"
    forget(str(lake), [user(0), user(5)])
    events = rows_of(lake, "interactions")
    for row in rows_of(lake, "items"):
        assert row["degree"] == sum(event["item"] == row["item"] for event in events), row
    assert {event["user"] for event in events} == {row["user"] for row in rows_of(lake, "users")}


@pytest.mark.parametrize("anew", [False, True])
def test_a_forgotten_user_does_not_come_back(anew: bool, log: Path) -> None:
    """With a new day that has it, and where all files are read again since a setting changed."""
    lake = log / "lake"
    forget(str(lake), [user(0)])
    index = max(int(str(row["index"])) for row in rows_of(lake, "users"))
    unread = [f"{user(0)},item003,never", f'"{user(0)};item003;broken', f"{user(3)},item003,never"]
    rows = [*events_of([0, 1, 2], 3), f"person-9999-new,item003,{1_600_300_000}", *unread]
    write_day(log, 3, rows)
    said = etl(log, *(["--cleaning.min_time", "1990-01-01"] if anew else [])).stdout
    assert mentions(lake, user(0)) == [], said
    users = {row["user"]: int(str(row["index"])) for row in rows_of(lake, "users")}
    assert user(1) in users
    assert users["person-9999-new"] == index + 1
    third = {row["line"]: row["raw"] for row in rows_of(lake, "quarantine") if "day-03" in str(row["file"])}
    assert third == {16: None, 17: unread[2]}, "of a line that can't be parsed only where it is"


def test_the_tables_are_those_of_a_log_without_the_user(log: Path, tmp_path: Path) -> None:
    """But for indices and sampled negatives: of a rebuild of the raw files without the user's lines."""
    forget(str(log / "lake"), [user(0)])
    other = tmp_path / "other"
    other.mkdir()
    write_log(other)
    write_day(other, 2, events_of(list(range(10)), 2))
    for path in [*other.glob("days/*.csv"), other / "users.csv", other / "friends.csv"]:
        lines = path.read_text().splitlines()
        path.write_text("\n".join(line for line in lines if user(0) not in line) + "\n")
    etl(other)

    def named(lake: Path) -> list[object]:
        users = {row["index"]: row["user"] for row in rows_of(lake, "users")}
        items = {row["index"]: row["item"] for row in rows_of(lake, "items")}
        found = [
            (row["split"], row["domain"], users[row["user"]], *(items[one] for one in row["items"]), row["test_start"])
            for row in rows_of(lake, "sequences")
        ]
        degrees = sorted((row["item"], row["degree"], row["kept"]) for row in rows_of(lake, "items"))
        edges = sorted((row["user"], row["friend"]) for row in rows_of(lake, "social"))
        return [sorted(found), degrees, edges]

    assert named(log / "lake") == named(other / "lake")


_FORGETS = """
import os, sys
from etl.lake import commit, retention
import etl.maintenance.forget as forget
stop, calls = int(sys.argv[2]), 0
def counted(function):
    def call(*given, **named):
        global calls
        calls += 1
        if calls > stop:
            os.kill(os.getpid(), 9)
        return function(*given, **named)
    return call
for name in ("commit_files", "write_file", "remove_orphans", "drop_history", "mark_removed", "release_with"):
    setattr(forget, name, counted(getattr(forget, name)))
forget.forget(sys.argv[1], sys.argv[3:])
print(calls)
"""


def test_killed_at_any_step_the_same_command_finishes(built: Path, tmp_path: Path) -> None:
    def run(lake: Path, stop: int) -> "subprocess.CompletedProcess[str]":
        words = [sys.executable, "-c", _FORGETS, str(lake), str(stop), user(0), user(7)]
        return subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=120)

    whole = tmp_path / "whole"
    shutil.copytree(built / "lake", whole)
    done = run(whole, 10_000)
    assert done.returncode == 0, done.stderr
    steps, expected = int(done.stdout), contents(whole, "releases")
    assert steps > 40
    for stop in range(0, steps, 7):
        lake = tmp_path / f"killed-{stop}"
        shutil.copytree(built / "lake", lake)
        assert run(lake, stop).returncode == -signal.SIGKILL
        assert run(lake, stop + 3).returncode in (-signal.SIGKILL, 0)
        forgotten = forget(str(lake), [user(0), user(7)])
        assert contents(lake, "releases") == expected, stop
        assert mentions(lake, user(0)) == mentions(lake, user(7)) == [], stop
        assert forgotten.users
        assert not (lake / JOURNAL).exists()
        shutil.rmtree(lake)


def test_a_release_that_is_read_stays_until_its_reader_has_ended(log: Path) -> None:
    lake = str(log / "lake")
    program = (
        "import sys, time; from etl.lake.readers import mark_reading; mark_reading(sys.argv[1], 2);"
        "print('reads', flush=True); time.sleep(600)"
    )
    reader = subprocess.Popen(
        [sys.executable, "-c", program, lake], env=environment(), stdout=subprocess.PIPE, text=True
    )
    assert reader.stdout is not None
    assert reader.stdout.readline() == "reads\n"
    try:
        with pytest.raises(
            Reading, match=rf"release 2 by process {reader.pid} of .*; run the same command again"
        ) as refused:
            forget(lake, [user(0)])
        assert refused.value.exit_code == 5
        assert mentions(log / "lake" / "interactions", user(0)), "the old files stay"
        assert not [row for row in rows_of(log / "lake", "interactions") if row["user"] == user(0)]
    finally:
        reader.kill()
        reader.wait()
    forget(lake, [user(0)])
    assert mentions(log / "lake", user(0)) == []


def test_the_list_holds_keyed_hashes_and_another_key_is_refused(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lake = str(log / "lake")
    forget(lake, [user(0)])
    listed = json.loads((log / "lake" / SUPPRESSED).read_text())
    key = (log / "lake" / KEY_FILE).read_bytes()
    assert listed["users"] == [hash_of(key, user(0))]
    assert (log / "lake" / KEY_FILE).stat().st_mode & 0o077 == 0
    (log / "lake" / KEY_FILE).unlink()
    with pytest.raises(LakeError, match="expected the key that its 1 forgotten users were hashed by, found none"):
        suppression(lake)
    write_day(log, 3, events_of([0], 3))
    assert "found none; set $GRAFTREC_SUPPRESSION_KEY" in etl(log, code=2).stderr
    monkeypatch.setenv("GRAFTREC_SUPPRESSION_KEY", "another key than that one")
    with pytest.raises(LakeError, match="found another"):
        suppression(lake)
    monkeypatch.setenv("GRAFTREC_SUPPRESSION_KEY", key.decode())
    assert suppression(lake).holds(user(0))


def test_a_mark_ends_with_its_process_and_is_no_obstacle_then(tmp_path: Path) -> None:
    (tmp_path / "users" / "_delta_log").mkdir(parents=True)
    from etl.lake.readers import readers

    program = "import sys; from etl.lake.readers import mark_reading; mark_reading(sys.argv[1], 4); input()"
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], env=environment(), stdin=subprocess.PIPE, text=True
    )
    until = time.monotonic() + 20
    while not readers(str(tmp_path)) and time.monotonic() < until:
        time.sleep(0.05)
    assert list(readers(str(tmp_path))) == [4]
    process.kill()
    process.wait()
    assert readers(str(tmp_path)) == {}
    mark_reading(str(tmp_path), 5)
    mark_reading(str(tmp_path), 5)
    assert [len(who) for who in readers(str(tmp_path)).values()] == [1]
    stop_reading(str(tmp_path))
    assert readers(str(tmp_path)) == {}
