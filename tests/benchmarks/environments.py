"""Environments of peers: other projects' libraries, each with what it needs beside it, never beside ours."""

import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.benchmarks.harness import Numbers, Report, median

PEERS = {"replay": "replay-rec==0.22.0", "rectools": "rectools==0.19.0", "recbole": "recbole==1.2.1"}
_PINS = Path(__file__).parent / "peers"


class NotInstalled(RuntimeError):
    """A peer's environment could not be made; says why."""


def python_of(peer: str, work: Path) -> str:
    """The Python of a peer's environment, made under `work` on first use. Raises NotInstalled."""
    folder, pins = work / "peers" / peer, _PINS / f"{peer}.txt"
    python, done = folder / "bin" / "python", folder / "installed.txt"
    wanted = f"{PEERS[peer]}\n{pins.read_text()}"
    if done.exists() and done.read_text() == wanted:
        return str(python)
    print(f"installing {PEERS[peer]} in {folder}", flush=True)
    install = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    # The peer alone first: RecBole requires ray of 2023, which nothing that is used here imports.
    for command in (
        [sys.executable, "-m", "venv", str(folder)],
        [*install, "--no-deps", PEERS[peer]],
        [*install, "-r", str(pins)],
    ):
        ran = subprocess.run(command, capture_output=True, text=True)
        if ran.returncode:
            output = (ran.stderr or ran.stdout).strip().splitlines()
            raise NotInstalled(f"{PEERS[peer]} can't be installed: {output[-1] if output else 'no output'}")
    done.write_text(wanted)
    return str(python)


def pythons(work: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Of all peers: (peer -> Python, peer -> why there is none)."""
    found, missing = {}, {}
    for peer in PEERS:
        try:
            found[peer] = python_of(peer, work)
        except NotInstalled as error:
            missing[peer] = str(error)
    return found, missing


def peers_table(
    report: Report, title: str, what: str, found: Mapping[str, Sequence[Numbers]], key: str
) -> dict[str, float]:
    """Print each library's rate (`key` of its numbers, in the unit `what`) beside ours, and give the rates."""
    speed = {name: median(rounds, key) for name, rounds in found.items()}
    report.table(
        title,
        ["library", "version", "torch", what, "graftrec is faster by", "peak GB"],
        [
            [
                name,
                rounds[0]["version"],
                rounds[0]["torch"],
                speed[name],
                speed["graftrec"] / speed[name],
                median(rounds, "peak_bytes") / 2**30,
            ]
            for name, rounds in found.items()
        ],
    )
    return speed
