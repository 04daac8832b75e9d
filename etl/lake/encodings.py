"""What the vectors of the table `features` were made by and from, as its commits record it. Needs no Spark."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from etl.lake.snapshots import last_commit
from etl.tables import FEATURES


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """What the vectors of one partition of FEATURES were made by, and from.

    `split`: whose training part was read; "" where no interaction was. `weights`: SHA-256 of the encoder's weights, ""
    for none. `template`: of the text, "" for none. `inputs`: the version of each table that was read.
    """

    kind: str
    encoder: str
    split: str = ""
    width: int
    weights: str = ""
    template: str = ""
    inputs: Mapping[str, int] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """As messages and applications name it, e.g. "item/minilm"."""
        return "/".join(filter(None, (self.kind, self.encoder, self.split)))

    @property
    def partition(self) -> dict[str, list[str | None]]:
        return {"kind": [self.kind], "encoder": [self.encoder], "split": [self.split or None]}


def encodings(lake: str, version: int | None = None) -> dict[str, Encoding]:
    """Name -> Encoding of all that FEATURES holds at `version` (None: now); {} where there is no such table."""
    recorded = json.loads(last_commit(lake, FEATURES, version).get("encodings", "[]"))
    return {found.name: found for found in (Encoding(**entry) for entry in recorded)}


def recorded(encodings: Mapping[str, Encoding]) -> str:
    """As a commit's metadata has them under `encodings`."""
    return json.dumps([asdict(encodings[name]) for name in sorted(encodings)])
