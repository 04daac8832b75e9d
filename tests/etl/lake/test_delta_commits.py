"""Exactly once: retries, duplicates, races and kills, by real processes that die where it hurts."""

import contextlib
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from deltalake import DeltaTable
from deltalake.exceptions import CommitFailedError, DeltaError

from etl.lake import commit as committing
from etl.lake.commit import CommitConflict, Written, landed
from etl.lake.snapshots import LakeError, active_files, current_version, existing_table, last_commit, transactions
from tests.fixtures.places import ROOT
from tests.fixtures.shows import SHOWS, commit, deliver, deliver_and_die, deliver_together, file_of, users_of

SPAWN = multiprocessing.get_context("spawn")  # neither deltalake nor Spark survives a fork


def run_together(target: Callable[..., None], arguments: list[tuple[Any, ...]]) -> None:
    """`target(barrier, *arguments)` in a process for each arguments; all end well."""
    barrier = SPAWN.Barrier(len(arguments))
    processes = [SPAWN.Process(target=target, args=(barrier, *each)) for each in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
    assert [process.exitcode for process in processes] == [0] * len(processes)


# --- again, and again with others -------------------------------------------------------------------------------------


def test_repeated_commit_is_a_no_op(tmp_path: Path) -> None:
    assert commit(tmp_path, [file_of(tmp_path, [1])], app="day", app_version=3) == Written(1, 1, True)
    deliver(tmp_path, 1)
    for version in (3, 2):
        again = commit(tmp_path, [file_of(tmp_path, [1])], app="day", app_version=version)
        assert not again.committed
    assert landed(str(tmp_path), SHOWS, "day", 3) == Written(1, 1, False)
    assert landed(str(tmp_path), SHOWS, "day", 4) is None
    assert commit(tmp_path, [file_of(tmp_path, [2])], app="day", app_version=4) == Written(3, 1, True)
    assert users_of(tmp_path) == sorted([1, 2, *range(10, 20)])


def test_metadata_and_transactions_are_recorded(tmp_path: Path) -> None:
    commit(tmp_path, [file_of(tmp_path, [1])], app="day", transactions={"file-a": 0, "file-b": 5})
    DeltaTable(tmp_path / "shows").optimize.compact()  # not a commit of ours
    found = last_commit(str(tmp_path), SHOWS)
    assert (found["job"], found["app"], found["rows"], found["version"]) == ("test", "day", "1", 1)
    assert transactions(str(tmp_path), SHOWS, ["file-a", "file-b", "file-c"]) == {"file-a": 0, "file-b": 5}
    assert last_commit(str(tmp_path), SHOWS, 0) == {}


def test_once_across_a_checkpoint(tmp_path: Path) -> None:
    deliver(tmp_path, 0)
    handle = DeltaTable(tmp_path / "shows")
    for _ in range(3):
        handle.alter.set_table_properties({"delta.checkpointInterval": "3"}, raise_if_not_exists=False)
        deliver(tmp_path, 1)
        deliver(tmp_path, 2)
        handle = DeltaTable(tmp_path / "shows")
    handle.create_checkpoint()
    assert not deliver(tmp_path, 0).committed
    assert users_of(tmp_path) == list(range(30))


def test_empty_writes(tmp_path: Path) -> None:
    assert commit(tmp_path, [], "overwrite", "empty").rows == 0
    assert users_of(tmp_path) == []
    deliver(tmp_path, 0)
    commit(tmp_path, [], "partitions", "nothing touched")
    assert users_of(tmp_path) == list(range(10))
    commit(tmp_path, [], "partitions", "scope", partition_scope={"domain": ["a"], "bucket": []})
    assert users_of(tmp_path) == list(range(10))
    commit(tmp_path, [], "partitions", "scope 2", partition_scope={"domain": ["a"]})
    assert users_of(tmp_path) == []
    assert not commit(tmp_path, [], "partitions", "nothing touched").committed


def test_partitions_replaced_are_those_touched(tmp_path: Path) -> None:
    cells = [(domain, bucket) for domain in ("a", "b", None) for bucket in (0, 1)]
    commit(tmp_path, [file_of(tmp_path, [number], *cell) for number, cell in enumerate(cells)])
    commit(tmp_path, [file_of(tmp_path, [10], "a", 1)], "partitions")
    assert users_of(tmp_path) == [0, 2, 3, 4, 5, 10]
    commit(tmp_path, [file_of(tmp_path, [11], None, 0), file_of(tmp_path, [12], None, 7)], "partitions")
    assert users_of(tmp_path) == [0, 2, 3, 5, 10, 11, 12]
    version = current_version(str(tmp_path), SHOWS)
    with pytest.raises(LakeError, match="would remove others"):
        commit(tmp_path, [file_of(tmp_path, [13], "a", 0), file_of(tmp_path, [14], "b", 1)], "partitions")
    with pytest.raises(LakeError, match="do it apart"):
        commit(tmp_path, [], "partitions", partition_scope={"domain": ["a", None]})
    assert current_version(str(tmp_path), SHOWS) == version
    commit(tmp_path, [file_of(tmp_path, [15], "b", 0)], "partitions", partition_scope={"bucket": [0, 7]})
    assert users_of(tmp_path) == [3, 5, 10, 15]


def test_properties_change_with_an_overwrite_only(tmp_path: Path) -> None:
    commit(tmp_path, [file_of(tmp_path, [1])], properties={"graftrec.time": "ordinal"})
    with pytest.raises(LakeError, match=r"graftrec\.time=ordinal"):
        commit(tmp_path, [file_of(tmp_path, [2])], properties={"graftrec.time": "timestamp"})
    commit(tmp_path, [file_of(tmp_path, [2])], "overwrite", properties={"graftrec.time": "timestamp"})
    configuration = existing_table(str(tmp_path), SHOWS).metadata().configuration
    assert configuration == {"graftrec.time": "timestamp"}
    assert users_of(tmp_path) == [2]


# --- races ------------------------------------------------------------------------------------------------------------


def test_racing_processes_with_the_same_delivery_land_it_once(tmp_path: Path) -> None:
    run_together(deliver_together, [(tmp_path, [7], seed) for seed in range(4)])
    assert users_of(tmp_path) == list(range(70, 80))
    assert current_version(str(tmp_path), SHOWS) == 1


def test_racing_processes_with_all_deliveries_land_each_once(tmp_path: Path) -> None:
    """They race for the making of the table, too."""
    run_together(deliver_together, [(tmp_path, list(range(8)), seed) for seed in range(3)])
    assert users_of(tmp_path) == list(range(80))
    assert current_version(str(tmp_path), SHOWS) == 8


def test_racing_processes_with_their_own_deliveries_all_land(tmp_path: Path) -> None:
    run_together(deliver_together, [(tmp_path, [n, n + 1, n + 2, n + 3], n) for n in (0, 4, 8)])
    assert users_of(tmp_path) == list(range(120))


def meanwhile(monkeypatch: pytest.MonkeyPatch, rival: Callable[[], Any]) -> None:
    """Let `rival` commit once between the moment a commit has looked at the table and the moment it writes."""
    looked: list[None] = []

    def look_then_rival(*arguments: Any) -> Any:
        found = active_files(*arguments)
        if not looked:
            looked.append(None)
            rival()
        return found

    monkeypatch.setattr(committing, "active_files", look_then_rival)


def test_replacement_takes_what_was_appended_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """deltalake would rebase it past the append, whose row would then survive in the replaced partition."""
    commit(tmp_path, [file_of(tmp_path, [1], "a"), file_of(tmp_path, [2], "b")])
    meanwhile(monkeypatch, lambda: commit(tmp_path, [file_of(tmp_path, [3], "a")]))
    commit(tmp_path, [file_of(tmp_path, [4], "a")], "partitions")
    assert users_of(tmp_path) == [2, 4]


def test_append_lands_after_a_replacement_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit(tmp_path, [file_of(tmp_path, [1], "a")])
    meanwhile(monkeypatch, lambda: commit(tmp_path, [file_of(tmp_path, [2], "b")], "overwrite"))
    commit(tmp_path, [file_of(tmp_path, [3], "a")])
    assert users_of(tmp_path) == [2, 3]


def test_twin_that_was_faster_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deliver(tmp_path, 0)
    meanwhile(monkeypatch, lambda: deliver(tmp_path, 1))
    assert deliver(tmp_path, 1) == Written(2, 10, False)
    assert users_of(tmp_path) == list(range(20))


def test_loser_gives_up_in_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deliver(tmp_path, 0)

    def always_lose(*_: Any, **__: Any) -> None:
        raise CommitFailedError("somebody was faster")

    monkeypatch.setattr(DeltaTable, "create_write_transaction", always_lose)
    monkeypatch.setattr(committing, "PATIENCE_SECONDS", 0.1)
    with pytest.raises(CommitConflict, match="run fewer writers"):
        deliver(tmp_path, 1)
    assert users_of(tmp_path) == list(range(10))


@pytest.mark.parametrize("error", [DeltaError("lost"), OSError("lost"), CommitFailedError("lost")])
def test_commit_that_raises_after_it_landed_is_no_failure(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The acknowledgement is lost: the file must stay, and the rows be there once."""
    deliver(tmp_path, 0)
    real = DeltaTable.create_write_transaction

    def land_and_raise(self: DeltaTable, *arguments: Any, **named: Any) -> None:
        real(self, *arguments, **named)
        raise error

    monkeypatch.setattr(DeltaTable, "create_write_transaction", land_and_raise)
    assert deliver(tmp_path, 1) == Written(2, 10, True)
    assert users_of(tmp_path) == list(range(20))


def test_commit_that_fails_leaves_table_and_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deliver(tmp_path, 0)
    file = file_of(tmp_path, [77])

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(DeltaTable, "create_write_transaction", fail)
        with pytest.raises(LakeError, match="No space left"):
            commit(tmp_path, [file], app="x")
    assert users_of(tmp_path) == list(range(10))
    commit(tmp_path, [file], app="x")  # the file is still there for a retry
    assert users_of(tmp_path) == [*range(10), 77]


def test_two_stale_compactions_conflict(tmp_path: Path) -> None:
    """Tripwire: deltalake 1.6.6 lets both land, and every row is there twice."""
    for number in range(3):
        deliver(tmp_path, number)
    first, second = DeltaTable(tmp_path / "shows"), DeltaTable(tmp_path / "shows")
    first.optimize.compact()
    with pytest.raises(CommitFailedError):
        second.optimize.compact()
    assert users_of(tmp_path) == list(range(30))


# --- kills ------------------------------------------------------------------------------------------------------------

DIE_AT: dict[str, tuple[str, bool]] = {
    "before the table is made": ("_create", True),
    "after the table is made": ("_create", False),
    "before the files are synced": ("_sync_data", True),
    "before the commit": ("_replacement", True),
    "after the commit": ("_sync_log", True),
    "at the end": ("_sync_log", False),
}


@pytest.mark.parametrize("moment", DIE_AT)
def test_killed_and_run_again_lands_once(moment: str, tmp_path: Path) -> None:
    barrier = SPAWN.Barrier(1)
    process = SPAWN.Process(target=deliver_and_die, args=(barrier, tmp_path, *DIE_AT[moment]))
    process.start()
    process.join(300)
    assert process.exitcode == -signal.SIGKILL
    was_committed = current_version(str(tmp_path), SHOWS) == 1
    assert was_committed == (moment in ("after the commit", "at the end"))
    assert deliver(tmp_path, 1).committed != was_committed
    assert users_of(tmp_path) == list(range(10, 20))
    deliver(tmp_path, 2)
    assert users_of(tmp_path) == list(range(10, 30))


@pytest.mark.slow
def test_killed_at_random_moments_lands_each_once(tmp_path: Path) -> None:
    dice = random.Random(0)
    kills = 0
    while kills < 12:
        barrier = SPAWN.Barrier(2)
        process = SPAWN.Process(target=deliver_together, args=(barrier, tmp_path, list(range(40)), kills))
        process.start()
        barrier.wait(300)
        time.sleep(dice.uniform(0, 0.5))
        process.kill()
        process.join(300)
        kills += 1
        if current_version(str(tmp_path), SHOWS):
            found = users_of(tmp_path)
            assert len(found) == len(set(found))
            assert len(found) == 10 * int(current_version(str(tmp_path), SHOWS) or 0)
    for number in range(40):
        deliver(tmp_path, number)
    assert users_of(tmp_path) == list(range(400))


FULL_DISK = """
import sys
from pathlib import Path
from tests.fixtures.shows import commit, deliver, file_of, users_of
from etl.lake.snapshots import LakeError
lake = Path(sys.argv[1])
deliver(lake, 0)
file = file_of(lake, [77])
filler = lake / ".filler"
with filler.open("wb", buffering=0) as sink:
    try:
        while True:
            sink.write(bytes(1024))
    except OSError:
        pass
try:
    commit(lake, [file], app="x")
except LakeError as error:
    assert "\\n" not in str(error), error
else:
    raise AssertionError("committed to a full disk")
assert users_of(lake) == list(range(10))
filler.unlink()
commit(lake, [file], app="x")
assert users_of(lake) == [*range(10), 77]
print("survived")
"""


LIMITED = """
import resource, signal, sys
import pyarrow as pa
from tests.fixtures.shows import SHOWS
from etl.lake.datafile import data_schema
from etl.lake.snapshots import table_filesystem
from etl.lake.spark_io import FileWriter
lake = sys.argv[1]
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))
rows = [{"user": n, "items": list(range(n, n + 50)), "title": f"title {n}", "score": 0.5} for n in range(70_000)]
writer = FileWriter(table_filesystem(lake, SHOWS), SHOWS, ("a", 0))
try:
    writer.add(pa.Table.from_pylist(rows, schema=data_schema(SHOWS)).to_batches()[0])
except OSError as error:
    print("one line:", error)
del writer
"""


def test_a_file_that_cannot_be_written_prints_nothing_of_its_own(tmp_path: Path) -> None:
    path = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
    (tmp_path / "shows").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stdout.startswith("one line:"), done.stderr
    assert done.stderr == ""


def test_full_disk_is_one_line_and_the_table_stays(tmp_path: Path) -> None:
    if shutil.which("unshare") is None:
        pytest.skip("needs Linux's unshare for a small disk")
    lake = tmp_path / "lake"
    lake.mkdir()
    mount = f"mount -t tmpfs -o size=400k tmpfs {lake} || exit 77; "
    path = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
    with contextlib.ExitStack() as stack:
        script = tmp_path / "full_disk.py"
        script.write_text(FULL_DISK)
        stack.callback(script.unlink)
        done = subprocess.run(
            ["unshare", "-rm", "sh", "-c", mount + f'exec "{sys.executable}" "{script}" "{lake}"'],
            env={**os.environ, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    if done.returncode in (1, 77) and ("unshare" in done.stderr or "mount" in done.stderr):
        pytest.skip(f"no small disk to be had: {done.stderr.strip()}")
    assert done.stdout.strip() == "survived", done.stderr


@pytest.mark.parametrize("ending", ["del sink", "sink.flush()", "sink.close()"])
def test_a_file_that_nobody_finished_prints_nothing(ending: str) -> None:
    """Arrow's stream writes what it holds when it is dropped, and prints a failure to stderr."""
    if not Path("/dev/full").exists():
        pytest.skip("needs Linux's /dev/full")
    script = f"""
import contextlib, pyarrow as pa
from etl.lake.file_reader import DigestSink
sink = DigestSink(pa.OSFile("/dev/full", "wb"))
sink.write(b"some")
with contextlib.suppress(OSError):
    {ending}
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
