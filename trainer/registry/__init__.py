"""Registered model versions, their aliases, and the lock that promoters take."""

from trainer.registry.promotion import Promotion
from trainer.registry.promotion_lock import LEASE_SECONDS
from trainer.registry.version import (
    AUDIT_CHARACTERS,
    CANDIDATE,
    CHAMPION,
    COMPANION,
    FRIENDS,
    PREVIOUS,
    TAG_DOMAIN,
    TAG_FAMILY,
    TAG_HASH,
    TAG_KIND,
    TAG_PARENT,
    Version,
    audit_trail,
)
from trainer.registry.versions import Registry, rename_hash

__all__ = [
    "AUDIT_CHARACTERS",
    "CANDIDATE",
    "CHAMPION",
    "COMPANION",
    "FRIENDS",
    "LEASE_SECONDS",
    "PREVIOUS",
    "TAG_DOMAIN",
    "TAG_FAMILY",
    "TAG_HASH",
    "TAG_KIND",
    "TAG_PARENT",
    "Promotion",
    "Registry",
    "Version",
    "audit_trail",
    "rename_hash",
]
