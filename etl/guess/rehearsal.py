"""The first rows of a log read as a configuration says, without an engine."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pydantic

from etl.config import CleaningConfig, LogSource
from etl.settings import GraftrecError
from etl.sources.log import FileLog

Pair = tuple[str, str]


@dataclass(frozen=True)
class Rehearsal:
    """`rows` read, how many were rejected for which reason, and the good ones' users and items; `refused`: why no row
    can be read at all."""

    rows: int
    reasons: Counter[str]
    pairs: list[Pair] = field(default_factory=list)
    refused: str | None = None


def rehearse(source: dict[str, Any]) -> Rehearsal:
    """Read the first block of a few files of the log that the settings describe."""
    try:
        log = FileLog(LogSource.model_validate(source), CleaningConfig())
        table = log.first_events()
    except GraftrecError as error:
        return Rehearsal(0, Counter(), refused=str(error))
    except pydantic.ValidationError as error:
        return Rehearsal(0, Counter(), refused=str(error.errors()[0]["msg"]))
    reasons: Counter[str] = Counter()
    for row in table.filter(table.column("reason").is_valid()).to_pylist():
        where = f" (first in {row['file']} line {row['line']})"
        name = next((one for one in reasons if one.startswith(row["reason"] + " (")), row["reason"] + where)
        reasons[name] += 1
    good = table.filter(table.column("reason").is_null())
    pairs = list(zip(good.column("user").to_pylist(), good.column("item").to_pylist(), strict=True))
    return Rehearsal(table.num_rows, reasons, pairs)


def kept_by_core(pairs: list[Pair], least: int) -> bool:
    """Whether users and items remain that have at least so many events each."""
    while pairs:
        users, items = Counter(user for user, _ in pairs), Counter(item for _, item in pairs)
        kept = [(user, item) for user, item in pairs if users[user] >= least and items[item] >= least]
        if len(kept) == len(pairs):
            return True
        pairs = kept
    return False
