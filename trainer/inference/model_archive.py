"""A model folder, or a patch, as two archives: an object store and a registry move few files faster than many.

model.zip   all that the model needs
users.zip   what is personal data in it (the user table, raw user ids), so that it can be removed alone. Optional.

Unpacked, the folder's manifest verifies each file.
"""

import tempfile
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


def archive_again(folder: Path, target: Path) -> None:
    """Put a folder's archives in the place of those in the folder `target`.

    Killed anywhere, what is there is a model still, if without its users: no users beside another model's manifest.
    """
    with tempfile.TemporaryDirectory(dir=target, prefix=".archives-") as scratch:
        written = archived(folder, Path(scratch))
        (target / USERS).unlink(missing_ok=True)
        for path in written:
            path.replace(target / path.name)


def unarchived(folder: Path, target: Path) -> Path:
    """Unpack the archives that lie in `folder` into `target`, which it returns. Raises ArchiveError."""
    target.mkdir(parents=True, exist_ok=True)
    for name in (MODEL, USERS):
        if (folder / name).is_file():
            unpack(folder / name, target)
    return target
