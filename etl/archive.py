"""Files in one archive: the same files give the same bytes, and nothing leaves the folder that it is unpacked to."""

import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from etl.redaction import one_line
from etl.settings import GraftrecError

_OF_NAMES = (
    FileExistsError,
    FileNotFoundError,
    IsADirectoryError,
    NotADirectoryError,
)  # that an archive gives its files


class ArchiveError(GraftrecError):
    """An archive that can't be read, or that `pack` did not write."""


def pack(files: Mapping[str, Path], target: Path, *, compressed: bool = False) -> None:
    """Write `files`, by their names in it, as a ZIP archive."""
    with zipfile.ZipFile(target, "w") as archive:
        for name, path in sorted(files.items()):
            entry = zipfile.ZipInfo(name)  # without a time
            entry.compress_type = zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED
            with path.open("rb") as source, archive.open(entry, "w", force_zip64=True) as packed:
                shutil.copyfileobj(source, packed)


def unpack(archive: Path, folder: Path) -> None:
    """Write the files of an archive that `pack` wrote, not compressed, into a folder. Raises ArchiveError."""
    try:
        with zipfile.ZipFile(archive) as opened:
            stored = [entry for entry in opened.infolist() if entry.compress_type == zipfile.ZIP_STORED]
            if sum(entry.file_size for entry in stored) > archive.stat().st_size:  # entries that overlap
                raise ArchiveError(f"{archive.name}: expected files beside each other, found others; make it again")
            for entry in opened.infolist():
                place = PurePosixPath(entry.filename)
                if (
                    not entry.filename
                    or place.is_absolute()
                    or {"..", "\\"} & {*place.parts, *entry.filename}
                    or entry.is_dir()
                ):
                    raise ArchiveError(
                        f"{archive.name}: expected names of files below a folder, found {entry.filename[:80]!r}; make "
                        "it again"
                    )
                if entry.compress_type != zipfile.ZIP_STORED:  # what is written is as large as what was read
                    raise ArchiveError(
                        f"{archive.name}: expected files that are not compressed, found {entry.filename[:80]!r}; make "
                        "it again"
                    )
                path = folder / place
                path.parent.mkdir(parents=True, exist_ok=True)
                with opened.open(entry) as packed, path.open("xb") as target:
                    shutil.copyfileobj(packed, target)
    except (zipfile.BadZipFile, *_OF_NAMES, EOFError, ValueError, RuntimeError) as error:
        raise ArchiveError(
            f"{archive.name} is damaged: expected a ZIP archive, found another file ({one_line(error, 150)}); make "
            "it again"
        ) from None
