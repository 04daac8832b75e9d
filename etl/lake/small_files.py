"""Small files beside a lake's tables, on disks and in object stores alike: whole, or not there."""

import os
import uuid
from pathlib import Path

import pyarrow as pa
import pyarrow.fs as pafs

from etl.durable import sync
from etl.lake.snapshots import LakeError, lake_filesystem, local_path, make_folder
from etl.lake.store_errors import store_problem
from etl.redaction import one_line


def read_file(lake: str, name: str) -> bytes | None:
    """The content of the file `name` of a lake, None where there is none. Raises LakeError."""
    try:
        with lake_filesystem(lake).open_input_file(name) as file:
            return bytes(file.read())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise LakeError(store_problem(lake, error) or f"{lake}/{name}: can't be read ({one_line(error)})") from None


def write_file(lake: str, name: str, content: bytes, *, mode: int = 0o666) -> None:
    """Write the file `name` (of no folder, or of one) in the place of any old one. Raises LakeError."""
    folder = local_path(lake)
    try:
        if folder is None:
            raw = lake_filesystem(lake).open_output_stream(name)
            # Through a buffer that takes all of it: what is written past one deltalake's stream refuses.
            with pa.BufferedOutputStream(raw, len(content) + 1) as file:
                file.write(content)
            return
        path = folder / name
        make_folder(path.parent)
        new = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.new")
        handle = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        sync(new)
        new.replace(path)
        sync(path.parent)
    except OSError as error:
        raise LakeError(
            store_problem(lake, error) or f"{lake}/{name}: can't be written ({one_line(error)}); mend that"
        ) from None


def delete_file(lake: str, name: str) -> None:
    """Delete the file `name` of a lake, if it is there. Raises LakeError."""
    try:
        lake_filesystem(lake).delete_file(name)
    except FileNotFoundError:
        return
    except OSError as error:
        raise LakeError(
            store_problem(lake, error) or f"{lake}/{name}: can't be deleted ({one_line(error)}); mend that"
        ) from None


def bytes_under(lake: str, folder: str = "") -> int:
    """Of all files of a lake below `folder`."""
    root = local_path(lake)
    if root is not None:
        return sum(_size(Path(where) / name) for where, _, names in os.walk(root / folder) for name in names)
    listed = lake_filesystem(lake).get_file_info(pafs.FileSelector(folder, recursive=True, allow_not_found=True))
    return sum(info.size or 0 for info in listed if info.type == pafs.FileType.File)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
