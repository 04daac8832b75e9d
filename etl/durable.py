"""What a power loss must not take: `sync` waits until a file or a folder is on the disk."""

import os
from pathlib import Path


def sync(path: Path) -> None:
    """Of a folder: its entries, not what is in them."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
