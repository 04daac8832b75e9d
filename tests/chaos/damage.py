"""Damage to files: a flipped byte, an emptied or cut log entry. What was done can be undone, as from a backup."""

import random
import re
from dataclasses import dataclass
from pathlib import Path

# What a byte is flipped in -> the files. Of raw logs and MLflow's database a program can't know that they are damaged.
PLACES = {
    "table": ("lake/*/*.parquet", "lake/*/*=*/**/*.parquet"),
    "log": ("lake/*/_delta_log/*.json",),
    "model": ("runs/*/model/*", "mlartifacts/models/**/*.safetensors", "mlartifacts/models/**/*.json"),
    "checkpoint": ("runs/*/checkpoints/step-*/*",),
    "run": ("runs/*/*",),
    "unchecked": ("days/*", "items.txt", "users.csv", "mlflow.db"),
}
_DRAWN_NAME = re.compile(r"[0-9a-f]{8}-?([0-9a-f]{4}-?){3}[0-9a-f]{12}")


@dataclass(frozen=True)
class Damage:
    """A damaged file, its bytes before and after."""

    path: Path
    before: bytes
    after: bytes
    what: str

    def undo(self) -> None:
        """Restore the file, where it is still the damaged one."""
        if self.path.is_file() and self.path.read_bytes() == self.after:
            self.path.write_bytes(self.before)


def files(folder: Path, place: str) -> list[Path]:
    """The files of a place, those with drawn names in the order of their size."""
    found = {path for pattern in PLACES[place] for path in folder.glob(pattern) if path.is_file()}
    neighbours = folder / "runs" / "someone"
    kept = [path for path in found if path.stat().st_size and neighbours not in path.parents]
    return sorted(kept, key=lambda path: (_DRAWN_NAME.sub("", str(path)), path.stat().st_size, str(path)))


def flip(folder: Path, place: str, draw: random.Random) -> Damage | None:
    """Flip one bit of one byte of one file. None: the place has no file."""
    which, where, bit = draw.random(), draw.random(), draw.randrange(8)
    if not (candidates := files(folder, place)):
        return None
    path = candidates[int(which * len(candidates))]
    before = path.read_bytes()
    position = int(where * len(before))
    after = before[:position] + bytes([before[position] ^ 1 << bit]) + before[position + 1 :]
    path.write_bytes(after)
    shown = path.relative_to(folder)
    return Damage(path, before, after, f"bit {bit} of byte {position:,} of {len(before):,} in {shown}")


def cut_log(folder: Path, draw: random.Random) -> Damage | None:
    """Empty or cut the newest log entry of a table, as power loss does."""
    which, kept = draw.random(), draw.choice([0.0, draw.random()])
    tables = sorted(folder.glob("lake/*/_delta_log"))
    if not tables:
        return None
    path = max(tables[int(which * len(tables))].glob("*.json"))
    before = path.read_bytes()
    after = before[: int(kept * len(before))]
    path.write_bytes(after)
    return Damage(path, before, after, f"{path.relative_to(folder)} cut to {len(after):,} of {len(before):,} bytes")
