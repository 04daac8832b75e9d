"""Scores that other software gave, as rows beside our models: `python -m trainer evaluate --ranks FILE`.

A file is Parquet with the columns `user`, `item` (raw ids, text or whole numbers) and `score` (higher is better), and
optionally `label` and `seed`. An item without a score can't be found: a list shorter than k counts as what it holds.
Ties count against the held-out item, as everywhere. Users and items that the log doesn't know, duplicates, and scores
that are no finite numbers are refused by name; what is passed over is noted below the table.

Shape letters: ``U`` evaluated users, ``B`` users of a batch, ``R`` held-out items of a user, ``V`` rows of the
evaluated catalogue, ``N`` scores.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch import Tensor

from etl import tables
from etl.redaction import one_line
from etl.settings import ConfigError
from etl.tables import FIRST_INDEX
from etl.tables import Table as LakeTable
from trainer.arrays import IntArray
from trainer.data.events import Events
from trainer.evaluation.ranking_metrics import KS
from trainer.evaluation.scorers import EvaluationSet, Scorer
from trainer.inference.scorer import Scores

Flags = npt.NDArray[np.bool_]
SHOWN = 3  # names in a message


@dataclass(frozen=True)
class OutsideRanks:
    """A file, read and checked as far as that needs no log."""

    path: Path
    sha256: str
    scores: pa.Table  # user, item, label: text; score: float64; seed: int64, null where there is none

    @property
    def keys(self) -> list[tuple[str, int | None]]:
        """Label and seed of each row of the table that it makes."""
        pairs = self.scores.group_by(["label", "seed"], use_threads=False).aggregate([]).to_pylist()
        return [(pair["label"], pair["seed"]) for pair in pairs]


def read_ranks(place: str) -> OutsideRanks:
    """Raises ConfigError for what is no such file."""
    path = Path(place).expanduser()
    if not path.is_file():
        raise ConfigError(
            f"ranks: expected a Parquet file of user, item and score, found none at {place}; mend the path"
        )
    try:
        found = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise ConfigError(f"ranks: {place} can't be read as Parquet ({one_line(error)}); write it anew") from None
    if lacking := [name for name in ("user", "item", "score") if name not in found.column_names]:
        raise ConfigError(
            f"ranks: expected the columns user, item and score in {place}, found {', '.join(found.column_names)}; add "
            f"{', '.join(lacking)}"
        )
    if not len(found):
        raise ConfigError(f"ranks: expected scores in {place}, found no row")
    label = found["label"] if "label" in found.column_names else pa.array([path.stem] * len(found))
    seed = found["seed"] if "seed" in found.column_names else pa.nulls(len(found), pa.int64())
    columns = {name: _text(found[name], name, place) for name in ("user", "item")}
    columns |= {"label": _text(label, "label", place), "score": _numbers(found["score"], "score", pa.float64(), place)}
    scores = pa.table(columns | {"seed": _numbers(seed, "seed", pa.int64(), place)})
    for name in ("user", "item", "label", "score"):
        if nulls := scores[name].null_count:
            raise ConfigError(f"ranks: expected a {name} in each row of {place}, found none in {nulls:,}; fill them in")
    _check_finite(scores, place)
    _check_duplicates(scores, place)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return OutsideRanks(path, digest, scores)


def _text(column: Any, name: str, place: str) -> Any:
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if not (pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise ConfigError(
            f"ranks: expected {name} as raw ids, text or whole numbers, in {place}, found {kind}; write them as the "
            "log has them"
        )
    return column.cast(kind).cast(pa.string())


def _numbers(column: Any, name: str, wanted: pa.DataType, place: str) -> Any:
    kind = column.type
    if not (pa.types.is_integer(kind) or (pa.types.is_floating(kind) and pa.types.is_floating(wanted))):
        raise ConfigError(f"ranks: expected {name} as numbers ({wanted}) in {place}, found {kind}; write it so")
    return column.cast(wanted)


def _check_finite(scores: pa.Table, place: str) -> None:
    broken = scores.filter(pc.invert(pc.is_finite(scores["score"])))
    if len(broken):
        first = broken.slice(0, 1).to_pylist()[0]
        raise ConfigError(
            f"ranks: expected finite scores in {place}, found {len(broken):,} that are none, the first "
            f"{first['score']} of user {first['user']!r}, item {first['item']!r}; leave out what has no score"
        )


def _check_duplicates(scores: pa.Table, place: str) -> None:
    counted = scores.group_by(["label", "seed", "user", "item"]).aggregate([([], "count_all")])
    twice = counted.filter(pc.greater(counted["count_all"], 1))
    if len(twice):
        first = twice.slice(0, 1).to_pylist()[0]
        raise ConfigError(
            f"ranks: expected one score of each user and item in {place}, found several of {len(twice):,} pairs, e.g. "
            f"user {first['user']!r}, item {first['item']!r} of {first['label']!r}; leave one of each"
        )


# --- on examples ---------------------------------------------


@dataclass(frozen=True)
class Listed:
    """Scores of the evaluated users by one label and seed: user u's are places ``offsets[u]`` to ``offsets[u + 1]``."""

    offsets: IntArray  # [U + 1]
    rows: IntArray  # [N] of the catalogue
    scores: Tensor  # [N]

    def scores_of(self, places: IntArray, width: int) -> Scores:
        """Of some users, [B, V]; -inf where there is none."""
        lengths = np.diff(self.offsets)[places]
        first = np.cumsum(lengths) - lengths
        at = np.repeat(self.offsets[:-1][places] - first, lengths) + np.arange(int(lengths.sum()))
        owner, rows, values = (
            np.repeat(np.arange(len(places)), lengths),
            self.rows[at],
            self.scores[torch.from_numpy(at)],
        )

        def columns(start: int, stop: int) -> Tensor:
            block = torch.full((len(places), stop - start), -torch.inf, dtype=torch.float64)
            here = np.flatnonzero((rows >= start) & (rows < stop))
            block[torch.from_numpy(owner[here]), torch.from_numpy(rows[here] - start)] = values[torch.from_numpy(here)]
            return block

        return Scores(len(places), width, columns)


def outside_scorers(given: OutsideRanks, examples: EvaluationSet) -> list[Scorer]:
    """A row of the table for each label and seed of a file. Raises ConfigError for users or items that the log doesn't
    know, and where no evaluated user has a score."""
    scores, release = given.scores, examples.release
    _check_known(given, "user", tables.USERS, release.read(tables.USERS, ["user"])["user"])
    _check_known(given, "item", tables.ITEMS, release.read(tables.ITEMS, ["item"])["item"])
    places = pc.index_in(scores["user"], value_set=pa.array(examples.raw_users)).fill_null(-1).to_numpy()
    rows = (
        pc.index_in(scores["item"], value_set=pa.array(examples.catalogue.raw_ids, pa.string())).fill_null(0).to_numpy()
    )
    found = []
    for label, seed in given.keys:
        is_own = pc.equal(scores["label"], label)
        is_own = pc.and_(is_own, pc.is_null(scores["seed"]) if seed is None else pc.equal(scores["seed"], seed))
        own = np.flatnonzero(is_own.fill_null(False).to_numpy())
        is_read = (places[own] >= 0) & (rows[own] >= FIRST_INDEX)
        if not is_read.any():
            raise ConfigError(
                f"ranks: expected scores for users who hold something out in split {examples.split!r}, domain "
                f"{examples.domain!r}, part {examples.part}, found none of {label!r} in {given.path}; mend users, "
                "items, or the split"
            )
        read = own[is_read]
        read = read[np.lexsort((rows[read], places[read]))]
        lengths = np.bincount(places[read], minlength=len(examples.users))
        values = torch.from_numpy(scores["score"].to_numpy()[read].copy())
        listed = Listed(np.concatenate([[0], np.cumsum(lengths)]), rows[read].astype(np.int64), values)
        facts = {
            "ranks": str(given.path),
            "sha256": given.sha256,
            "notes": _notes(given, listed, examples, users=places[own], rows=rows[own], at=own),
        }
        found.append(_scorer(label, seed, listed, examples, facts))
    return found


def _scorer(label: str, seed: int | None, listed: Listed, examples: EvaluationSet, facts: dict[str, Any]) -> Scorer:
    width = len(examples.catalogue)

    def score(histories: Events) -> Scores:
        return listed.scores_of(np.searchsorted(examples.users, histories.users), width)

    return Scorer(
        label,
        seed,
        score,
        f"scores in {facts['ranks']}",
        is_model=True,
        facts=facts,
        listed=_has(listed, examples.held_out.targets, width),
    )


def _has(listed: Listed, rows_UN: IntArray, width: int) -> Flags:
    """[U, N] which of each user's rows have a score."""
    pairs = np.repeat(np.arange(len(listed.offsets) - 1), np.diff(listed.offsets)) * width + listed.rows
    wanted = np.arange(len(rows_UN))[:, None] * width + rows_UN
    found: Flags = np.isin(wanted, pairs) & (rows_UN >= 0)
    return found


def complete_protocols(scorers: Sequence[Scorer], examples: EvaluationSet) -> tuple[list[str], list[str]]:
    """The protocols under which files have a score of all that is ranked, or rank all; and notes on the others.

    A list of a model's best items says who stands first among all items, and not who would among some.
    """
    kept, notes = [], []
    for protocol in examples.held_out.protocols:
        if (share := min(_share_ranked(one, protocol, examples) for one in scorers)) == 1:
            kept.append(protocol)
            continue
        notes.append(f"{protocol} is left out: it ranks some items only, of which the files score {100 * share:.1f} %")
    return kept, notes


def _share_ranked(scorer: Scorer, protocol: str, examples: EvaluationSet) -> float:
    """The share of what a protocol ranks that has a score, of users who have any; 1 where all items are ranked."""
    held_out = examples.held_out
    scores = scorer.score(held_out.histories)
    num_known = num_wanted = 0
    wanted_UN = held_out.negatives.get(protocol)
    among_V = held_out.sets.get(protocol)
    if wanted_UN is None and among_V is None:
        return 1.0
    for start, block in scores.blocks(FIRST_INDEX):
        is_known = (block > -torch.inf).numpy()
        is_wanted = np.zeros_like(is_known)
        if wanted_UN is not None:
            both_UN = np.concatenate([wanted_UN, held_out.targets], axis=1)
            owner, column = np.nonzero((both_UN >= start) & (both_UN < start + block.shape[1]))
            is_wanted[owner, both_UN[owner, column] - start] = True
        else:
            assert among_V is not None
            is_wanted[:, among_V[start : start + block.shape[1]]] = True
        is_wanted &= is_known.any(1)[:, None]
        num_known += int((is_known & is_wanted).sum())
        num_wanted += int(is_wanted.sum())
    return num_known / max(num_wanted, 1)


def _check_known(given: OutsideRanks, name: str, table: LakeTable, known: pa.ChunkedArray) -> None:
    names = pc.unique(given.scores[name])
    strange = names.filter(pc.invert(pc.is_in(names, value_set=known)))
    if len(strange):
        raise ConfigError(
            f"ranks: expected {name}s of the log (table {table.name}, raw ids), found {len(strange):,} of "
            f"{len(names):,} in {given.path} that it doesn't know, e.g. {_some(strange)}; give raw ids, and leave out "
            f"other {name}s"
        )


def _each(events: Events) -> list[list[int]]:
    return [part.tolist() for part in np.split(events.items, events.offsets[1:-1])]


def _some(names: Any) -> str:
    return ", ".join(map(repr, names.slice(0, SHOWN).to_pylist()))


def _notes(
    given: OutsideRanks, listed: Listed, examples: EvaluationSet, *, users: IntArray, rows: IntArray, at: IntArray
) -> list[str]:
    """What a reader of the table must know of a file. `users`, `rows`, `at`: of each of its scores, the place of the
    evaluated user, the row, and the place in the file."""
    notes, held_out = [], examples.held_out
    lengths = np.diff(listed.offsets)
    if missing := np.flatnonzero(lengths == 0).tolist():
        some = ", ".join(repr(examples.raw_users[user]) for user in missing[:SHOWN])
        notes.append(
            f"{len(missing):,} of {len(lengths):,} evaluated users have no score (e.g. {some}): what they hold out "
            "counts as not found"
        )
    if others := len(pc.unique(given.scores["user"].take(pa.array(at[users < 0])))):
        notes.append(f"passed over: {others:,} users who hold nothing out here")
    strange = at[(users >= 0) & (rows < FIRST_INDEX)]
    if len(strange):
        names = pc.unique(given.scores["item"].take(pa.array(strange)))
        notes.append(
            f"passed over: {len(strange):,} scores of items that are no candidates in domain {examples.domain} (e.g. "
            f"{_some(names)})"
        )
    width = len(examples.catalogue)
    candidates, there = lengths.copy(), np.full(len(lengths), width - FIRST_INDEX)
    if not held_out.repeats:
        there -= np.array([len(set(items)) for items in _each(held_out.histories)])
        owner = np.repeat(np.arange(len(lengths)), lengths)
        pairs = held_out.histories.owners * width + held_out.histories.items
        is_seen = np.isin(owner * width + listed.rows, pairs)
        candidates -= np.bincount(owner[is_seen], minlength=len(lengths))
        if seen := int(is_seen.sum()):
            notes.append(f"passed over: {seen:,} scores of items in their users' input, as for every model")
    few = (candidates < np.minimum(max(KS), there)) & (lengths > 0)
    if few.any():
        notes.append(
            f"{int(few.sum()):,} users have scores of fewer than {max(KS)} candidates, the least "
            f"{int(candidates[few].min())}: a list counts as what it holds"
        )
    return notes
