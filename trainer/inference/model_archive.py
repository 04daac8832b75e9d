"""A model folder, or a patch, as two archives: an object store and a registry move few files faster than many.

model.zip   all that the model needs
users.zip   what is personal data in it (the user table, raw user ids), so that it can be removed alone. Optional.

Unpacked, the folder's manifest verifies each file.
"""

from collections.abc import Callable
from pathlib import Path

from etl.archive import pack, unpack
from trainer.inference.model_folder import OPTIONAL

MODEL, USERS = "model.zip", "users.zip"


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


def edit_archives(folder: Path, scratch: Path, change: Callable[[Path], bool]) -> None:
    """Let `change` change the files of the archives in `folder`, unpacked into `scratch`; it says whether it has.

    Killed anywhere, what lies there is a model, if without its users, and the same call finishes it.
    """
    new = {name: folder / f"{name}.new" for name in (MODEL, USERS)}
    if not (new[MODEL].is_file() and not (folder / USERS).is_file()):  # else a killed call is to be finished
        for path in new.values():
            path.unlink(missing_ok=True)
        if not change(unarchived(folder, scratch / "model")):
            return
        written = scratch / "archives"
        written.mkdir()
        for path in sorted(archived(scratch / "model", written), key=lambda one: one.name == MODEL):
            path.rename(scratch / path.name)
            new[path.name].write_bytes((scratch / path.name).read_bytes())
    (folder / USERS).unlink(missing_ok=True)  # a model without its users is one; one with others than it names isn't
    new[MODEL].replace(folder / MODEL)
    if new[USERS].is_file():
        new[USERS].replace(folder / USERS)
