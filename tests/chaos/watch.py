"""Counts the changes of files in a folder (created, renamed, closed after writing, deleted), by Linux' inotify."""

import ctypes
import os
import select
import struct
import threading
from pathlib import Path

_CLOSE_WRITE, _MOVED_TO, _CREATE, _DELETE, _IS_DIR = 0x8, 0x80, 0x100, 0x200, 0x40000000
_HEADER = struct.Struct("iIII")


class Changes:
    """A context that counts until it is left; `reached` waits for a number of changes."""

    def __init__(self, folder: Path) -> None:
        self.count = 0
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._handle = self._libc.inotify_init1(os.O_NONBLOCK)
        self._folders: dict[int, str] = {}
        self._counted, self._left = threading.Condition(), False
        for path in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
            self._watch(str(path))
        self._thread = threading.Thread(target=self._work, daemon=True)

    def __enter__(self) -> "Changes":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._left = True
        self._thread.join()
        os.close(self._handle)

    def reached(self, number: int, timeout_seconds: float) -> bool:
        with self._counted:
            return self._counted.wait_for(lambda: self.count >= number, timeout_seconds)

    def _watch(self, folder: str) -> None:
        mask = _CLOSE_WRITE | _MOVED_TO | _CREATE | _DELETE
        number = self._libc.inotify_add_watch(self._handle, os.fsencode(folder), mask)
        if number >= 0:
            self._folders[number] = folder

    def _work(self) -> None:
        poll = select.poll()
        poll.register(self._handle, select.POLLIN)
        while not self._left:
            if not poll.poll(50):
                continue
            data = os.read(self._handle, 1 << 16)
            with self._counted:
                while data:
                    number, mask, _, length = _HEADER.unpack_from(data)
                    name = os.fsdecode(data[_HEADER.size : _HEADER.size + length].rstrip(b"\0"))
                    data = data[_HEADER.size + length :]
                    self.count += 1
                    if mask & _IS_DIR and mask & (_CREATE | _MOVED_TO) and number in self._folders:
                        self._watch(f"{self._folders[number]}/{name}")
                self._counted.notify_all()
