"""Reads files that somebody else may have written: nothing of them is believed before it is checked.

A folder of a model, an embedding or a checkpoint has a manifest: the SHA-256 of each of its files. `verified` refuses a
manifest that names too little, and names that leave the folder; `VerifiedFolder` reads no file that the manifest does
not name, and no link. What is read is JSON, safetensors and Parquet, never pickle; whatever is wrong with a file is one
`ModelFolderError` with the file's name. README.md beside this file says what that protects from, and what it does not.
"""

import hashlib
import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from etl.redaction import one_line
from etl.settings import GraftrecError

MANIFEST = "manifest.json"
MAX_JSON_BYTES = 1 << 28  # of a file: a patch of ten million items' rows has a third of that
_NAME = re.compile(r"[\w-][\w.-]*", re.ASCII)  # of a file in a folder: no path, no hidden file
_DIGEST = re.compile(r"[0-9a-f]{64}")

RecordT = TypeVar("RecordT", bound="Record")


class ModelFolderError(GraftrecError):
    """A folder of a model or a checkpoint that is not there, incomplete, damaged, or not what it should be."""


class Record(BaseModel):
    """What a JSON file must hold: these keys, of these types, and no others."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, hide_input_in_errors=True)


# RuntimeError: of torch; RecursionError is one, too.
_OF_CONTENT = (
    *(OSError, ValueError, ArithmeticError, LookupError, TypeError, AttributeError, AssertionError),
    *(RuntimeError, MemoryError, pa.ArrowException, SafetensorError),
)


@contextmanager
def refused(what: object, mend: str) -> Iterator[None]:
    """Turns whatever the content of a file makes libraries raise into a ModelFolderError of one line."""
    try:
        yield
    except GraftrecError:
        raise
    except _OF_CONTENT as error:
        said = one_line(error, 250)
        if not ("expected" in said and "found" in said):
            said = (
                f"expected what this version of graftrec writes, found something else ({type(error).__name__}: {said})"
            )
        raise ModelFolderError(f"{what}: {said}; {mend}") from None


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text. Raises ValueError, also for a key that stands twice and for what is nested too deep."""
    try:
        return json.loads(text, object_pairs_hook=_object)
    except RecursionError:
        raise ValueError("expected JSON, found it nested too deep") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("expected each key once, found one twice")
    return found


def read_json(path: Path, mend: str) -> Any:
    """The value in a JSON file, which is no link. Raises ModelFolderError."""
    if path.is_symlink() or not path.is_file():
        raise ModelFolderError(f"{path}: expected a file, found {_kind(path)}; {mend}")
    try:
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise ValueError(f"expected at most {MAX_JSON_BYTES:,} bytes, found {size:,}")
        return parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ModelFolderError(f"{path} is damaged: not readable as JSON ({one_line(error, 100)}); {mend}") from None


def record(kind: type[RecordT], value: Any, path: Path, mend: str) -> RecordT:
    """A JSON value as `kind`. Raises ModelFolderError, for a key that only a newer version knows too."""
    try:
        # Strict as JSON is: a list is a tuple there.
        return kind.model_validate_json(json.dumps(value))
    except (ValidationError, ValueError, RecursionError) as error:
        raise ModelFolderError(f"{path}: {_explained(kind, error)}; {mend}") from None


def _explained(kind: type[BaseModel], error: Exception) -> str:
    if not isinstance(error, ValidationError):
        return f"expected {', '.join(kind.model_fields)}, found {one_line(error, 100)}"
    problem = error.errors(include_url=False, include_context=False)[0]
    where = ".".join(str(step)[:80] for step in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return f"expected {', '.join(kind.model_fields)}, found {where!r}, which a newer version of graftrec may know"
    if problem["type"] == "missing":
        return f"expected {where}, found none"
    said = problem["msg"].replace("Input should be", "expected")[:150]
    return f"{where or 'its content'}: {said}, found another value"


def _kind(path: Path) -> str:
    if path.is_symlink():
        return "a link"
    return "a folder" if path.is_dir() else "something else" if path.exists() else "none"


def digest_of(path: Path) -> str:
    """A file's SHA-256."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def named_digests(path: Path, mend: str) -> dict[str, str]:
    """What a manifest says: file name -> SHA-256. Raises ModelFolderError for names with a folder in them."""
    found = read_json(path, mend)
    if not isinstance(found, dict):
        raise ModelFolderError(f"{path} is damaged: expected names of files, found {type(found).__name__}; {mend}")
    for name, digest in found.items():
        if not _NAME.fullmatch(name) or name == MANIFEST:
            raise ModelFolderError(f"{path}: expected names of files in its folder, found {name[:80]!r}; {mend}")
        if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
            raise ModelFolderError(f"{path}: expected the SHA-256 of {name}, found {str(digest)[:80]!r}; {mend}")
    return found


def copy_file(source: Path, target: Path, mend: str) -> None:
    """Copy a file that is no link to a place where there is none. Raises ModelFolderError."""
    if source.is_symlink() or not source.is_file():
        raise ModelFolderError(f"{source}: expected a file, found {_kind(source)}; {mend}")
    with source.open("rb") as read, target.open("xb") as write:
        while block := read.read(1 << 20):
            write.write(block)


@dataclass(frozen=True)
class VerifiedFolder:
    """A folder whose files are those of its manifest. `digests`: of the files that are there."""

    path: Path
    digests: Mapping[str, str]
    mend: str

    def __contains__(self, name: str) -> bool:
        return name in self.digests

    def file(self, name: str) -> Path:
        """Raises ModelFolderError for a file that the manifest does not name."""
        if name not in self.digests:
            raise ModelFolderError(f"{self.path / MANIFEST}: expected the SHA-256 of {name}, found none; {self.mend}")
        return self.path / name

    def json(self, name: str) -> Any:
        return read_json(self.file(name), self.mend)

    def tensors(self, name: str, *, device: str = "cpu") -> dict[str, Tensor]:
        """All of a file, by name; mapped, not read, on the CPU. Raises ModelFolderError."""
        path = self.file(name)
        with refused(path, self.mend):
            return load_file(path, device=device)

    def table(self, name: str, columns: Sequence[str] | None = None, *, max_rows: int) -> pa.Table:
        """A Parquet file of at most `max_rows` rows, `columns` of it. Raises ModelFolderError.

        A few bytes can stand for any number of rows: their number is checked before one is read.
        """
        path = self.file(name)
        with refused(path, self.mend), pq.ParquetFile(path) as file:
            rows, known = file.metadata.num_rows, file.schema_arrow.names
            if rows > max_rows:
                raise ModelFolderError(f"{path}: expected at most {max_rows:,} rows, found {rows:,}; {self.mend}")
            if lacking := [column for column in columns or () if column not in known]:
                raise ModelFolderError(f"{path}: expected the column {lacking[0]}, found none; {self.mend}")
            return file.read(list(columns) if columns is not None else None)


def verified(
    folder: Path, required: Collection[str], *, mend: str, optional: Collection[str] = (), what: str = "folder"
) -> VerifiedFolder:
    """A folder, each of its files as the manifest says. `required`: names that it must have; `optional`: those that may
    have been removed. Raises ModelFolderError, with the name of a file that is missing, damaged, a link, or not
    named."""
    if not (folder / MANIFEST).is_file():
        raise ModelFolderError(f"no {what} in {folder}: expected {MANIFEST} and the files it names; {mend}")
    digests = named_digests(folder / MANIFEST, mend)
    if lacking := sorted(set(required) - digests.keys()):
        raise ModelFolderError(
            f"{folder / MANIFEST} names too little: expected the SHA-256 of {', '.join(lacking)} too, found "
            f"{', '.join(digests) or 'none'}; {mend}"
        )
    there = {}
    for name, digest in digests.items():
        path = folder / name
        if path.is_symlink():
            raise ModelFolderError(f"{path}: expected a file, found a link, which may lead anywhere; {mend}")
        if not path.is_file():
            if name in optional and not path.exists():
                continue
            raise ModelFolderError(f"{path} is missing; {mend}")
        if digest_of(path) != digest:
            raise ModelFolderError(f"{path} is damaged: its SHA-256 is not the manifest's; {mend}")
        there[name] = digest
    return VerifiedFolder(folder, there, mend)
