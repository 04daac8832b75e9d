"""A registered version: its aliases, its tags, and the audit trail that lies in them."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trainer import tracking
from trainer.trust.verified_files import parse_json

CANDIDATE, CHAMPION, PREVIOUS = "candidate", "champion", "previous"
COMPANION = "companion"  # for users of whom the champion, which reads its own domain, knows no item
FRIENDS = "friends"  # an attention over friends, for users of whom champion and companion know no item
TAG_HASH = tracking.MODEL_HASH  # of the model folder
TAG_PARENT = "graftrec.parent"  # hash of the model it was grafted on
TAG_KIND = "graftrec.kind"  # full | patch: what it has beside its parent, a version too | friends
TAG_DOMAIN = "graftrec.domain"  # whose items it predicts
TAG_FAMILY = "graftrec.family"  # its registered model is one of <family>-<domain>, one for each domain
AUDIT_CHARACTERS = 4_500  # of one tag; what is longer goes on in the next
_AUDIT = re.compile(r"graftrec\.audit(\.\d+)?")


@dataclass(frozen=True)
class Version:
    """One version of a registered model. `label` is what answers and tables say: "graftrec/3"."""

    name: str
    number: int
    aliases: tuple[str, ...]
    tags: dict[str, str]
    run_id: str  # of the run that trained it; "" where that is unknown
    description: str = ""

    @property
    def label(self) -> str:
        return f"{self.name}/{self.number}"

    @property
    def hash(self) -> str:
        return self.tags.get(TAG_HASH, "")


def audit_trail(version: Version) -> list[dict[str, Any]]:
    """What happened to a version (promoted, refused, replaced, rolled back, restored), oldest first. Raises
    TrackingError for a trail that is damaged."""
    parts = sum(_AUDIT.fullmatch(key) is not None for key in version.tags)
    return [entry for part in range(1, parts + 1) for entry in _entries(version, part, version.tags)]


def _entries(version: Version, part: int, tags: Mapping[str, str]) -> list[dict[str, Any]]:
    name = _audit_tag(part)
    try:
        found = parse_json(tags[name])
        if isinstance(found, list) and all(isinstance(entry, dict) for entry in found):
            return found
    except (ValueError, KeyError, TypeError):
        pass
    raise tracking.TrackingError(
        f"{version.label}: expected a list of JSON objects in the tag {name}, found another text, or none; restore the "
        "tag, or remove all that begin with graftrec.audit"
    )


def audit_tags(version: Version, entry: Mapping[str, Any]) -> dict[str, str]:
    """The tag that changes when an entry is added: JSON lists in the tags graftrec.audit, graftrec.audit.2… Raises
    TrackingError for a trail that is damaged."""
    trail = {key: value for key, value in version.tags.items() if _AUDIT.fullmatch(key)}
    part = max(len(trail), 1)
    entries = [*(_entries(version, part, trail) if trail else []), dict(entry)]
    if len(json.dumps(entries, ensure_ascii=False)) > AUDIT_CHARACTERS and len(entries) > 1:
        part, entries = part + 1, entries[-1:]
    return {_audit_tag(part): json.dumps(entries, ensure_ascii=False)}


def _audit_tag(part: int) -> str:
    return "graftrec.audit" if part == 1 else f"graftrec.audit.{part}"
