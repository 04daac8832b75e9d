"""The faults: each befalls the round's command, and checks what must hold afterwards."""

import contextlib
import dataclasses
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from tests.chaos import damage, invariants
from tests.chaos.after import named
from tests.chaos.commands import REQUEST_SECONDS
from tests.chaos.contents import Contents
from tests.chaos.rounds import Round
from tests.chaos.server import proxied
from tests.chaos.watch import Changes

PAGE = 4096
_PLENTY = 1 << 30
_SERVER_SECONDS = 60.0  # of requests that are repeated
_NAMES = (
    "CHAOS_API_TOKEN",
    "CHAOS_JWT_TOKEN",
    "CHAOS_DB_PWD",
    "CHAOS_BASIC_AUTH",
    "CHAOS_PG_DSN",
    "CHAOS_BLOB_SAS",
    "CHAOS_ACCOUNT_KEY",
    "CHAOS_CLIENT_SECRET",
)
_WITH_SPARK = ("etl", "etl-day", "etl-kcore", "etl-interactions", "recommend", "recommend-5")


def kill(round: Round) -> None:
    """SIGKILL of the process group, once or twice, at a random moment or at the n-th change of a file."""
    round.fill()
    for _ in range(round.draw.choice([1, 1, 2])):
        _run_and_kill(round, signal.SIGKILL)
    _run_again(round)


def terminate(round: Round) -> None:
    """SIGTERM, as a scheduler sends it."""
    round.fill()
    _run_and_kill(round, signal.SIGTERM)
    _run_again(round)


def _run_and_kill(round: Round, number: int) -> None:
    undisturbed = round.library.after((*round.plan.before, round.plan.command))
    by_change, share = round.draw.random() < 0.6, round.draw.random()
    changes, seconds = 1 + int(share * undisturbed.changes), share * undisturbed.seconds
    with Changes(round.folder) as counted:
        running = round.start()
        if by_change:
            deadline = time.monotonic() + 3 * undisturbed.seconds + 30
            while running.process.poll() is None and time.monotonic() < deadline:
                if counted.reached(changes, 0.05):
                    break
        else:
            _sleep(running.process, seconds)
        if running.process.poll() is None:
            running.kill(number)
    round.notes.append(f"signal {number} at {f'change {changes}' if by_change else f'{seconds:.1f} s'}")
    round.end(running)
    round.check_on_the_way([round.after(), round.after(round.plan.command)])


def _sleep(process: "subprocess.Popen[bytes]", seconds: float) -> None:
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(seconds)


def _run_again(round: Round) -> None:
    round.run_undisturbed()
    round.check([round.after(round.plan.command)])


# --- damaged files ----------------------------------------------------------------------------------------------------


def flip(round: Round) -> None:
    """One flipped bit in a file of the lake, a model, a checkpoint or a run's folder."""
    round.fill()
    places = ["table", "table", "log", "model", "run"] if round.command.tracked else ["table", "table", "log"]
    _damaged(round, damage.flip(round.folder, round.draw.choice(places), round.draw))


def flip_checkpoint(round: Round) -> None:
    """A training is killed at a late change of a file, and a bit of what it left is flipped."""
    round.fill()
    _run_and_kill(round, signal.SIGKILL)
    if found := damage.flip(round.folder, "checkpoint", round.draw):
        round.notes.append(found.what)
    _run_again(round)  # what it falls back to is whole, so the damage needs no undoing


def cut_log(round: Round) -> None:
    """The newest log entry of a table is emptied or cut."""
    round.fill()
    _damaged(round, damage.cut_log(round.folder, round.draw))


def _damaged(round: Round, found: damage.Damage | None) -> None:
    """The command sees nothing of the damage, or mends it, or refuses: never other rows."""
    if found is None:
        round.notes.append("nothing to damage")
        return _run_again(round)
    round.notes.append(found.what)
    ended = round.end(round.start())
    found.undo()
    if ended.code != 0:
        round.check_on_the_way([round.after(), round.after(round.plan.command)])
        round.run_undisturbed()
    round.check([round.after(round.plan.command)])


def flip_unchecked(round: Round) -> None:
    """A flipped bit where no program can know it, in a raw log or MLflow's database: no crash, no hang."""
    round.fill()
    if found := damage.flip(round.folder, "unchecked", round.draw):
        round.notes.append(found.what)
    round.end(round.start())
    round.violations += invariants.neighbours_untouched(round.folder)


# --- two at once ------------------------------------------------------------------------------------------------------

RIVALS = {
    "etl": ("etl", "etl-other", "etl-other"),
    "etl-day": ("etl-day", "etl-day-kcore", "pretrain"),
    "etl-kcore": ("etl-kcore",),
    "pretrain": ("pretrain", "pretrain-other", "none-0"),
    "deep": ("deep", "none-0"),
    "none-0": ("none-0", "none-1"),
    "promote-0": ("promote-0", "promote-1"),
    "promote-1": ("promote-1", "recommend"),
    "recommend": ("recommend", "recommend-5"),
    "recommend-5": ("recommend-5", "recommend"),
}


def twice(round: Round) -> None:
    """A second command at once: what is left is that of one of the two, or of both in one order."""
    first = round.plan.command
    second = round.draw.choice(RIVALS[first])
    round.fill()
    rival = named(second)
    for source, target in rival.adds:
        shutil.copy2(round.folder / source, round.folder / target)
    delay = round.draw.random() * min(1.5, round.seconds() / 4)
    round.notes.append(f"beside {second}, {delay:.2f} s later")
    one = round.start()
    time.sleep(delay)
    other = round.start(rival)
    codes = [round.end(running).code for running in (one, other)]
    if first == second:
        known = [round.after(), round.after(first)]
        final = [round.after(first)]
    else:
        known = _orders(round, first, second)
        final = known[-2:]
    round.check_on_the_way(known)
    if codes[0] == codes[1] == 0:
        return round.check(final)
    for name, code in zip((first, second), codes, strict=True):
        if code != 0:
            round.run_undisturbed(named(name))
    if first != second:
        again = [(second, first, second), (first, second, first)]  # the loser had begun before the winner
        found = round.contents()
        final = final if found in final else [*final, *(round.after(*order) for order in again)]
    round.check(final)


def _orders(round: Round, first: str, second: str) -> list[Contents]:
    return [round.after(*names) for names in ((), (first,), (second,), (first, second), (second, first))]


# --- no space ---------------------------------------------------------------------------------------------------------


def full_disk(round: Round) -> None:
    """A small file system where it may be mounted, else a bound on the size of a file."""
    share = round.draw.random()
    before = round.library.after(round.plan.before).folder
    after = round.library.after((*round.plan.before, round.plan.command)).folder
    room, limit = PAGE * (1 + int(share * max(16, _pages(after) - _pages(before)))), 0
    mounted = _mount(round.folder)
    round.fill()
    if mounted:
        _resize(round.folder, room)
        round.notes.append(f"{room:,} bytes free")
    else:
        limit = max(PAGE, int(share * max(path.stat().st_size for path in after.rglob("*") if path.is_file())))
        round.notes.append(f"files up to {limit:,} bytes")
    round.end(round.start(limit=limit))
    if not limit:
        _resize(round.folder, _PLENTY)
    round.check_on_the_way([round.after(), round.after(round.plan.command)])
    _run_again(round)


def _pages(folder: Path) -> int:
    """What a folder takes on a file system in memory."""
    return sum(1 + -(-path.stat().st_size // PAGE) for path in folder.rglob("*"))


def _mount(folder: Path) -> bool:
    if os.geteuid() != 0 or not shutil.which("mount"):
        return False
    mount = ["mount", "-o", f"size={_PLENTY}", "-t", "tmpfs", "chaos", str(folder)]
    return subprocess.run(mount, capture_output=True).returncode == 0


def _resize(folder: Path, room: int) -> None:
    """Leave so many bytes free on a mounted file system."""
    found = os.statvfs(folder)
    size = (found.f_blocks - found.f_bfree) * found.f_frsize + room
    subprocess.run(["mount", "-o", f"remount,size={size}", str(folder)], check=True)


def unmount(folder: Path, *, keep: bool = False) -> None:
    """`keep`: what is on it stays in the folder."""
    if not folder.is_dir() or not os.path.ismount(folder):
        return
    copy = folder.with_name("kept")
    if keep:
        shutil.copytree(folder, copy)
    subprocess.run(["umount", folder], check=True)
    if keep:
        folder.rmdir()
        copy.rename(folder)


# --- MLflow, secrets --------------------------------------------------------------------------------------------------


def mlflow(round: Round) -> None:
    """MLflow's server is dead, too slow, slow or answers 500, from the first request or from a later one on."""
    mode, delay = round.draw.choice([("dead", 0.0), ("500", 0.0), ("slow", 2 * REQUEST_SECONDS), ("slow", 0.2)])
    whole = round.draw.choice([0, 0, round.draw.randrange(1, 30)])
    round.notes.append(f"{mode} {delay or ''} after {whole} requests")
    round.experiment = round.registered = f"chaos-{round.plan.seed}-{round.plan.number}-{time.time_ns()}-"
    server = round.library.server
    with proxied(server.port(), mode, whole=whole, delay_seconds=delay) as proxy:
        round.server_store = server.store
        round.environment = {"MLFLOW_TRACKING_URI": proxy.uri, "MLFLOW_EXPERIMENT_NAME": round.experiment}
        if "promote" in round.plan.command:
            named = ("--registered_model", f"{round.registered}chaos")
            round.command = dataclasses.replace(round.command, arguments=(*round.command.arguments, *named))
        round.fill()
        round.end(round.start(more=round.environment), more_seconds=_SERVER_SECONDS)
        round.check_on_the_way([round.after(), round.after(round.plan.command)])
        proxy.mode = "whole"
        _run_again(round)


def secrets(round: Round) -> None:
    """Secrets in the environment, in settings, and in the address of a server that is dead."""
    letters = "abcdefghijkmnopqrstuvwxyz0123456789"
    short, long = ("".join(round.draw.choices(letters, k=length)) for length in (12, 300))
    names = {name: value for stem, value in ((_NAMES[::2], short), (_NAMES[1::2], long)) for name in stem}
    more, arguments = dict(names), round.command.arguments
    if round.plan.command in _WITH_SPARK:
        arguments = (*arguments, "--spark.settings", f"{{spark.hadoop.fs.azure.account.key.chaos: {short}}}")
    dead = round.command.tracked and round.draw.random() < 0.5
    if dead:
        more["MLFLOW_TRACKING_URI"] = f"http://chaos:{round.draw.choice([short, long])}@127.0.0.1:9"
    round.notes.append("in the address of a dead server" if dead else "in the environment")
    round.fill()
    command = dataclasses.replace(round.command, arguments=arguments)
    round.end(round.start(command, more=more), more_seconds=_SERVER_SECONDS if dead else 0)
    round.violations += invariants.no_secrets([round.folder, round.logs], [short, long])
    round.check_on_the_way([round.after(), round.after(round.plan.command)])
    round.run_undisturbed()
    round.check([round.after(round.plan.command)], tracked=not dead)  # the dead server's runs are kept for it


# --- processes of a command -------------------------------------------------------------------------------------------


def kill_rank(round: Round) -> None:
    """One of the processes that torchrun started is killed."""
    _kill_child(round, "trainer")
    _run_again(round)


def kill_executor(round: Round) -> None:
    """One of Spark's executors is killed: the job goes on without it."""
    ended = _kill_child(round, "CoarseGrainedExecutorBackend")
    if ended != 0:
        round.violations.append(f"1: {round.plan.command} ended with {ended} after the loss of one executor of two")
    _run_again(round)


def _kill_child(round: Round, what: str) -> int:
    round.fill()
    share, which = round.draw.random(), round.draw.random()
    running = round.start()
    while not _children(running.process.pid, what) and running.process.poll() is None:
        time.sleep(0.1)
    moment = share * round.seconds() * 0.7
    _sleep(running.process, moment)
    if found := _children(running.process.pid, what):
        found[int(which * len(found))].kill()
        running.killed = True
    round.notes.append(f"{what} {'killed' if found else 'gone'} {moment:.1f} s after its start")
    ended = round.end(running)
    round.check_on_the_way([round.after(), round.after(round.plan.command)])
    return ended.code


def _children(parent: int, what: str) -> list[psutil.Process]:
    """Processes that a command has started, by what their command lines hold."""
    found = []
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(parent).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                found += [child] if what in " ".join(child.cmdline()) else []
    return found


FAULTS: dict[str, Callable[[Round], None]] = {
    function.__name__: function
    for function in (
        kill,
        terminate,
        flip,
        flip_checkpoint,
        flip_unchecked,
        cut_log,
        twice,
        full_disk,
        mlflow,
        secrets,
        kill_rank,
        kill_executor,
    )
}
