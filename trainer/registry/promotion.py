"""How the champion changes, under the promotion lock."""

from typing import TYPE_CHECKING

from trainer.registry.version import CHAMPION, PREVIOUS

if TYPE_CHECKING:
    from trainer.registry.promotion_lock import ServerLock
    from trainer.registry.versions import Registry


class Promotion:
    """What the holder of the promotion lock may do. It makes sure that the lock is still held before every write."""

    def __init__(self, registry: "Registry", lock: "ServerLock | None") -> None:
        self._registry, self._lock = registry, lock

    def move(self, alias: str, number: int | None) -> None:
        """Set an alias to a version, or remove it."""
        if self._lock is not None:
            self._lock.check()
        if number is None:
            self._registry.drop_alias(alias)
        else:
            self._registry.set_alias(alias, number)

    def crown(self, number: int) -> int | None:
        """Make a version the champion and the old one `previous`; returns the old one's number.

        `previous` moves first: a promoter that dies in between leaves the old champion serving.
        """
        old = self._registry.find(CHAMPION)
        if old is not None and old.number == number:
            return None
        if old is not None:
            self.move(PREVIOUS, old.number)
        self.move(CHAMPION, number)
        return None if old is None else old.number
