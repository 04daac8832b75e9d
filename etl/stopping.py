"""How the process of a command is stopped by SIGINT or SIGTERM, and how it ends.

While it imports, a signal ends it at once; during the work, a signal raises KeyboardInterrupt; both end with STOPPED.
Libraries may turn the interrupt into an error of their own: `is_stopped` says that a signal was the cause.
This module imports nothing slow: a command calls `begin` before its other imports.
"""

import atexit
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

STOPPED = 143  # exit code of what a signal ended, SIGINT too
SIGNALS = (signal.SIGINT, signal.SIGTERM)
_code: int | None = None  # of the command that has ended
_signalled = False


def begin() -> None:
    """Let a signal end the process without a traceback, until `interruptible` says otherwise."""
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup, or the background of a shell script
            signal.signal(number, _stop_at_once)
    atexit.register(_end_at_once)  # the first registered is the last called


@contextmanager
def interruptible() -> Iterator[None]:
    """Let a signal raise KeyboardInterrupt in the main thread."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    if threading.current_thread() is not threading.main_thread() or None in before.values():
        yield
        return
    mine = [number for number in SIGNALS if before[number] != signal.SIG_IGN]
    try:
        for number in mine:
            signal.signal(number, _interrupt)
        yield
    finally:
        for number in mine:
            signal.signal(number, before[number])


def is_stopped() -> bool:
    """Whether a signal has interrupted the work: what fails after it fails because of it."""
    return _signalled


def leave(code: int) -> NoReturn:
    """End the process with `code`, without tearing the interpreter down.

    That takes seconds where many modules are loaded, and aborts where Sail's threads are still running Python code.
    """
    global _code
    _code = code
    sys.exit(code)


def _end_at_once() -> None:
    if _code is None:
        return  # --help, a mistake in the command line
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:
        return  # the interpreter says so
    os._exit(_code)


def _stop_at_once(number: int, frame: FrameType | None) -> None:
    os._exit(STOPPED)


def _interrupt(number: int, frame: FrameType | None) -> None:
    global _signalled
    _signalled = True
    # Threads, destructors and calls to engines fail because all is being stopped.
    threading.excepthook = lambda failure: None
    sys.unraisablehook = lambda failure: None
    if logging := sys.modules.get("logging"):
        logging.disable()
    raise KeyboardInterrupt
