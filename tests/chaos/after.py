"""Folders after commands that ran undisturbed: what rounds begin with and are compared with. Kept between invocations.

A folder is named by the commands that made it, in order, from nothing but raw logs and settings.
"""

import hashlib
import json
import os
import shutil
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

from tests.chaos.commands import COMMANDS, ROOT, Command, Running, add_files, write_start
from tests.chaos.contents import Contents, read_contents, relocate
from tests.chaos.server import Server
from tests.chaos.watch import Changes

_LIMIT_SECONDS = 600.0


class Undisturbed(Exception):
    """A command that fails without any fault."""


@dataclass(frozen=True)
class After:
    """`code`, `seconds` and `changes` (of files): of the last of the commands."""

    folder: Path
    code: int
    seconds: float
    changes: int
    contents: Contents


class Library:
    """Makes each folder on first use."""

    def __init__(self, root: Path) -> None:
        self._root = root / _sources()
        self.server = Server(root / "server")
        self._locks: dict[tuple[str, ...], threading.Lock] = {}
        self._found: dict[tuple[str, ...], After] = {}
        self._guard = threading.Lock()
        for other in root.glob("*"):
            if other != self._root:  # of other sources, or of servers before
                shutil.rmtree(other, ignore_errors=True)
        self._root.mkdir(parents=True, exist_ok=True)

    def close(self) -> None:
        self.server.close()

    def after(self, commands: tuple[str, ...]) -> After:
        with self._guard:
            lock = self._locks.setdefault(commands, threading.Lock())
        with lock:
            if commands not in self._found:
                self._found[commands] = self._read(commands) or self._make(commands)
            return self._found[commands]

    def copy(self, commands: tuple[str, ...], to: Path) -> None:
        """A copy of a folder, with everything in it at its new place."""
        source = self.after(commands).folder
        shutil.copytree(source, to, dirs_exist_ok=True)
        if (to / "mlflow.db").exists():
            relocate(to / "mlflow.db", source, to)
        for origin in to.rglob("origin.json"):  # of a model folder: it names the lake that it was trained on
            origin.write_text(origin.read_text().replace(f"{source}/", f"{to}/"))

    def _place(self, commands: tuple[str, ...]) -> Path:
        name = "-".join(commands) if len(commands) < 4 else f"{commands[-1]}-{_digest(' '.join(commands).encode())}"
        return self._root / (name or "nothing")

    def _read(self, commands: tuple[str, ...]) -> After | None:
        place = self._place(commands)
        try:
            note = json.loads((place / "note.json").read_text())
        except (OSError, ValueError):
            return None
        return After(place / "work", note["code"], note["seconds"], note["changes"], Contents(**note["contents"]))

    def _make(self, commands: tuple[str, ...]) -> After:
        place = self._place(commands)
        shutil.rmtree(place, ignore_errors=True)
        work = place / "work"
        code, seconds, changes = 0, 0.0, 0
        if commands:
            self.copy(commands[:-1], work)
            command = named(commands[-1])
            add_files(command, work)
            with Changes(work) as counted:
                ended = Running(command, work, place / "logs").end(_LIMIT_SECONDS)
            code, seconds, changes = ended.code, ended.seconds, counted.count
            if code not in (0, 3) or ended.hung:
                fate = f"hung for {seconds:.0f} s" if ended.hung else f"ended with {code}"
                said = ended.errors.strip().splitlines()[-1:] or [""]
                raise Undisturbed(f"{' '.join(commands)} {fate}, nothing was done to it: {said[0]}")
        else:
            write_start(work)
        made = After(work, code, seconds, changes, read_contents(work))
        note = {"code": code, "seconds": seconds, "changes": changes, "contents": json.loads(made.contents.as_json())}
        (place / "note.json").write_text(json.dumps(note))
        return made


def named(name: str) -> Command:
    """A command by its name; with @spark or @cluster, on Spark."""
    plain, _, engine = name.partition("@")
    return COMMANDS[plain].on(engine) if engine else COMMANDS[plain]


def _sources() -> str:
    """A digest of all that a folder depends on."""
    digest = hashlib.sha256(f"{sys.version} {os.uname().machine}".encode())
    folders = (ROOT / name for name in ("etl", "trainer", "graftrec", "conf"))
    own = [Path(__file__).with_name(name) for name in ("commands.py", "contents.py")]
    for path in (*(path for folder in folders for path in sorted(folder.rglob("*"))), *own):
        if path.suffix in (".py", ".yaml"):
            digest.update(path.name.encode() + path.read_bytes())
    digest.update((ROOT / "constraints.txt").read_bytes())
    return digest.hexdigest()[:12]


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:12]
