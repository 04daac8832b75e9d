"""Plain names for local folders whose own path a library misreads.

Sail and MLflow take a path for a URI: `#` and `?` end it, `%20` becomes a space, a space or an accent isn't found. They
get a link to the folder instead, in a private temporary folder that ends with the process. `deltalake` misreads only
`%20` and the like, but follows a link and then decodes where it leads: it gets a folder that holds links.
"""

import atexit
import contextlib
import hashlib
import os
import re
import shutil
import tempfile
from pathlib import Path

_PLAIN = re.compile(r"[A-Za-z0-9_./-]*")
_folders: dict[int, Path] = {}  # process -> its folder of links


def absolute(place: str) -> str:
    """A local path or URI as it is known from every folder."""
    return place if "://" in place else os.path.abspath(place)


def is_plain(path: str | Path) -> bool:
    """Whether a path means the same to all libraries, as a path and as a URI."""
    return _PLAIN.fullmatch(str(path)) is not None


def plain_path(path: str | Path) -> str:
    """The absolute path of a local folder, which need not exist yet, or that of a link to it where it isn't plain."""
    whole = os.path.abspath(path)
    if is_plain(whole):
        return whole
    link = _links() / hashlib.blake2b(os.fsencode(whole), digest_size=12).hexdigest()
    if not link.is_symlink():
        unique = link.with_name(f"{link.name}-{os.urandom(4).hex()}")
        unique.symlink_to(whole)
        unique.replace(link)  # threads may race
    return str(link)


def delta_path(path: str) -> str:
    """The local path at which `deltalake` opens the table that lies at `path`, which need not exist yet."""
    if re.search("%[0-9A-Fa-f]{2}", os.path.realpath(path)) is None:
        return path
    os.makedirs(os.path.join(path, "_delta_log"), exist_ok=True)
    folder = Path(plain_path(os.path.realpath(path)) + ".links")
    folder.mkdir(exist_ok=True)
    for entry in os.scandir(path):
        with contextlib.suppress(FileExistsError):
            (folder / entry.name).symlink_to(os.path.abspath(entry.path))
    return str(folder)


def _links() -> Path:
    """This process's folder of links; a forked child has its own."""
    if os.getpid() not in _folders:
        places = [tempfile.gettempdir(), "/tmp", "/var/tmp"]
        base = next((place for place in places if is_plain(place) and os.access(place, os.W_OK)), None)
        folder = Path(tempfile.mkdtemp(prefix="graftrec-links-", dir=base))
        _folders[os.getpid()] = folder
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return _folders[os.getpid()]
