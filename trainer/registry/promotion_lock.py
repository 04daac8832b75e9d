"""One promoter at a time: the lock, on a disk or on a server."""

import contextlib
import os
import re
import socket
import time
import uuid
from typing import Any

from trainer.tracking import TrackingError
from trainer.tracking.queue import warn

MAX_PAGES = 10_000  # of an answer
LEASE_SECONDS = 900.0  # after which another promoter may take over, where the store is a server


def all_pages(search: Any, wanted: str) -> list[Any]:
    """All that MLflow finds, page by page."""
    found: list[Any] = []
    token, seen = None, set[str]()
    while True:
        page = search(wanted, page_token=token)
        found += page
        token = page.token
        if not token:
            return found
        if token in seen or len(seen) > MAX_PAGES:
            raise TrackingError("MLflow's answer has no end: the page that it names as next was there already")
        seen.add(token)


def wait(acquire: Any, name: str, seconds: float) -> None:
    start, announced = time.monotonic(), False
    while not acquire():
        if time.monotonic() - start > seconds:
            raise TrackingError(f"another promoter of {name} is still at work after {seconds:.0f} s; try again later")
        if not announced:
            warn(f"another promoter of {name} is at work; waiting for it")
            announced = True
        time.sleep(0.2)


class ServerLock:
    """Registered models "<name>.promotion-lock.<n>": whoever makes number n + 1 holds the lock until it is released.

    Number n + 1 may be made when n is released or its lease ran out. The newest number is never deleted but by its
    maker, so a late maker of a number that was used before sees a larger one, and steps back.
    """

    def __init__(self, client: Any, name: str) -> None:
        self._client, self._prefix = client, f"{name}.promotion-lock."
        self._mine = 0
        self._owner = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"

    def acquire(self) -> bool:
        numbers = self._numbers()
        newest = max(numbers, default=0)
        if newest and not self._is_free(newest):
            return False
        tags = {"graftrec.owner": self._owner, "graftrec.until": f"{time.time() + LEASE_SECONDS:.0f}"}
        try:
            self._client.create_registered_model(f"{self._prefix}{newest + 1}", tags=tags)
        except Exception as error:
            if "RESOURCE_ALREADY_EXISTS" not in (getattr(error, "error_code", ""), str(error).split(":")[0]):
                raise
            if self._owner_of(newest + 1) != self._owner:  # else it was made, and only the answer was lost
                return False
        self._mine = newest + 1
        if max(self._numbers()) != self._mine:
            self._remove(self._mine)
            return False
        for number in numbers:
            if number < newest:
                self._remove(number)
        return True

    def check(self) -> None:
        """Renew the lease. Raises TrackingError where another promoter has taken over."""
        if max(self._numbers(), default=0) != self._mine:
            raise TrackingError(
                "this promotion took so long that another promoter took over; nothing was changed, run it again"
            )
        self._client.set_registered_model_tag(
            f"{self._prefix}{self._mine}", "graftrec.until", f"{time.time() + LEASE_SECONDS:.0f}"
        )

    def release(self) -> None:
        self._client.set_registered_model_tag(f"{self._prefix}{self._mine}", "graftrec.until", "0")

    def _numbers(self) -> list[int]:
        like = re.sub(r"[^a-zA-Z0-9 .-]", "_", self._prefix)
        found = all_pages(self._client.search_registered_models, f"name LIKE '{like}%'")
        numbers = [model.name.removeprefix(self._prefix) for model in found if model.name.startswith(self._prefix)]
        return [int(number) for number in numbers if re.fullmatch("[0-9]{1,15}", number)]

    def _is_free(self, number: int) -> bool:
        try:
            tags = self._client.get_registered_model(f"{self._prefix}{number}").tags
        except Exception:  # removed meanwhile: look again
            return False
        until = tags.get("graftrec.until", "")
        if not re.fullmatch("[0-9]{1,15}", until):
            raise TrackingError(
                f"expected when the lock {self._prefix}{number} ends in its tag graftrec.until, found {until[:40]!r}; "
                "delete that registered model once no promoter is at work"
            )
        return int(until) < time.time()

    def _owner_of(self, number: int) -> str:
        with contextlib.suppress(Exception):
            return str(self._client.get_registered_model(f"{self._prefix}{number}").tags.get("graftrec.owner", ""))
        return ""

    def _remove(self, number: int) -> None:
        with contextlib.suppress(Exception):
            self._client.delete_registered_model(f"{self._prefix}{number}")
