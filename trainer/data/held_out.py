"""Users of a pinned release with what they hold out, in *rows* of one catalogue.

Rows below FIRST_INDEX are reserved and never candidates. Shape letters: ``U`` users, ``R`` held-out items of a user
(ragged, padded by -1), ``N`` negatives of a user (ragged, padded by -1).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from etl import tables
from etl.settings import ConfigError
from etl.tables import SEP, UNK
from trainer.arrays import IntArray
from trainer.data.baskets import open_dataset
from trainer.data.catalogue import Catalogue
from trainer.data.cold_items import COLD, WARM, BoolArray, candidate_sets
from trainer.data.events import Events, sampled
from trainer.data.release import DataError, Release, TableFile, blamed, open_parquet
from trainer.data.sequences import SequenceDataset, Sequences, together

Part = Literal["validation", "test"]

FULL = "full"  # the protocol that ranks among every item, and needs no negatives
WITHOUT_NEGATIVES = (FULL, COLD, WARM)


@dataclass(frozen=True)
class HeldOut:
    """The examples, one a user: input, held-out items, and negatives by protocol. Users ascend."""

    users: IntArray  # [U] global index
    histories: Events  # the input, in rows
    targets: IntArray  # [U, R] rows, -1 padded
    negatives: dict[str, IntArray]  # protocol -> [U, N] rows, -1 padded
    protocols: tuple[str, ...]
    num_rows: int  # V
    training_items: IntArray  # [U] length of the training part
    first_time: IntArray  # [U] time of the first held-out item; empty where there are no times, or they were not read
    table: str = tables.SEQUENCES.name  # that they are of
    repeats: bool = False  # what is in the input is a candidate too, for it may be had again
    # [V] rows that the log has before the part ends, the only candidates of a split by time; None: all
    candidates: npt.NDArray[np.bool_] | None = None
    # Of a split with cold items: protocol (cold, warm) -> [V] the rows that it ranks, held-out ones among them.
    sets: Mapping[str, BoolArray] = field(default_factory=dict)
    num_repeats: int = 0  # held-out items left out, for the users had had them (see `without_repeats`)
    # [U] value of the first held-out event, NaN: none; empty where they were not read
    first_value: npt.NDArray[np.float32] = field(default_factory=lambda: np.empty(0, np.float32))
    # [U, R] kinds of the held-out events (places among those distinguished, 0 for none); empty where they were not read
    event_types: npt.NDArray[np.int8] = field(default_factory=lambda: np.empty((0, 0), np.int8))

    def __len__(self) -> int:
        return len(self.users)

    def take(self, rows: IntArray) -> "HeldOut":
        """Some of the users (ascending), e.g. those of one process."""
        return replace(
            self,
            users=self.users[rows],
            histories=self.histories.take(rows),
            targets=self.targets[rows],
            negatives={protocol: items[rows] for protocol, items in self.negatives.items()},
            training_items=self.training_items[rows],
            first_time=self.first_time[rows] if len(self.first_time) else self.first_time,
            first_value=self.first_value[rows] if len(self.first_value) else self.first_value,
            event_types=self.event_types[rows] if len(self.event_types) else self.event_types,
        )


@dataclass(frozen=True)
class ReadOptions:
    """What is read of users who hold something out, and of how many of them."""

    protocols: Sequence[str] = (FULL,)  # whose negatives are read
    table: str = tables.SEQUENCES.name  # of `baskets` the next basket is held out, which is ranked in full only
    repeats: bool = False  # what the user has had is ranked too
    times: bool = False  # read, which baselines over several domains need
    values: bool = False  # the first held-out event's is read
    event_types: Sequence[str] = ()  # distinguished in the input and of held-out events (see SequenceDataset)
    # Only about so many users, the same ones for every model and run (chosen by a hash of their index), so that memory
    # is bounded whatever the table's size. None: all.
    max_users: int | None = None


def read_held_out(
    release: Release,
    split: str,
    domain: str,
    catalogue: Catalogue,
    part: Part,
    options: ReadOptions = ReadOptions(),
) -> HeldOut:
    """The users who hold out something in `part`, with input and targets as rows of `catalogue`.

    Input at validation: the training part; at test: training part and validation items. Raises DataError: no such split
    or domain, no user that holds out, no negatives for a protocol, or held-out items that the catalogue lacks (it must
    be of the same release and domain).
    """
    protocols, types = options.protocols, options.event_types
    dataset = open_dataset(options.table, release, split, domain, values=options.values, event_types=types)
    sets = candidate_sets(release, split, catalogue, part)
    _check_protocols(protocols, split, release)
    if not dataset.has_negatives and (drawn := [protocol for protocol in protocols if protocol != FULL]):
        raise ConfigError(
            f"evaluation.protocols: baskets are ranked in full only, for fixed negatives are never what a user has "
            f"had, found {', '.join(drawn)}; set it to [{FULL}]"
        )
    share = 1.0 if options.max_users is None else options.max_users / max(dataset.num_rows, 1)

    def holds_out(sequences: Sequences) -> npt.NDArray[np.bool_]:
        start, stop = _bounds(sequences, part)
        return (stop > start) & sampled(sequences.users, share)

    examples = read_users(dataset, holds_out, times=options.times)
    if examples is None:
        raise DataError(
            f"no user of split {split!r} and domain {domain!r} holds out {dataset.held_out} for {part} in release "
            f"{release.number} of {release.lake}; {dataset.advice}"
        )
    start, stop = _bounds(examples, part)
    rows = catalogue.rows(examples.items).astype(np.int64)
    position, owner = examples.positions, examples.owners
    is_target = (position >= start[owner]) & (position < stop[owner]) & (rows != SEP)
    if (unknown := int((rows[is_target] == UNK).sum())) > 0:
        raise DataError(
            f"expected a catalogue of domain {domain!r} in release {release.number}, found one that lacks {unknown:,} "
            f"of {int(is_target.sum()):,} held-out items; read the catalogue from the same release and domain"
        )
    targets = np.full((len(examples), int((stop - start).max())), -1, dtype=np.int64)
    targets[owner[is_target], (position - start[owner])[is_target]] = rows[is_target]
    if COLD in protocols and not sets[COLD][targets[targets >= 0]].any():
        raise DataError(
            f"expected users of split {split!r} and domain {domain!r} to hold out items that are cold for {part}, "
            f"found none in release {release.number} of {release.lake}; raise splits.{split}.cold_items."
            f"{'share' if part == 'test' else 'validation'}, or take another seed"
        )
    kinds = np.empty((0, 0), np.int8)
    if len(examples.event_types):
        kinds = np.zeros(targets.shape, np.int8)
        kinds[owner[is_target], (position - start[owner])[is_target]] = examples.event_types[is_target]
    # A split with cold items has other items in the validation part than in the test part, and none of them is input.
    histories = examples.with_columns(items=rows).until(examples.valid_start if sets else start)
    first = examples.offsets[:-1] + start
    first_time = examples.times[first] if len(examples.times) else examples.times
    if len(first_time):  # a user's request is made when the first held-out event was
        histories = replace(histories, request_times=first_time)
    return HeldOut(
        examples.users,
        histories,
        targets,
        {
            p: _read_negatives(release, split, domain, catalogue, part, p, examples.users)
            for p in protocols
            if p not in WITHOUT_NEGATIVES
        },
        tuple(protocols),
        len(catalogue),
        np.bincount(owner[(position < examples.valid_start[owner]) & (rows != SEP)], minlength=len(examples)),
        first_time,
        options.table,
        options.repeats,
        _until(dataset, catalogue, part) if split in release.by_time else None,
        {protocol: sets[protocol] for protocol in protocols if protocol in sets},
        0,
        examples.values[first] if len(examples.values) else examples.values,
        kinds,
    )


def _check_protocols(protocols: Sequence[str], split: str, release: Release) -> None:
    """Raises ConfigError for a protocol that a split can't be ranked by."""
    has_cold = split in release.cold_items
    wrong = [p for p in protocols if (p not in WITHOUT_NEGATIVES if has_cold else p in (COLD, WARM))]
    if wrong:
        expected = ", ".join(WITHOUT_NEGATIVES) if has_cold else "full, or one of fixed negatives,"
        why = "its negatives would all be warm" if has_cold else "it has no cold items (etl.splits.cold_items)"
        raise ConfigError(
            f"evaluation.protocols: expected {expected} of split {split!r}, found {', '.join(wrong)}; {why}, take "
            "another protocol or split"
        )


def without_repeats(held_out: HeldOut, *, where: str) -> HeldOut:
    """Without held-out items that are in the user's input, unless `repeats`: they are no candidates, so nothing could
    rank them. Users who hold out no others are left out. Raises DataError where that is everyone. `where`: of what.
    """
    if held_out.repeats:
        return held_out
    targets, given = held_out.targets, held_out.histories
    had = np.unique(np.repeat(np.arange(len(given)), given.lengths) * held_out.num_rows + given.items)
    again = np.isin(np.arange(len(targets))[:, None] * held_out.num_rows + targets, had) & (targets >= 0)
    if not again.any():
        return held_out
    left = np.where(again, -1, targets)
    rankable = np.flatnonzero((left >= 0).any(1))
    if not len(rankable):
        raise DataError(
            f"expected held-out items of {where} that are new to their users, found none among {int(again.sum()):,} "
            f"items of {len(targets):,} users, so nothing can be ranked; set evaluation.repeats=true to rank what they "
            "had before"
        )
    return replace(held_out, targets=left, num_repeats=int(again.sum())).take(rankable)


def _until(dataset: SequenceDataset, catalogue: Catalogue, part: Part) -> npt.NDArray[np.bool_]:
    """[V] rows that are in anyone's sequence before `part` ends."""
    found = np.zeros(len(catalogue), bool)
    for group in range(len(dataset.groups)):
        sequences = dataset.read([group])
        is_before = sequences.positions < _bounds(sequences, part)[1][sequences.owners]
        found[catalogue.rows(sequences.items[is_before])] = True
    return found


def _bounds(sequences: Sequences, part: Part) -> tuple[IntArray, IntArray]:
    """First and last-but-one position of what `part` holds out."""
    if part == "validation":
        return sequences.valid_start, sequences.test_start
    return sequences.test_start, sequences.end


def num_evaluated(release: Release, split: str, domain: str, part: Part) -> int:
    """Users of a domain that hold out items in `part`."""
    wanted = {"split": split, "domain": domain}
    bounds = release.read(tables.SEQUENCES, ["valid_start", "test_start", "end"], wanted)
    first, last = ("valid_start", "test_start") if part == "validation" else ("test_start", "end")
    return int(pc.sum(pc.less(bounds[first], bounds[last])).as_py() or 0)


def read_users(
    dataset: SequenceDataset, wanted: Callable[[Sequences], npt.NDArray[np.bool_]], *, times: bool = False
) -> Sequences | None:
    """The sequences that `wanted` flags, by user index; None where there are none.

    Row groups are read one at a time, so that of what is left out only one group is ever in memory.
    """
    kept = []
    for group in range(len(dataset.groups)):
        sequences = dataset.read([group], times=times)
        kept.append(sequences.take(np.flatnonzero(wanted(sequences))))
    if not sum(map(len, kept)):
        return None
    found = together(kept)
    return found.take(np.argsort(found.users, kind="stable"))


def _read_negatives(
    release: Release, split: str, domain: str, catalogue: Catalogue, part: Part, protocol: str, users: IntArray
) -> IntArray:
    """Fixed negatives [U, N] of `users` (ascending), as rows; -1 padded. What k-core no longer keeps is left out."""
    owners, counts, items = [], [], []
    for rows_read in _negatives_of(release.files(tables.NEGATIVES, {"split": split, "domain": domain}), protocol, part):
        lists = rows_read["items"].combine_chunks()
        owners.append(rows_read["user"].to_numpy().astype(np.int64))
        counts.append(np.diff(lists.offsets.to_numpy()).astype(np.int64))
        items.append(lists.flatten().to_numpy(zero_copy_only=False))
    owner = np.concatenate([np.empty(0, np.int64), *owners])
    lengths = np.concatenate([np.empty(0, np.int64), *counts])
    place = np.searchsorted(users, owner)
    examples = (place < len(users)) & (users[np.minimum(place, len(users) - 1)] == owner)
    if missing := len(users) - len(np.unique(owner[examples])):
        raise DataError(
            f"expected negatives of protocol {protocol!r} for {len(users):,} users of split {split!r}, domain "
            f"{domain!r}, part {part}, found none for {missing:,} in release {release.number} of {release.lake}; add "
            "it to negatives.protocols of the etl's configuration, or take it out of evaluation.protocols"
        )
    rows = catalogue.rows(np.concatenate([np.empty(0, np.int32), *items])).astype(np.int64)
    position = np.arange(len(rows)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    of_asked = np.repeat(examples, lengths)
    negatives = np.full((len(users), int(lengths[examples].max(initial=0))), -1, dtype=np.int64)
    negatives[np.repeat(place, lengths)[of_asked], position[of_asked]] = np.where(rows == UNK, -1, rows)[of_asked]
    return negatives


def _negatives_of(files: Sequence[TableFile], protocol: str, part: Part) -> Iterator[pa.Table]:
    """Users and items of one protocol and part, row group by row group; those without either are not read.

    The filter is not pushed into the scan: files that delta-rs rewrites hold string views, which Arrow can't filter.
    """
    wanted = {"protocol": protocol, "part": part}
    for file in files:
        with blamed(file), open_parquet(file) as parquet:
            place = {name: parquet.schema.names.index(name) for name in wanted}
            for group in range(parquet.num_row_groups):
                known = {name: parquet.metadata.row_group(group).column(place[name]).statistics for name in wanted}
                ranges = [(each, wanted[name]) for name, each in known.items() if each is not None and each.has_min_max]
                if all(each.min <= value <= each.max for each, value in ranges):
                    table = parquet.read_row_group(group, columns=[*wanted, "user", "items"], use_threads=False)
                    flags = [pc.equal(table[name].cast(pa.string()), value) for name, value in wanted.items()]
                    yield table.select(["user", "items"]).filter(pc.and_(*flags))
