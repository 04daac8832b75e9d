"""What each process of a training run does, so that one which waits in vain can name the one that does not come.

A thread of each process posts its state to torchrun's store every second; no step waits for it. The same thread ends
the process where a collective neither returns nor raises (NCCL's).
"""

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from etl.redaction import one_line
from etl.settings import RunAgain

BEAT_SECONDS = 1.0
STORE_SECONDS = 5.0  # that the store has for an answer: whoever holds it may be what is lost
GRACE_SECONDS = 15.0  # that a collective has, beyond the timeout, to raise an error by itself


class RankLost(RunAgain):
    """Another process of this run ended, or did not come to a collective in time. The last checkpoint stands."""


class RankStates:
    """Posts this process's state, and reads those of all. `timeout_seconds`: how long a collective may take."""

    def __init__(self, rank: int, size: int, timeout_seconds: float) -> None:
        self.rank, self.size, self.timeout_seconds = rank, size, timeout_seconds
        self.where: Callable[[], str] = lambda: "at the start"
        self._waits: tuple[str, float] | None = None  # for what, since when
        self._computes_since = time.monotonic()
        self._beats, self._lost, self._ended = 0, False, threading.Event()
        place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        # A connection of its own: the process group's blocks while it waits.
        self._store: Any = dist.TCPStore(  # type: ignore[attr-defined]
            *place, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=STORE_SECONDS)
        )
        self._thread = threading.Thread(target=self._beat, name="rank states", daemon=True)
        self._thread.start()

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Mark that this process takes part in a collective. Raises RankLost where that fails."""
        outer, self._waits = self._waits, (what, time.monotonic())
        try:
            yield
        except RuntimeError as error:
            if not (isinstance(error, dist.DistError) or "gloo" in str(error)):
                raise
            raise RankLost(self.report(error)) from None
        finally:
            self._waits, self._computes_since = outer, time.monotonic()

    def close(self, error: BaseException | None) -> None:
        """Post how this process ended, and stop."""
        self._ended.set()
        self._thread.join(10)
        self._post({"ended": one_line(error) if error is not None else "done"})

    def report(self, error: BaseException | None) -> str:
        """Why this process stops, and the state of each. Takes some beats: who posts no more has stopped."""
        mine, before = self._mine(), self._read()
        time.sleep(2.5 * BEAT_SECONDS)
        states = [
            _told(mine if rank == self.rank else new, old, rank)
            for rank, (old, new) in enumerate(zip(before, self._read(), strict=True))
        ]
        what, since = self._waits or ("a collective", time.monotonic())
        waited = time.monotonic() - since - 2.5 * BEAT_SECONDS
        reason = (
            f"waited {waited:.0f} s for {what} (runtime.collective_seconds is {self.timeout_seconds:g}), which not all "
            f"of {self.size} processes came to"
            if error is None or waited >= self.timeout_seconds
            else f"{what} failed, since another of {self.size} processes is gone"
        )
        return f"{reason}. {'; '.join(states)}. The last checkpoint stands: run the same command to go on from it"

    def _mine(self) -> dict[str, Any]:
        what, since = self._waits or ("", self._computes_since)
        return {"beat": self._beats, "at": self.where(), "waits": what, "seconds": round(time.monotonic() - since)}

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            self._beats += 1
            self._post(self._mine())
            waits = self._waits
            if waits and time.monotonic() - waits[1] > self.timeout_seconds + GRACE_SECONDS:
                print(self.report(None), file=sys.stderr, flush=True)
                os._exit(RankLost.exit_code)

    def _post(self, state: dict[str, Any]) -> None:
        self._ask(lambda: self._store.set(_key(self.rank), json.dumps(state)))

    def _read(self) -> list[dict[str, Any]]:
        """The newest state of each process; {} where there is none to be had."""
        found: list[dict[str, Any]] = [{} for _ in range(self.size)]

        def read() -> None:
            for rank in range(self.size):
                if self._store.check([_key(rank)]):
                    found[rank] = json.loads(self._store.get(_key(rank)))

        self._ask(read)
        return found

    def _ask(self, question: Callable[[], None]) -> None:
        """Ask the store, in a thread that may be left behind: one that is stopped never answers, nor gives up."""
        if self._lost:
            return

        def ask() -> None:
            with suppress(RuntimeError):  # the store is gone: collectives will say so
                question()

        thread = threading.Thread(target=ask, daemon=True)
        thread.start()
        thread.join(STORE_SECONDS)
        self._lost = thread.is_alive()


def _key(rank: int) -> str:
    return f"graftrec/{rank}"


def _told(new: dict[str, Any], old: dict[str, Any], rank: int) -> str:
    if "ended" in new:
        return f"process {rank}: ended ({new['ended']})"
    if not new:
        return f"process {rank}: state unknown"
    doing = f"waits for {new['waits']}" if new["waits"] else "computes"
    text = f"process {rank}: {new['at']}, {doing} for {new['seconds']} s"
    return f"{text}, then gave no sign of life any more" if new == old else text
