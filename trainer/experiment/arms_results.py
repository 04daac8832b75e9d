"""What an experiment on features found: metrics of each slice and arm, and whether features help.

Shape letters: ``S`` seeds, ``U`` users of a slice, ``R`` held-out items of a user.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from etl.settings import ConfigError
from trainer.arrays import IntArray
from trainer.evaluation.comparison import Results, in_order
from trainer.evaluation.item_prediction import Evaluation
from trainer.evaluation.item_ranking import SINGLE
from trainer.evaluation.ranking_metrics import FloatArray
from trainer.evaluation.significance import Comparison, compare, holm, mean_over_seeds
from trainer.evaluation.three_arms import Claim, adjusted, three_arms
from trainer.experiment.arms_plan import ANY, ArmsConfig, Range, SliceConfig, arm_of, row_of, title_of


@dataclass(frozen=True)
class Part:
    """Users of a slice in one split."""

    results: Evaluation
    users: IntArray  # places among all users [U]
    only_UR: npt.NDArray[np.bool_]  # held-out items that are in it, of all users


@dataclass(frozen=True)
class Slice:
    """A metric of the users of a slice, of every label; those of several splits side by side."""

    name: str
    protocol: str
    metric: str
    parts: list[Part]

    @property
    def labels(self) -> list[str]:
        return self.parts[0].results.labels

    def is_model(self, label: str) -> bool:
        return self.parts[0].results.is_model(label)

    def seeds(self, *labels: str) -> list[int | None]:
        """Those that all of these labels have."""
        found = [set(part.results.seeds(label)) for part in self.parts for label in labels]
        return in_order(list(set.intersection(*found)))

    def matrix(self, label: str, seeds: Sequence[int | None]) -> FloatArray:
        """[S, U]."""
        return np.concatenate([self._matrix(part, label, seeds) for part in self.parts], axis=1)

    def _matrix(self, part: Part, label: str, seeds: Sequence[int | None]) -> FloatArray:
        of_users = part.results.of_users
        values = [of_users((label, seed), self.protocol, self.metric, part.only_UR) for seed in seeds]
        return np.stack(values)[:, part.users]


@dataclass(frozen=True)
class Entry:
    """One claim, beside the means of its arms; or a pair of features and their difference."""

    slice: str
    transfer: str
    features: str
    means: Mapping[str, float]  # by arm
    claim: Claim


@dataclass(frozen=True)
class Pair:
    """Real features beside others. `p_value` is adjusted over all pairs."""

    slice: str
    transfer: str
    ours: str
    theirs: str
    gain: Comparison
    p_value: float


@dataclass(frozen=True)
class Found:
    entries: list[Entry]
    pairs: list[Pair]
    baselines: dict[str, dict[str, float]]  # slice -> label -> mean
    sizes: dict[str, tuple[int, int]]  # slice -> users, held-out items
    missing: list[str]  # claims that lack a training


def slice_of(name: str, config: SliceConfig, by_split: Mapping[str, Results], metric: str) -> Slice:
    """Raises ConfigError for a task that ranks no items, a protocol that a split hasn't, or a slice without users."""
    parts = [_part(name, config, split, by_split[split]) for split in config.splits]
    return Slice(name, config.protocol, (SINGLE if config.items != ANY else "") + metric, parts)


def _part(name: str, config: SliceConfig, split: str, results: Results) -> Part:
    if not isinstance(results, Evaluation):
        raise ConfigError("preset.task: expected one that ranks items, found another; take next_item or masked_item")
    if config.protocol not in results.protocols:
        raise ConfigError(
            f"slices.{name}.protocol: expected one that split {split!r} is ranked by "
            f"({', '.join(results.protocols)}), found {config.protocol}; take a split with cold_items (etl.splits)"
        )
    examples = results.examples
    targets_UR = examples.held_out.targets
    only_UR = (targets_UR >= 0) & _within(examples.training_interactions[targets_UR], config.items)
    if (among_V := examples.held_out.sets.get(config.protocol)) is not None:
        only_UR &= among_V[targets_UR]
    users = np.flatnonzero(only_UR.any(1) & _within(results.training_items, config.users))
    if len(users) < 2:
        raise ConfigError(
            f"slices.{name}: expected two users at least, found {len(users)} of {results.num_users:,} in split "
            f"{split!r}, domain {examples.domain!r}; widen items or users, or take another split"
        )
    return Part(results, users, only_UR)


def _within(counts: IntArray, limits: Range) -> npt.NDArray[np.bool_]:
    least, most = limits
    inside: npt.NDArray[np.bool_] = (counts >= least) & (counts <= (counts.max(initial=0) if most is None else most))
    return inside


def collect(config: ArmsConfig, by_split: Mapping[str, Results]) -> Found:
    """All claims and pairs of all slices. Raises GraftrecError."""
    slices = [slice_of(name, one, by_split, config.metric) for name, one in config.slices.items()]
    entries, pairs, missing = [], [], []
    for one in slices:
        for transfer in config.transfers:
            for name in config.compared:
                found = _entry(one, transfer, name, config)
                if isinstance(found, Entry):
                    entries.append(found)
                else:
                    missing.append(found)
            pairs += list(_pairs(one, transfer, config))
    entries = [
        Entry(one.slice, one.transfer, one.features, one.means, claim)
        for one, claim in zip(entries, adjusted([one.claim for one in entries]), strict=True)
    ]
    adjusted_p = holm([pair.p_value for pair in pairs])
    pairs = [
        Pair(one.slice, one.transfer, one.ours, one.theirs, one.gain, p)
        for one, p in zip(pairs, adjusted_p, strict=True)
    ]
    baselines = {one.name: dict(_baselines(one)) for one in slices}
    return Found(entries, pairs, baselines, {one.name: _size(one) for one in slices}, missing)


def _entry(one: Slice, transfer: str, features: str, config: ArmsConfig) -> Entry | str:
    rows = {arm: row_of(arm_of(features, arm), transfer) for arm in ("none", "real", "shuffled")}  # type: ignore[arg-type]
    seeds = one.seeds(*rows.values())
    if len(seeds) < 2:
        return f"{one.name}, {features}, {title_of(transfer)}: expected two seeds of each arm, found {len(seeds)}"
    values = {arm: one.matrix(row, seeds) for arm, row in rows.items()}
    claim = three_arms(values["none"], values["real"], values["shuffled"], level=config.level)
    return Entry(one.name, transfer, features, {arm: mean_over_seeds(own) for arm, own in values.items()}, claim)


def _pairs(one: Slice, transfer: str, config: ArmsConfig) -> Iterator[Pair]:
    for ours, theirs in config.pairs:
        rows = [row_of(arm_of(name, "real"), transfer) for name in (ours, theirs)]
        if len(seeds := one.seeds(*rows)) >= 2:
            left, right = (one.matrix(row, seeds) for row in rows)
            gain = compare(left, right, confidence=1 - config.level)
            yield Pair(one.name, transfer, ours, theirs, gain, gain.p_value)


def _baselines(one: Slice) -> Iterator[tuple[str, float]]:
    for label in one.labels:
        if not one.is_model(label):
            yield label, mean_over_seeds(one.matrix(label, one.seeds(label)))


def _size(one: Slice) -> tuple[int, int]:
    return sum(len(part.users) for part in one.parts), sum(int(p.only_UR[p.users].sum()) for p in one.parts)
