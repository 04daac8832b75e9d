"""What models and simple baselines gave for the same examples, and the table that compares them.

Shape letters: ``S`` seeds, ``U`` users.

A row of the table is a label: all seeds of a transfer, or a baseline. Gains are over the label ``against`` (from
scratch), paired by user and seed; p-values know both (`significance.compare`) and are adjusted by Holm's method over
the gains of all models in all metrics under one protocol. Where a `candidate` was chosen before this part was read, its
gain in the first metric under the first protocol is the one planned test, as in the gate: it is not adjusted, and the
others are adjusted among themselves. A baseline has no p-value: no claim is made for it.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
from matplotlib.figure import Figure

from etl.text_table import aligned
from trainer.arrays import IntArray
from trainer.evaluation.ranking_metrics import FloatArray
from trainer.evaluation.scorers import EvaluateError, Scorer
from trainer.evaluation.significance import Comparison, bootstrap_interval, compare, gain_text, holm, p_text

CANDIDATE_MARK = " *"  # after the candidate's label in a table
Key = tuple[str, int | None]  # label, seed


@dataclass(frozen=True)
class Results(ABC):
    """What models and simple baselines gave for the same examples."""

    scorers: Mapping[Key, Scorer]

    has_bootstrap: ClassVar[bool] = False  # whether gains get an interval over users, too

    @property
    def conventions(self) -> Mapping[str, str]:
        """Ways of counting that have the same metrics: name -> prefix of its metrics."""
        return {"": ""}

    @property
    @abstractmethod
    def columns(self) -> Sequence[str]:
        """Metrics of the table."""

    @property
    @abstractmethod
    def protocols(self) -> Sequence[str]:
        """Under which there are rows."""

    @property
    @abstractmethod
    def num_users(self) -> int: ...

    @property
    @abstractmethod
    def training_items(self) -> IntArray:
        """[U] how many items were read, or trained on, of each user: those of few are cold."""

    @property
    def items_read(self) -> IntArray:
        """[U] how many items were read of each user."""
        return self.training_items

    # --- what it came to

    @abstractmethod
    def of_users(self, key: Key, protocol: str, metric: str) -> FloatArray:
        """A metric of each user [U], for paired tests; NaN for users of whom it can't say anything."""

    @abstractmethod
    def seed_means(self, label: str, protocol: str, metric: str) -> FloatArray:
        """A metric of each seed [S], in ascending order."""

    @abstractmethod
    def means(self, key: Key) -> dict[str, dict[str, float]]:
        """Protocol, or what is predicted -> metric -> mean."""

    @abstractmethod
    def averages(self, key: Key, protocol: str) -> dict[str, float]:
        """All metrics under one protocol: those that users have, averaged over users."""

    @abstractmethod
    def faults(self) -> list[str]:
        """Why numbers can't be trusted."""

    def is_tested(self, metric: str) -> bool:
        """Whether users have it each, so that they can be paired."""
        return True

    def place_of(self, protocol: str, metric: str) -> tuple[str, str]:
        """Protocol and metric here of those that the gate is set to."""
        return protocol, metric

    def on_rare_items(
        self, key: Key, protocol: str, metric: str, *, at_most: int, at_least: int = 0
    ) -> FloatArray | None:
        """The metric on items with so few training interactions, of each user who holds one out; None: no items."""
        return None

    # --- how it is shown

    @abstractmethod
    def text(self, rows: Sequence["Row"], *, against: str) -> str:
        """The table for people."""

    @abstractmethod
    def tables(self) -> Iterator[pa.Table]:
        """What is kept of each user, for each model and baseline in turn."""

    @abstractmethod
    def figure(self, rows: Sequence["Row"], *, against: str) -> tuple[str, Figure] | None:
        """Name of a file and a picture; None where there is nothing to show."""

    @abstractmethod
    def summary(self) -> dict[str, Any]:
        """What summary.json says besides."""

    @abstractmethod
    def about(self) -> dict[str, Any]:
        """What a report says of the examples."""

    # --- users

    @property
    def labels(self) -> list[str]:
        return list(dict.fromkeys(label for label, _ in self.scorers))

    def seeds(self, label: str) -> list[int | None]:
        return [seed for name, seed in self.scorers if name == label]

    def is_model(self, label: str) -> bool:
        return any(scorer.is_model for (name, _), scorer in self.scorers.items() if name == label)

    def matrix(
        self, label: str, protocol: str, metric: str, *, seeds: Sequence[int | None] | None = None
    ) -> FloatArray:
        """A metric [S, U] of a label's seeds."""
        seeds = self.seeds(label) if seeds is None else seeds
        return np.stack([self.of_users((label, seed), protocol, metric) for seed in seeds])


def by_key(scorers: Sequence[Scorer]) -> dict[Key, Scorer]:
    """Raises EvaluateError for two of one label and seed."""
    found: dict[Key, Scorer] = {}
    for scorer in scorers:
        if (key := (scorer.label, scorer.seed)) in found:
            raise EvaluateError(
                f"expected one model of each label and seed, found two of {scorer.label!r}, seed {scorer.seed}; "
                "give `label` or `seed` in models"
            )
        found[key] = scorer
    return found


@dataclass(frozen=True)
class Row:
    """One label under one protocol and metric."""

    label: str
    protocol: str
    metric: str
    mean: float  # over users and seeds
    spread: float  # standard deviation of the seeds' means; NaN for one
    num_seeds: int
    is_model: bool
    reads: str
    gain: Comparison | None = None  # over `against`; its p-value is not adjusted
    p_value: float | None = None  # adjusted over models and metrics of the protocol (`planned`: not); None: baseline
    bootstrap: tuple[float, float] | None = None  # interval of the gain over users, seeds averaged
    seconds: float = 0.0  # of training, mean over seeds
    pretrain_seconds: float = 0.0
    is_candidate: bool = False  # chosen before the evaluated part was read
    planned: bool = False  # its gain is the one planned test


def compare_table(
    results: Results,
    *,
    against: str,
    protocols: Sequence[str] | None = None,
    metrics: Sequence[str] | None = None,
    seed: int = 0,
    candidate: str | None = None,
) -> list[Row]:
    """Every label under every protocol and metric. Gains are left out where no label is `against`."""
    protocols, metrics = protocols or results.protocols, metrics or results.columns
    rows: list[Row] = []
    for protocol in protocols:
        for metric in metrics:
            rows += [_row(results, label, against, protocol, metric, seed) for label in results.labels]
    rows = mark_candidate(rows, candidate, metric=next(filter(results.is_tested, metrics)))
    for protocol in protocols:
        own = [n for n, row in enumerate(rows) if row.protocol == protocol]
        for n, row in zip(own, adjust([rows[n] for n in own]), strict=True):
            rows[n] = row
    return rows


def mark_candidate(rows: Sequence[Row], candidate: str | None, *, metric: str) -> list[Row]:
    """The candidate's rows, and the planned test: its gain in `metric`, in the first row that has it."""
    marked = [replace(row, is_candidate=row.label == candidate) for row in rows]
    for n, row in enumerate(marked):
        if row.is_candidate and row.metric == metric and row.gain is not None:
            marked[n] = replace(row, planned=True)
            break
    return marked


def adjust(rows: Sequence[Row]) -> list[Row]:
    """Set the p-values of models' gains: the planned test's is not adjusted, the others' are, by Holm's method."""
    found = [replace(row, p_value=row.gain.p_value) if row.planned and row.gain else row for row in rows]
    tested = [(n, row.gain) for n, row in enumerate(found) if row.is_model and row.gain and not row.planned]
    for (n, _), p_value in zip(tested, holm([gain.p_value for _, gain in tested]), strict=True):
        found[n] = replace(found[n], p_value=p_value)
    return found


def _row(results: Results, label: str, against: str, protocol: str, metric: str, seed: int) -> Row:
    of_seed = results.seed_means(label, protocol, metric)
    own = [scorer for (name, _), scorer in results.scorers.items() if name == label]
    gain = interval = None
    if against in results.labels and label != against and results.is_tested(metric):
        gain, diff_U = gain_over(results, label, against, protocol, metric)
        if results.has_bootstrap and results.is_model(label):
            interval = bootstrap_interval(diff_U, seed=seed)
    return Row(
        label,
        protocol,
        metric,
        float(of_seed.mean()),
        float(of_seed.std(ddof=1)) if len(own) > 1 else float("nan"),
        len(own),
        results.is_model(label),
        own[0].reads,
        gain,
        None,
        interval,
        _mean_fact(own, "seconds"),
        _mean_fact(own, "pretrain_seconds"),
    )


def in_order(seeds: Sequence[int | None]) -> list[int | None]:
    """Ascending, so that means over seeds are the same to the last bit whatever the order models are given in."""
    return sorted(seeds, key=lambda seed: (seed is not None, seed))


def _mean_fact(scorers: Sequence[Scorer], name: str) -> float:
    return float(np.mean([float(scorer.facts.get(name, 0.0)) for scorer in scorers]))


def gain_over(results: Results, label: str, against: str, protocol: str, metric: str) -> tuple[Comparison, FloatArray]:
    """The comparison of two labels, and their difference [U], seeds averaged.

    Seeds that both have are paired; of seeds that only one has, nothing is used. A label without seeds (a baseline) is
    compared with each seed of the other. Raises EvaluateError where they share no seed.
    """
    ours, theirs = in_order(results.seeds(label)), in_order(results.seeds(against))
    if None not in ours and None not in theirs:
        ours = theirs = [seed for seed in ours if seed in theirs]
        if not ours:
            raise EvaluateError(
                f"expected {label!r} and {against!r} to share a seed, found {results.seeds(label)} and "
                f"{results.seeds(against)}; train both with the same seeds, or give `seed` in models"
            )
    ours_SU = results.matrix(label, protocol, metric, seeds=ours)
    theirs_SU = results.matrix(against, protocol, metric, seeds=theirs)
    known = ~(np.isnan(ours_SU).any(0) | np.isnan(theirs_SU).any(0))
    ours_SU, theirs_SU = ours_SU[:, known], theirs_SU[:, known]
    diff_U: FloatArray = ours_SU.mean(0) - theirs_SU.mean(0)
    without_seed = [
        values[0] if seeds == [None] else values for values, seeds in ((ours_SU, ours), (theirs_SU, theirs))
    ]
    return compare(without_seed[0], without_seed[1]), diff_U


# --- the table as text ---------------------------------------------


def notes_on_tests(rows: Sequence[Row], what: str) -> list[str]:
    """A line on the tests of a table's first protocol: which one was planned, and how many Holm's method adjusts; and
    one on the candidate, if that has no test. `what`: what is tested, in words."""
    planned = next((row for row in rows if row.planned), None)
    others = sum(row.p_value is not None and not row.planned for row in rows)
    if planned is not None:
        text = f"{what}; * candidate, chosen on the validation part: its {planned.metric} is the one planned test, "
        adjusted = f"; the other p: Holm over {others} tests" if others else ""
        return [f"{text}not adjusted{adjusted}; p over users and seeds"]
    notes = [f"{what}; p over users and seeds, Holm over {others} tests"] if others else []
    return notes + (["* candidate, chosen on the validation part"] if any(row.is_candidate for row in rows) else [])


def block(rows: Sequence[Row], columns: Sequence[tuple[str, str]]) -> str:
    """Labels × columns (protocol, metric); models above baselines."""
    labels = list(dict.fromkeys(row.label for row in rows))
    cells = {(row.label, row.protocol, row.metric): row for row in rows}
    models = [label for label in labels if cells[label, *columns[0]].is_model]
    marks = {row.label: CANDIDATE_MARK for row in rows if row.is_candidate}
    compared = any(row.gain for row in rows)
    several = len({protocol for protocol, _ in columns}) > 1 or columns[0][0] != rows[0].protocol
    names = [protocol if several else metric for protocol, metric in columns]
    table = [["model", "seeds", *(title for name in names for title in ([name, "gain", "p"] if compared else [name]))]]
    for label in models + [label for label in labels if label not in models]:
        own = [cells[label, *column] for column in columns]
        if models and label not in models and len(table) == 1 + len(models):
            table.append([])
        table.append([label + marks.get(label, ""), str(own[0].num_seeds) if own[0].is_model else "–"])
        for row in own:
            table[-1] += [f"{row.mean:.4f}", *([_gain(row), p_text(row.p_value)] if compared else [])]
    return "\n".join(aligned(table, rule=True))


def _gain(row: Row) -> str:
    return "" if row.gain is None else gain_text(row.gain.gain, row.gain.relative_gain)
