"""One writer per lake: what holds others off, what is taken over, and what a lost lease forbids."""

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from obstore.store import from_url

from etl.lake import lease
from etl.lake.commit import Commit, commit_files
from etl.lake.lease import DEAD_SECONDS, LEASE, LakeBusy, LeaseLost, check_lease, writing
from etl.lake.retention import remove_orphans
from etl.lake.snapshots import LakeError, current_version
from tests.fixtures.object_store import BUCKET, proxy, seaweed, settings, variables
from tests.fixtures.shows import SHOWS, commit, deliver, file_of, users_of
from tests.fixtures.writers import holder


def wait_for(lake: str, seconds: float) -> None:
    with writing(lake, SHOWS, wait_seconds=seconds):
        check_lease(lake)


def say(process: subprocess.Popen[str]) -> str:
    """Let a holder commit; what it says."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("\n")
    process.stdin.flush()
    return process.stdout.readline()


# --- on a disk --------------------------------------------------------------------------------------------------------


def test_a_second_writer_ends_with_run_again_and_writes_nothing(tmp_path: Path) -> None:
    deliver(tmp_path, 0)
    with holder(str(tmp_path)) as process:
        with pytest.raises(LakeBusy, match=f"found process {process.pid} of .* still writing after 0.2 s; run") as told:
            wait_for(str(tmp_path), 0.2)
        assert told.value.exit_code == 5
        assert say(process) == "committed\n"
        assert process.wait(60) == 0
        wait_for(str(tmp_path), 0)


def test_every_commit_waits_for_the_writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one whose caller has not asked for the lease."""
    deliver(tmp_path, 0)
    monkeypatch.setitem(lease.writing.__wrapped__.__kwdefaults__, "wait_seconds", 0.2)  # type: ignore[attr-defined]
    with holder(str(tmp_path)):
        with pytest.raises(LakeBusy):
            deliver(tmp_path, 1)
        with pytest.raises(LakeBusy):
            remove_orphans(str(tmp_path), SHOWS, older_than_seconds=0, keep_versions=[])
    assert users_of(tmp_path) == list(range(10))


@pytest.mark.parametrize("children", [0, 1])
def test_a_killed_writer_is_followed_at_once(children: int, tmp_path: Path) -> None:
    """Even where a forked child of it, which has its files open, lives on."""
    with holder(str(tmp_path), children=children) as process:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        wait_for(str(tmp_path), 30)


def test_a_writer_may_enter_again_by_any_spelling(tmp_path: Path) -> None:
    (tmp_path / "other").symlink_to(tmp_path / "lake")
    with writing(str(tmp_path / "lake"), SHOWS), writing(str(tmp_path / "other"), SHOWS, wait_seconds=0):
        with writing((tmp_path / "lake").as_uri(), SHOWS, wait_seconds=0):
            deliver(tmp_path / "lake", 0)
        check_lease(str(tmp_path / "other"))
    with pytest.raises(LeaseLost):
        check_lease(str(tmp_path / "lake"))


def test_what_is_no_lake_gets_no_lease(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(LakeError, match=r"found thesis\.tex"):
        wait_for(str(tmp_path), 0)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_lake_made_anew_meanwhile_is_not_written_to(tmp_path: Path) -> None:
    lake = tmp_path / "lake"
    with holder(str(lake)) as process:
        shutil.rmtree(lake)
        deliver(lake, 3)
        assert say(process).startswith("refused 5")
    assert users_of(lake) == list(range(30, 40))


def test_a_file_of_a_refused_commit_stays_for_the_next_try(tmp_path: Path) -> None:
    deliver(tmp_path, 0)
    file = file_of(tmp_path, [77])
    with writing(str(tmp_path), SHOWS):
        (tmp_path / LEASE).unlink()
        with pytest.raises(LeaseLost, match="run again"):
            commit(tmp_path, [file], app="x")
    assert users_of(tmp_path) == list(range(10))
    commit(tmp_path, [file], app="x")
    assert users_of(tmp_path) == [*range(10), 77]


# --- on an object store -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with seaweed(tmp_path_factory.mktemp("store") / "data") as endpoint, variables(settings(endpoint)):
        yield endpoint


@pytest.fixture
def lake(store: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A URI of the test's own. A lease is dead sooner than by default."""
    monkeypatch.setattr(lease, "DEAD_SECONDS", 2.0)
    monkeypatch.setattr(lease._StoreLease, "poll_seconds", 0.05)
    name = "".join(letter if letter.isalnum() else "-" for letter in request.node.name)
    return f"s3://{BUCKET}/{name}"


def test_a_store_has_one_writer(lake: str) -> None:
    for app in ("a", "b"):
        commit_files(lake, SHOWS, [], Commit(mode="append", app=app, app_version=0, metadata={}))
    with holder(lake) as process:
        with pytest.raises(LakeBusy, match=f"process {process.pid}"):
            wait_for(lake, 4)  # twice as long as a dead one keeps it
        assert say(process) == "committed\n"
        assert process.wait(60) == 0
        wait_for(lake, 0)
    assert current_version(lake, SHOWS) == 3


def test_a_killed_writer_of_a_store_is_followed(lake: str) -> None:
    with holder(lake) as process:
        os.kill(process.pid, signal.SIGKILL)
        wait_for(lake, 0)  # whoever has not seen the holder renew its lease waits until it is dead
    assert DEAD_SECONDS < 60


def test_a_writer_that_slept_is_refused_at_its_commit(lake: str) -> None:
    commit_files(lake, SHOWS, [], Commit(mode="append", app="a", app_version=0, metadata={}))
    with holder(lake) as process:
        os.kill(process.pid, signal.SIGSTOP)
        wait_for(lake, 30)
        os.kill(process.pid, signal.SIGCONT)
        assert say(process).startswith("refused 5")
    assert current_version(lake, SHOWS) == 1


def test_a_store_whose_lake_was_removed_is_not_written_to(lake: str) -> None:
    with holder(lake) as process:
        from_url(lake).delete(LEASE)
        assert say(process).startswith("refused 5")
    assert current_version(lake, SHOWS) is None


def test_answers_that_are_lost_do_not_lose_the_lease(lake: str, store: str) -> None:
    """Each is tried again, and refused, since the first try had landed."""
    with proxy(store, lose_answers=(1, 4)) as spoiled, variables(settings(spoiled)), writing(lake, SHOWS):
        check_lease(lake)


@pytest.mark.parametrize("header", ["If-None-Match", "If-Match"])
def test_a_store_that_ignores_conditions_is_refused_at_first_use(lake: str, store: str, header: str) -> None:
    with proxy(store, drop=[header.lower()]) as spoiled, variables(settings(spoiled)):
        with pytest.raises(LakeError, match=f"expected a store that heeds {header} ") as told:
            commit_files(lake, SHOWS, [], Commit(mode="append", app="a", app_version=0, metadata={}))
        assert "\n" not in str(told.value)
        assert current_version(lake, SHOWS) is None
    wait_for(lake, 0)  # nothing is left that keeps others off


MISSING = {
    "AWS_ALLOW_HTTP": ("false", "AWS_ALLOW_HTTP=true"),
    "AWS_ENDPOINT_URL": ("http://127.0.0.1:1", "AWS_ENDPOINT_URL"),
    "AWS_ACCESS_KEY_ID": (None, "AWS_ACCESS_KEY_ID"),
    "AWS_SECRET_ACCESS_KEY": (None, "AWS_SECRET_ACCESS_KEY"),
    "AWS_CONDITIONAL_PUT": ("disabled", "AWS_CONDITIONAL_PUT=etag"),
}


@pytest.mark.parametrize("name", MISSING)
@pytest.mark.parametrize("reads", [True, False])
def test_messages_name_the_variable(lake: str, name: str, reads: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    value, advice = MISSING[name]
    if reads and name == "AWS_CONDITIONAL_PUT":
        pytest.skip("readers put nothing")
    with monkeypatch.context() as patch:
        patch.delenv(name, raising=False)
        if value is not None:
            patch.setenv(name, value)
        with pytest.raises(LakeError) as told:
            current_version(lake, SHOWS) if reads else wait_for(lake, 0)
    assert advice in str(told.value)
    assert "restore the log" not in str(told.value)
    assert "\n" not in str(told.value)
