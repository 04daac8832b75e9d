"""Held-out users of a pinned release, and how a scorer ranks what they held out.

Early stopping, `evaluate` and `promote` all go through `read_held_out` and `rank`, so that a number means the same
wherever it is printed. Everything is in *rows* of one catalogue: rows below FIRST_INDEX are reserved and never
candidates.

Shape letters: ``U`` users, ``B`` users of a batch, ``V`` rows of the catalogue, ``R`` held-out items of a user (ragged,
padded by -1), ``N`` negatives of a user (ragged, padded by -1), ``P`` pairs of a user and a row.

Protocols: ``full`` ranks the held-out items among every item of the catalogue less those in the user's input;
``uniform-100``, ``popular-100`` and ``top-100`` rank them among themselves and the user's fixed negatives. Metrics are
named as in `trainer.evaluation.ranking_metrics`: bare names are of the convention ``list``, those of
``single`` begin with ``single/``, those of ``basket`` with ``basket/``.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor
from tqdm import tqdm

from etl import tables
from etl.settings import ConfigError
from etl.tables import FIRST_INDEX, SEP, UNK
from trainer.data.baskets import BasketDataset
from trainer.data.catalogue import Catalogue
from trainer.data.histories import Histories
from trainer.data.release import DataError, Release, TableFile, blamed, open_parquet
from trainer.data.sequences import SequenceDataset, Sequences
from trainer.evaluation.ranking_metrics import KS, Convention, FloatArray, metrics_from_ranks, place_targets
from trainer.inference.scorer import Scores

IntArray = npt.NDArray[np.int64]
Part = Literal["validation", "test"]
Score = Callable[[Histories], Scores]  # histories in rows -> [B, V]

FULL = "full"
SINGLE, BASKET = "single/", "basket/"  # prefixes of metrics of the conventions `single` and `basket`
CONVENTIONS: dict[str, Convention] = {SINGLE: "single", BASKET: "basket"}


@dataclass(frozen=True)
class HeldOut:
    """What is asked of a model for each user: input, held-out items, and negatives by protocol. Users ascend."""

    users: IntArray  # [U] global index
    histories: Histories  # the input, in rows
    targets: IntArray  # [U, R] rows, -1 padded
    negatives: dict[str, IntArray]  # protocol -> [U, N] rows, -1 padded
    protocols: tuple[str, ...]
    num_rows: int  # V
    training_items: IntArray  # [U] length of the training part
    first_time: IntArray  # [U] time of the first held-out item; empty where there are no times, or they were not read
    baskets: bool = False  # histories have a SEP behind each
    repeats: bool = False  # what is in the input is a candidate too, for it may be had again
    # [U] value of the first held-out event, NaN: none; empty where they were not read
    first_value: npt.NDArray[np.float32] = field(default_factory=lambda: np.empty(0, np.float32))
    # [U, R] kinds of the held-out events (places among those told apart, 0 for none); empty where they were not read
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


def read_held_out(
    release: Release,
    split: str,
    domain: str,
    catalogue: Catalogue,
    part: Part,
    protocols: Sequence[str] = (FULL,),
    *,
    times: bool = False,
    max_users: int | None = None,
    baskets: bool = False,
    repeats: bool = True,
    values: bool = False,
    event_types: Sequence[str] = (),
) -> HeldOut:
    """The users who hold out something in `part`, with input and targets as rows of `catalogue`.

    Input at validation: the training part; at test: training part and validation items. `times`: read times too, which
    baselines over several domains need. `max_users`: only about so many users, the same ones for every model and run
    (chosen by a hash of their index), so that memory is bounded whatever the table's size. `baskets`: the next basket
    is held out, of the table `baskets`; ranked in full only, with `repeats` among what the user has had, too.
    `values`: the first held-out event's is read. `event_types`: names of the kinds of event that are told apart, in the
    input and of held-out events (see SequenceDataset).
    Raises DataError: no such split or domain, no user that holds out, no negatives for a protocol, or held-out items
    that the catalogue lacks (it must be of the same release and domain).
    """
    if baskets and (drawn := [protocol for protocol in protocols if protocol != FULL]):
        raise ConfigError(
            f"evaluation.protocols: baskets are ranked in full only, for fixed negatives are never what a user has "
            f"had, found {', '.join(drawn)}; set it to [{FULL}]"
        )
    if baskets:
        dataset: SequenceDataset = BasketDataset(release, split, domain)
    else:
        dataset = SequenceDataset(release, split, domain, values=values, event_types=event_types)
    share = 1.0 if max_users is None else max_users / max(dataset.num_rows, 1)

    def holds_out(sequences: Sequences) -> npt.NDArray[np.bool_]:
        start, stop = _bounds(sequences, part)
        return (stop > start) & sampled(sequences.users, share)

    examples = read_users(dataset, holds_out, times=times)
    if examples is None:
        raise DataError(
            f"no user of split {split!r} and domain {domain!r} holds out {'a basket' if baskets else 'items'} for "
            f"{part} in release {release.number} of {release.lake}; "
            + (
                "give users of three baskets and more"
                if baskets
                else "shorten the split's hold-out, or give more interactions per user"
            )
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
    kinds = np.empty((0, 0), np.int8)
    if len(examples.event_types):
        kinds = np.zeros(targets.shape, np.int8)
        kinds[owner[is_target], (position - start[owner])[is_target]] = examples.event_types[is_target]
    histories = Histories(examples.users, examples.offsets, rows, examples.times, examples.event_types).until(start)
    first = examples.offsets[:-1] + start
    return HeldOut(
        examples.users,
        histories,
        targets,
        {
            p: _read_negatives(release, split, domain, catalogue, part, p, examples.users)
            for p in protocols
            if p != FULL
        },
        tuple(protocols),
        len(catalogue),
        np.bincount(owner[(position < examples.valid_start[owner]) & (rows != SEP)], minlength=len(examples)),
        examples.times[first] if len(examples.times) else examples.times,
        baskets,
        baskets and repeats,
        examples.values[first] if len(examples.values) else examples.values,
        kinds,
    )


def rank(
    score: Score,
    held_out: HeldOut,
    *,
    batch_size: int = 256,
    ks: Sequence[int] = KS,
    progress: bool = False,
) -> dict[str, dict[str, FloatArray]]:
    """Per-user metrics: protocol -> metric -> float64 [U], in the order of `held_out.users`. See `ranks`."""
    found = ranks(score, held_out, batch_size=batch_size, progress=progress)
    return {protocol: metrics_of(ranks_UR, ks=ks) for protocol, ranks_UR in found.items()}


def ranks(score: Score, held_out: HeldOut, *, batch_size: int = 256, progress: bool = False) -> dict[str, IntArray]:
    """Protocol -> ranks int64 [U, R] of the held-out items (see `trainer.evaluation.ranking_metrics.place_targets`).

    Users are batched by length, to spare padding. Memory: that of a batch and a block of its scores, beside the result,
    whatever the catalogue. Where a batch's scores are more than one block they are made twice: once for those of the
    held-out items, once to count what is not below them. Ties count against the held-out item, and so does a score that
    is NaN.
    """
    order = np.argsort(held_out.histories.lengths, kind="stable")
    found = {protocol: np.empty_like(held_out.targets) for protocol in held_out.protocols}
    drawn = [protocol for protocol in held_out.protocols if protocol != FULL]
    num_targets = held_out.targets.shape[1]
    bar = tqdm(total=len(held_out), unit=" users", desc="ranking", disable=None if progress else True, leave=False)
    for start in range(0, len(order), batch_size):
        users = order[start : start + batch_size]
        histories = held_out.histories.take(users)
        scores = score(histories)
        examples = [torch.from_numpy(held_out.negatives[protocol][users]) for protocol in drawn]
        targets_BR = torch.from_numpy(held_out.targets[users])
        widths = [num_targets, *(negatives_BN.shape[1] for negatives_BN in examples)]
        gathered = scores.gather(torch.cat([targets_BR, *examples], 1), FIRST_INDEX)
        parts = gathered.tensor_split(np.cumsum(widths)[:-1].tolist(), dim=1)
        for protocol, negatives_BN, scores_BN in zip(drawn, examples, parts[1:], strict=True):
            device = scores_BN.device
            ranks_BR = rank_among(parts[0], targets_BR.to(device), scores_BN, negatives_BN.to(device))
            found[protocol][users] = ranks_BR.cpu().numpy()
        if FULL in found:
            left_out = histories.until(np.zeros(len(histories), np.int64)) if held_out.repeats else histories
            found[FULL][users] = rank_in_full(scores, parts[0], targets_BR, left_out, FIRST_INDEX).cpu().numpy()
        bar.update(len(users))
    bar.close()
    return found


@torch.inference_mode()
def rank_in_full(scores: Scores, scores_BR: Tensor, targets_BR: Tensor, left_out: Histories, first: int) -> Tensor:
    """Ranks int64 [B, R] of held-out items among all rows from `first` but those `left_out`.

    `scores_BR`: the held-out items' (`scores.gather`). Competitors are counted block by block: all that are not below,
    less those of them that don't compete, which are few.
    """
    B, V, device = len(targets_BR), scores.num_rows, scores_BR.device
    # A pair of user and row is the number owner * V + row. Sorted: numpy's `unique` and `isin` take 10 times as long.
    left_N = np.sort(np.repeat(np.arange(B), left_out.lengths) * V + left_out.items)
    wanted_BR = np.arange(B)[:, None] * V + targets_BR.numpy()
    place_BR = np.minimum(np.searchsorted(left_N, wanted_BR), max(len(left_N) - 1, 0))
    is_candidate_BR = targets_BR.numpy() >= first
    if len(left_N):
        is_candidate_BR &= left_N[place_BR] != wanted_BR
    apart = np.sort(np.concatenate([left_N, wanted_BR[targets_BR.numpy() >= first]]))
    apart = apart[np.diff(apart, prepend=-1) > 0]  # each pair once, though it be left out twice
    owner_P, rows_P = (torch.from_numpy(part).to(device) for part in np.divmod(apart, V))
    above_BR = torch.zeros(targets_BR.shape, dtype=torch.long, device=device)
    for start, block in scores.blocks(first):
        here = (rows_P >= start) & (rows_P < start + block.shape[1])
        owner_N, scores_N = owner_P[here], block[owner_P[here], rows_P[here] - start]
        for r in range(targets_BR.shape[1]):  # one target at a time, so that memory stays that of a block
            # "not below" rather than "above or equal": a NaN on either side counts against the target.
            apart_N = ~(scores_N < scores_BR[owner_N, r])
            above_BR[:, r] += block.shape[1] - _count(block < scores_BR[:, r, None])
            above_BR[:, r] -= torch.bincount(owner_N[apart_N], minlength=B)
    targets_BR = targets_BR.to(device)
    return place_targets(above_BR, scores_BR, targets_BR, torch.from_numpy(is_candidate_BR).to(device))


def rank_among(scores_BR: Tensor, targets_BR: Tensor, scores_BN: Tensor, negatives_BN: Tensor) -> Tensor:
    """Ranks int64 [B, R] of held-out items among themselves and fixed negatives [B, N] (-1 where padded).

    The protocols `uniform-100`, `popular-100` and `top-100`. A negative that is a held-out item is left out.
    """
    competes_BN = (negatives_BN >= 0) & ~(negatives_BN[:, :, None] == targets_BR[:, None, :]).any(2)
    above_BR = (~(scores_BN[:, :, None] < scores_BR[:, None, :]) & competes_BN[:, :, None]).sum(1)
    return place_targets(above_BR, scores_BR, targets_BR, torch.ones_like(targets_BR, dtype=torch.bool))


def _count(flags_BV: Tensor) -> Tensor:
    """How many of each user are set, [B]; numpy counts bits 5 times as fast as torch."""
    if flags_BV.device.type != "cpu":
        return flags_BV.sum(1)
    return torch.from_numpy(np.count_nonzero(flags_BV.numpy(), axis=1))


def metrics_of(ranks_UR: IntArray, *, ks: Sequence[int] = KS, baskets: bool = False) -> dict[str, FloatArray]:
    """Per-user metrics of both conventions, and of `basket` where asked for; names of others than `list` are
    prefixed."""
    given = torch.from_numpy(ranks_UR)
    found = metrics_from_ranks(given, ks=ks)
    for prefix in (SINGLE, *([BASKET] if baskets else [])):
        of_convention = metrics_from_ranks(given, convention=convention_of(prefix)[0], ks=ks)
        found |= {prefix + name: values for name, values in of_convention.items()}
    return found


def convention_of(metric: str) -> tuple[Convention, str]:
    """The convention that a metric's prefix says, and its name without."""
    for prefix, convention in CONVENTIONS.items():
        if metric.startswith(prefix):
            return convention, metric.removeprefix(prefix)
    return "list", metric


def _bounds(sequences: Sequences, part: Part) -> tuple[IntArray, IntArray]:
    """First and last-but-one position of what `part` holds out."""
    if part == "validation":
        return sequences.valid_start, sequences.test_start
    return sequences.test_start, sequences.end


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
    offsets = np.concatenate([[0], np.cumsum(np.concatenate([np.diff(s.offsets) for s in kept]))])
    together = Sequences(
        np.concatenate([s.users for s in kept]),
        offsets,
        np.concatenate([s.items for s in kept]),
        np.concatenate([s.times for s in kept]),
        np.concatenate([s.valid_start for s in kept]),
        np.concatenate([s.test_start for s in kept]),
        np.concatenate([s.end for s in kept]),
        np.concatenate([s.values for s in kept]),
        np.concatenate([s.event_types for s in kept]),
    )
    return together.take(np.argsort(together.users, kind="stable"))


def sampled(users: IntArray, share: float) -> npt.NDArray[np.bool_]:
    """About this share of users, whatever table they come from (the finaliser of SplitMix64, Steele et al. 2014)."""
    z = users.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    flags: npt.NDArray[np.bool_] = (z ^ (z >> np.uint64(31))).astype(np.float64) < share * 2.0**64
    return flags


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
