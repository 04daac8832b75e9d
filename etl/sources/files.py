"""Files as bytes: finding them, naming their content, and cutting them into ranges of whole lines.

Everything goes through pyarrow's file systems, so that a path may be local or a URI, and so that the engine needs no
file-name function of its own. A row belongs to the range in which its first byte lies.
"""

import hashlib
import os.path
import re
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import IO

import pyarrow as pa
from pyarrow import fs

from etl.redaction import one_line
from etl.settings import GraftrecError

MAX_ROW_BYTES = 1 << 20
END = 1 << 62  # the end of a file whose length is unknown: a compressed one
_CHUNK_BYTES = 4 << 20
_COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd", ".zstd": "zstd", ".zip": "zip"}
_UNREADABLE = (OSError, EOFError, pa.ArrowException, zipfile.BadZipFile, zlib.error, RuntimeError)
_LOGS = {"_delta_log": "format: delta", ".hoodie": "format: table"}  # folder of a table's log -> how it is read
_MAGIC = {b"\x1f\x8b": "gzip", b"BZh": "bz2", b"\x28\xb5\x2f\xfd": "zstd", b"PK\x03\x04": "zip", b"PAR1": "parquet"}


@dataclass(frozen=True)
class RawFile:
    """One file of a source: `path` opens it, `name` is what people see, `index` its place among the sorted paths."""

    path: str
    name: str
    index: int
    size: int  # bytes as stored
    compression: str | None
    member: str | None = None  # of a zip archive: the file inside that is read


@dataclass(frozen=True)
class Block:
    """Whole lines of a file. `first_line` is 1-based; `too_long`: the head of one line longer than MAX_ROW_BYTES."""

    data: bytes
    first_line: int
    too_long: bool = False


def find_files(root: str, path: str, *, what: str, member: str | None = None) -> list[RawFile]:
    """The files that `path` (a file, a folder or a glob under `root`) names, by sorted path; of zip archives `member`.

    Hidden files and those starting with ``_`` are left out of folders. Raises GraftrecError where there is none; `what`
    names the setting in the message.
    """
    filesystem, base, prefix = _locate(root, path)
    home = _locate(root, "")[1].rstrip("/") + "/"
    named = len(home) if base.startswith(home) and "://" not in path else 0  # the root's own name is no pattern
    pattern = re.compile(r"[*?\[]").search(base, named)
    info = filesystem.get_file_info(base)
    if pattern is None or info.type != fs.FileType.NotFound:  # a name that exists is no pattern
        if info.type == fs.FileType.File:
            found = [info]
        elif info.type == fs.FileType.Directory:
            found = [i for i in _listing(filesystem, base) if not is_hidden(i.path[len(base) :])]
        else:
            found = []
    else:
        folder = str(PurePosixPath(base[: pattern.start()] + "x").parent)
        wanted = re.compile(re.escape(base[:named]) + glob_pattern(base[named:]))
        found = [i for i in _listing(filesystem, folder) if wanted.fullmatch(i.path)]
    if not found:
        raise GraftrecError(f"{what}: expected a file, a folder or a glob, found no file at {base}; {_nearby(root)}")
    _refuse_tables(
        filesystem, [info.path for info in found], base if pattern is None else base[: pattern.start()], what
    )
    ordered = sorted(found, key=lambda info: info.path)
    _refuse_twins([info.path.removeprefix(home) for info in ordered], what)
    named_files = [
        RawFile(
            prefix + info.path, info.path.removeprefix(home), index, info.size, _COMPRESSIONS.get(_suffix(info.path))
        )
        for index, info in enumerate(ordered)
    ]
    return [_with_member(file, member) if file.compression == "zip" else file for file in named_files]


def all_files(root: str, *, hidden: bool = False) -> list[RawFile]:
    """Every file below a folder, by sorted path, without looking at any; `hidden` ones too. Raises GraftrecError."""
    filesystem, base, prefix = _locate(root, "")
    base = base.rstrip("/")
    found = sorted(_listing(filesystem, base), key=lambda info: info.path)
    named = [
        RawFile(prefix + info.path, info.path[len(base) + 1 :], 0, info.size, _COMPRESSIONS.get(_suffix(info.path)))
        for info in found
    ]
    return [file for file in named if hidden or not is_hidden(file.name)]


def members(file: RawFile) -> list[RawFile]:
    """The file itself, or, of a zip archive, the files inside."""
    if file.compression != "zip":
        return [file]
    return [replace(file, member=name) for name in _inside(file)]


def _inside(file: RawFile) -> list[str]:
    with reading(file), open_raw(file.path) as stream, zipfile.ZipFile(stream) as archive:
        return [info.filename for info in archive.infolist() if not info.is_dir() and not _is_litter(info.filename)]


def _with_member(file: RawFile, member: str | None) -> RawFile:
    """A zip archive with the file inside that `member`, a name or a glob, names; None: the only one there."""
    inside = _inside(file)
    named = (
        inside
        if member is None
        else [member]
        if member in inside
        else [name for name in inside if re.fullmatch(glob_pattern(member), name)]
    )
    if len(named) == 1:
        return replace(file, member=named[0])
    shown = ", ".join(inside[:8]) + (", …" if len(inside) > 8 else "")
    raise GraftrecError(
        f"{file.name}: expected one file{'' if member is None else f' {member!r}'} inside, found {len(named)} "
        f"({shown}); name it by `member`"
    )


def _is_litter(name: str) -> bool:
    return name.startswith("__MACOSX/") or is_hidden(PurePosixPath(name).name)


def _refuse_tables(filesystem: fs.FileSystem, paths: Sequence[str], base: str, what: str) -> None:
    """A table's log says which of its files and rows count: read without it, deleted rows would come back."""
    folders = {str(parent) for path in paths for parent in PurePosixPath(path).parents if _covers(base, parent)}
    logs = {f"{folder}/{log}": (folder, how) for folder in folders for log, how in _LOGS.items()}
    for info in filesystem.get_file_info(list(logs)):
        if info.type == fs.FileType.Directory:
            folder, how = logs[info.path]
            raise GraftrecError(f"{what}: expected files, found a table, {folder}; read it by {how}")


def _covers(base: str, folder: PurePosixPath) -> bool:
    """Whether a folder lies at, below or above `base`."""
    return folder.is_relative_to(base) or PurePosixPath(base).is_relative_to(folder)


def _refuse_twins(names: Sequence[str], what: str) -> None:
    """One file, packed and unpacked beside each other, would be read twice."""
    unpacked: dict[str, str] = {}
    for name in names:
        suffix = _suffix(name)
        plain = name.removesuffix(suffix) if suffix in _COMPRESSIONS else name
        if (other := unpacked.setdefault(plain, name)) != name:
            raise GraftrecError(
                f"{what}: expected each file once, found {other} and {name}; remove one, or name the files by a glob"
            )


def digests(files: Sequence[RawFile]) -> list[str]:
    """First 32 hex digits of the SHA-256 of each file's bytes, whatever its name."""

    def digest(file: RawFile) -> str:
        sha = hashlib.sha256()
        with reading(file), open_raw(file.path) as stream:
            while chunk := stream.read(_CHUNK_BYTES):
                sha.update(chunk)
        return sha.hexdigest()[:32]

    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(digest, files))


def fingerprint(files: Sequence[RawFile]) -> str:
    """First 32 hex digits of a SHA-256 over the names and contents of files."""
    whole = hashlib.sha256()
    for file, content in zip(files, digests(files), strict=True):
        whole.update(f"{file.name}\0{content}".encode())
    return whole.hexdigest()[:32]


def open_raw(path: str) -> pa.NativeFile:
    """The file's bytes as stored, seekable."""
    if "://" in path:
        filesystem, inner = fs.FileSystem.from_uri(path)
        return filesystem.open_input_file(inner)
    return fs.LocalFileSystem().open_input_file(path)


def head(file: RawFile, size: int = MAX_ROW_BYTES + 1) -> bytes:
    """The first `size` bytes of a file's content. Raises GraftrecError for a compression that the name hides."""
    with reading(file), open_content(file) as stream:
        data: bytes = stream.read(size)
    hidden = next((name for magic, name in _MAGIC.items() if data.startswith(magic)), None)
    if hidden:
        raise GraftrecError(f"{file.name}: expected text, found {hidden} data; unpack it, or name its format")
    if b"\r" in data.rstrip(b"\r") and b"\n" not in data:
        raise GraftrecError(
            f"{file.name}: expected lines that end with LF or CR LF, found CR alone; convert it: tr '\\r' '\\n'"
        )
    return data


def mentions(file: RawFile, text: str) -> bool:
    """Whether `text` stands anywhere in a file's content."""
    wanted, kept = text.encode(), b""
    with reading(file), open_content(file) as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            if wanted in kept + chunk:
                return True
            kept = chunk[-len(wanted) :]
    return False


def ranges(file: RawFile, range_bytes: int) -> list[tuple[int, int]]:
    """(start, end) byte ranges that cover a file; one range where it is compressed."""
    if file.compression is not None:
        return [(0, END)]
    cuts = list(range(0, max(file.size, 1), range_bytes))
    return list(zip(cuts, [*cuts[1:], max(file.size, 1)], strict=True))


def count_line_ends(file: RawFile, start: int, end: int) -> int:
    """Line ends in [start - 1, end - 1): summed over the ranges before a range they give its first line's number."""
    count, at, stop = 0, max(start - 1, 0), end - 1
    with reading(file), open_raw(file.path) as stream:
        stream.seek(at)
        while at < stop and (chunk := stream.read(min(_CHUNK_BYTES, stop - at))):
            count += chunk.count(b"\n")
            at += len(chunk)
    return count


def read_blocks(file: RawFile, start: int, end: int, line_ends_before: int) -> Iterator[Block]:
    """The lines that begin in [start, end) as blocks of whole lines; `line_ends_before` as count_line_ends sums it.

    Memory stays within a few blocks whatever the lines' lengths. Raises GraftrecError for a damaged file.
    """
    with reading(file), open_content(file) as stream:
        line = 1
        at = 0  # offset of buffer[0], which begins a line
        buffer = b""
        if start > 0:
            stream.seek(start - 1)
            skipped, buffer = _skip_line(stream)
            at = start - 1 + skipped
            line = line_ends_before + 2
            if at >= end:
                return
        while True:
            wanted = min(_CHUNK_BYTES, max(end - at - len(buffer), 1 << 16))
            chunk = stream.read(wanted)
            buffer += chunk
            last = buffer.find(b"\n", max(end - 1 - at, 0)) if at + len(buffer) >= end else -1
            if last >= 0 or not chunk:
                if buffer:
                    yield Block(buffer[: last + 1] if last >= 0 else buffer, line)
                return
            if cut := buffer.rfind(b"\n") + 1:
                yield Block(buffer[:cut], line)
                line += buffer.count(b"\n", 0, cut)
                at, buffer = at + cut, buffer[cut:]
            if len(buffer) > MAX_ROW_BYTES:
                yield Block(buffer[: 1 << 14], line, too_long=True)
                skipped, rest = _skip_line(stream)
                line, at, buffer = line + 1, at + len(buffer) + skipped, rest
                if at >= end:
                    return


def _skip_line(stream: pa.NativeFile | IO[bytes]) -> tuple[int, bytes]:
    """Bytes up to and with the next line end, and what was read past it."""
    skipped = 0
    while chunk := stream.read(1 << 16):
        cut = chunk.find(b"\n") + 1
        if cut:
            return skipped + cut, chunk[cut:]
        skipped += len(chunk)
    return skipped, b""


def open_content(file: RawFile) -> pa.NativeFile | IO[bytes]:
    """The file's content, unpacked."""
    raw = open_raw(file.path)
    if file.member is not None:
        return zipfile.ZipFile(raw).open(file.member)
    return pa.CompressedInputStream(raw, file.compression) if file.compression else raw


def check_columns(wanted: Sequence[str | int], names: Sequence[str], *, name: str) -> list[str]:
    """The names of the wanted columns. Raises GraftrecError for one that isn't there."""
    found = []
    for column in wanted:
        if isinstance(column, int) and 0 <= column < len(names):
            found.append(names[column])
        elif column in names:
            found.append(str(column))
        else:
            raise GraftrecError(
                f"{name}: expected a column {column!r}; found columns: {', '.join(names)}; mend the name"
            )
    return found


class reading:
    """Turns a file that can't be read to its end into one line that names it."""

    def __init__(self, file: RawFile) -> None:
        self.file = file

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, _UNREADABLE):
            what = f"a whole {self.file.compression} file" if self.file.compression else "a readable file"
            reason = one_line(error)
            raise GraftrecError(f"{self.file.name}: expected {what}, found: {reason}; deliver it again") from None


def _locate(root: str, path: str) -> tuple[fs.FileSystem, str, str]:
    """File system, path on it, and what to put before such a path to open it again."""
    whole = path if "://" in path or path.startswith("/") else (root.rstrip("/") + "/" + path if path else root)
    if "://" in whole:
        scheme = whole.split("://")[0]
        filesystem, inner = fs.FileSystem.from_uri(whole)
        return filesystem, inner, f"{scheme}://"
    return fs.LocalFileSystem(), os.path.abspath(os.path.expanduser(whole)), ""


def _listing(filesystem: fs.FileSystem, folder: str) -> list[fs.FileInfo]:
    selector = fs.FileSelector(folder, allow_not_found=True, recursive=True)
    return [info for info in filesystem.get_file_info(selector) if info.type == fs.FileType.File]


def is_hidden(inner: str) -> bool:
    return any(part.startswith((".", "_")) for part in inner.split("/") if part)


def glob_pattern(pattern: str) -> str:
    """A regular expression for a glob: ``**/`` any folders, ``*`` and ``?`` within a name."""
    words = re.split(r"(\*\*/|\*|\?|\[[^\]]+\])", pattern)
    known = {"**/": "(?:.*/)?", "*": "[^/]*", "?": "[^/]"}
    return "".join(known.get(w, w.replace("[!", "[^") if w.startswith("[") else re.escape(w)) for w in words)


def _suffix(path: str) -> str:
    return PurePosixPath(path).suffix.lower()


def _nearby(root: str) -> str:
    filesystem, base, _ = _locate(root, "")
    if filesystem.get_file_info(base).type != fs.FileType.Directory:
        return f"the root {base} is no folder: set source.root"
    names = sorted(info.path[len(base) :].lstrip("/") for info in _listing(filesystem, base))
    shown = ", ".join(names[:8]) + (", …" if len(names) > 8 else "")
    return f"files under {base}: {shown or 'none'}"
