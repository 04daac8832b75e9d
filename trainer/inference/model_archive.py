"""A model folder, or a patch, as two archives: an object store and a registry move few files faster than many.

model.zip   all that the model needs
users.zip   what is personal data in it (the user table, raw user ids), so that it can be removed alone. Optional.

Unpacked, the folder's manifest verifies each file.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from etl.archive import pack, unpack
from trainer.inference.model_folder import OPTIONAL, digest_of

MODEL, USERS = "model.zip", "users.zip"
_OPENED = ".opened"  # an archived model that is being changed


def archived(folder: Path, target: Path) -> list[Path]:
    """Write a folder's archives into the folder `target`; returns their paths."""
    files = {path.name: path for path in folder.iterdir() if path.is_file()}
    parts = {
        MODEL: {name: path for name, path in files.items() if name not in OPTIONAL},
        USERS: {name: path for name, path in files.items() if name in OPTIONAL},
    }
    for name, part in parts.items():
        if part:
            pack(part, target / name)
    return [target / name for name, part in parts.items() if part]


def unarchived(folder: Path, target: Path) -> Path:
    """Unpack the archives that lie in `folder` into `target`, which it returns. Raises ArchiveError."""
    target.mkdir(parents=True, exist_ok=True)
    for name in (MODEL, USERS):
        if (folder / name).is_file():
            unpack(folder / name, target)
    return target


@contextmanager
def opened(root: Path) -> Iterator[None]:
    """All archived models below a folder as folders beside their archives; what is changed in them is archived again.

    Killed anywhere, the archives are a model still, if without its users; doing the same again finishes it.
    """
    places = sorted(path.parent for path in root.rglob(MODEL))
    for place in places:
        new = place / f"{_OPENED}.new"
        shutil.rmtree(new, ignore_errors=True)
        if not (place / _OPENED).is_dir():  # left by a process that was killed: maybe changed, and not archived
            unarchived(place, new).rename(place / _OPENED)
    yield
    for place in places:
        _archive_again(place)
        gone = (place / _OPENED).rename(place / f"{_OPENED}.new")
        shutil.rmtree(gone)


def _archive_again(place: Path) -> None:
    new = place / f"{_OPENED}.archives"
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    archives = archived(place / _OPENED, new)
    changed = [one for one in archives if not _same(one, place / one.name)]
    if changed:
        (place / USERS).unlink(missing_ok=True)  # the model's manifest names users as they are now, or will be
        for archive in archives:
            archive.replace(place / archive.name)
    shutil.rmtree(new)


def _same(one: Path, other: Path) -> bool:
    return other.is_file() and digest_of(one) == digest_of(other)
