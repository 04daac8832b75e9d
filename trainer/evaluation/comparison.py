"""What contenders scored on one evaluation set, and the table that compares them.

Shape letters: ``S`` seeds, ``U`` users, ``R`` held-out items of a user.

A row of the table is a label: all seeds of a transfer, or a baseline. Gains are over the label ``against`` (from
scratch), paired by user and seed; p-values know both (`significance.compare`) and are adjusted by Holm's method over
the gains of all models in all metrics under one protocol. Where a `candidate` was chosen before this part was read, its
gain in the first metric under the first protocol is the one planned test, as in the gate: it is not adjusted, and the
others are adjusted among themselves. A baseline has no p-value: no claim is made for it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from trainer.data.histories import Histories
from trainer.evaluation.item_ranking import BASKET, SINGLE, Score, convention_of, metrics_of, ranks
from trainer.evaluation.ranking_metrics import FloatArray, metrics_from_ranks
from trainer.evaluation.scorers import EvaluateError, EvaluationSet, Scorer
from trainer.evaluation.significance import (
    Comparison,
    bootstrap_interval,
    compare,
    gain_text,
    holm,
    mean_over_seeds,
    p_text,
)
from trainer.inference.scorer import Scores

CANDIDATE_MARK = " *"  # after the candidate's label in a table
RankArray = npt.NDArray[np.int32]
Key = tuple[str, int | None]  # label, seed


@dataclass(frozen=True)
class Evaluation:
    """Ranks of every contender's held-out items, from which any metric of any user follows."""

    examples: EvaluationSet
    scorers: Mapping[Key, Scorer]
    ranks: Mapping[Key, Mapping[str, RankArray]]  # protocol -> [U, R]
    broken: Mapping[Key, int]  # scores that were not a number, or +inf (-inf is what must not be taken)

    @property
    def labels(self) -> list[str]:
        return list(dict.fromkeys(label for label, _ in self.scorers))

    def seeds(self, label: str) -> list[int | None]:
        return [seed for name, seed in self.scorers if name == label]

    def is_model(self, label: str) -> bool:
        return any(scorer.is_model for (name, _), scorer in self.scorers.items() if name == label)

    def metrics(self, key: Key, protocol: str) -> dict[str, FloatArray]:
        """Per-user metrics [U] of one contender, in all conventions."""
        return metrics_of(self.ranks[key][protocol].astype(np.int64), baskets=self.examples.baskets)

    def matrix(
        self,
        label: str,
        protocol: str,
        metric: str,
        *,
        seeds: Sequence[int | None] | None = None,
        only_UR: npt.NDArray[np.bool_] | None = None,
    ) -> FloatArray:
        """A metric [S, U] of a label's seeds. `only_UR`: of these held-out items alone, NaN for users without."""
        convention, name = convention_of(metric)
        rows = []
        for seed in self.seeds(label) if seeds is None else seeds:
            found = torch.from_numpy(self.ranks[label, seed][protocol].astype(np.int64))
            metrics = metrics_from_ranks(found, convention=convention, only_BR=only_UR)
            if name not in metrics:
                raise EvaluateError(
                    f"no metric {metric!r}; expected one of {', '.join(metrics)}, or {SINGLE} or {BASKET} before it"
                )
            rows.append(metrics[name])
        return np.stack(rows)


def evaluate_scorers(
    scorers: Sequence[Scorer], examples: EvaluationSet, *, batch_size: int = 256, progress: bool = False
) -> Evaluation:
    """Rank what the users held out, once by each contender. Raises EvaluateError for two of one label and seed."""
    by_key: dict[Key, Scorer] = {}
    found: dict[Key, Mapping[str, RankArray]] = {}
    broken: dict[Key, int] = {}
    for scorer in scorers:
        key = (scorer.label, scorer.seed)
        if key in by_key:
            raise EvaluateError(
                f"expected one model of each label and seed, found two of {scorer.label!r}, seed {scorer.seed}; "
                "give `label` or `seed` in models"
            )
        by_key[key] = scorer
        broken[key] = 0

        given = ranks(
            _counting_broken(scorer.score, broken, key), examples.held_out, batch_size=batch_size, progress=progress
        )
        found[key] = {protocol: ranks_UR.astype(np.int32) for protocol, ranks_UR in given.items()}
    return Evaluation(examples, by_key, found, broken)


def _counting_broken(score: Score, broken: dict[Key, int], key: Key) -> Score:
    def counted(histories: Histories) -> Scores:
        scores = score(histories)
        met: set[int] = set()  # a block may be made twice

        def columns(start: int, stop: int) -> Tensor:
            block = scores.columns(start, stop)
            if start not in met:
                met.add(start)
                broken[key] += int((block.isnan() | block.isposinf()).sum())
            return block

        return Scores(scores.num_users, scores.num_rows, columns)

    return counted


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
    evaluation: Evaluation,
    *,
    against: str,
    protocols: Sequence[str],
    metrics: Sequence[str],
    seed: int = 0,
    candidate: str | None = None,
) -> list[Row]:
    """Every label under every protocol and metric. Gains are left out where no label is `against`."""
    rows: list[Row] = []
    for protocol in protocols:
        for metric in metrics:
            rows += [_row(evaluation, label, against, protocol, metric, seed) for label in evaluation.labels]
    rows = mark_candidate(rows, candidate, metric=metrics[0])
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


def _row(evaluation: Evaluation, label: str, against: str, protocol: str, metric: str, seed: int) -> Row:
    values_SU = evaluation.matrix(label, protocol, metric, seeds=in_order(evaluation.seeds(label)))
    own = [c for (name, _), c in evaluation.scorers.items() if name == label]
    of_seed = np.nanmean(values_SU, axis=1)
    gain = interval = None
    if against in evaluation.labels and label != against:
        gain, diff_U = gain_over(evaluation, label, against, protocol, metric)
        interval = bootstrap_interval(diff_U, seed=seed) if evaluation.is_model(label) else None
    return Row(
        label,
        protocol,
        metric,
        mean_over_seeds(values_SU),
        float(of_seed.std(ddof=1)) if len(own) > 1 else float("nan"),
        len(own),
        evaluation.is_model(label),
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


def gain_over(
    evaluation: Evaluation, label: str, against: str, protocol: str, metric: str
) -> tuple[Comparison, FloatArray]:
    """The comparison of two labels, and their difference [U], seeds averaged.

    Seeds that both have are paired; of seeds that only one has, nothing is used. A label without seeds (a baseline) is
    compared with each seed of the other. Raises EvaluateError where they share no seed.
    """
    ours, theirs = in_order(evaluation.seeds(label)), in_order(evaluation.seeds(against))
    if None not in ours and None not in theirs:
        ours = theirs = [seed for seed in ours if seed in theirs]
        if not ours:
            raise EvaluateError(
                f"expected {label!r} and {against!r} to share a seed, found {evaluation.seeds(label)} and "
                f"{evaluation.seeds(against)}; train both with the same seeds, or give `seed` in models"
            )
    ours_SU = evaluation.matrix(label, protocol, metric, seeds=ours)
    theirs_SU = evaluation.matrix(against, protocol, metric, seeds=theirs)
    known = ~(np.isnan(ours_SU).any(0) | np.isnan(theirs_SU).any(0))
    ours_SU, theirs_SU = ours_SU[:, known], theirs_SU[:, known]
    diff_U: FloatArray = ours_SU.mean(0) - theirs_SU.mean(0)
    without_seed = [
        values[0] if seeds == [None] else values for values, seeds in ((ours_SU, ours), (theirs_SU, theirs))
    ]
    return compare(without_seed[0], without_seed[1]), diff_U


# --- the table as text ---------------------------------------------


def render(rows: Sequence[Row], examples: EvaluationSet, *, against: str) -> str:
    """The table for people: every metric of the first protocol, then the first metric of the others."""
    protocols, metrics = (
        list(dict.fromkeys(names)) for names in zip(*((r.protocol, r.metric) for r in rows), strict=True)
    )
    where = f"{examples.part} · domain {examples.domain} · split {examples.split} · {len(examples.users):,} users"
    blocks = [f"{protocols[0]} ranking · {where}\n" + block(rows, [(protocols[0], metric) for metric in metrics])]
    if protocols[1:]:
        columns = [(protocol, metrics[0]) for protocol in protocols[1:]]
        blocks.append(f"{metrics[0]} among sampled negatives\n" + block(rows, columns))
    headline = [row for row in rows if (row.protocol, row.metric) == (protocols[0], metrics[0])]
    convention = convention_of(metrics[0])[0]
    notes = [f"several held-out items are relevant in one list (convention `{convention}`)"]
    if examples.held_out.repeats:
        notes.append("what a user has had is a candidate too")
    notes += notes_on_tests([row for row in rows if row.protocol == protocols[0]], f"gains over {against}")
    notes += [_account(row) for row in headline if row.is_model and row.gain is not None]
    notes += [f"{row.label} reads {row.reads}" for row in headline if not row.is_model or row.reads != examples.domain]
    notes += _beside_baselines(headline)
    return "\n\n".join(blocks) + "\n\n" + "\n".join(notes)


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
    width = max(len(label) for label in [*(label + marks.get(label, "") for label in labels), "model"])
    compared = any(row.gain for row in rows)
    several = len({protocol for protocol, _ in columns}) > 1 or columns[0][0] != rows[0].protocol
    names = [protocol if several else metric for protocol, metric in columns]
    wide = max(13, *(len(name) + 2 for name in names))
    gain_wide = max(9, *(len(_gain(row)) + 2 for row in rows)) if compared else 0
    head = f"{'model':<{width}} seeds" + "".join(
        f"{name:>{wide}}" + (f"{'gain':>{gain_wide}}{'p':>8}" if compared else "") for name in names
    )
    lines = [head, "─" * len(head)]
    for label in models + [label for label in labels if label not in models]:
        own = [cells[label, *column] for column in columns]
        if models and label not in models and len(lines) == 2 + len(models):
            lines.append("")
        seeds = own[0].num_seeds if own[0].is_model else "–"
        name = label + marks.get(label, "")
        lines.append(f"{name:<{width}} {seeds:>5}{''.join(_cell(row, wide, gain_wide) for row in own)}".rstrip())
    return "\n".join(lines)


def _cell(row: Row, wide: int, gain_wide: int) -> str:
    """`gain_wide`: 0 where nothing is compared."""
    tested = f"{_gain(row):>{gain_wide}}{p_text(row.p_value):>8}" if gain_wide else ""
    return f"{row.mean:>{wide}.4f}{tested}"


def _gain(row: Row) -> str:
    return "" if row.gain is None else gain_text(row.gain.gain, row.gain.relative_gain)


def _account(row: Row) -> str:
    """A model's gain with its intervals, and what it cost."""
    gain = row.gain
    assert gain is not None
    varied = "users and seeds" if gain.seeds_varied else "users, one seed"
    text = f"{row.label}: {row.metric} {gain.gain:+.4f} [{gain.low:+.4f}, {gain.high:+.4f}] ({varied})"
    if row.bootstrap is not None:
        text += f", bootstrap [{row.bootstrap[0]:+.4f}, {row.bootstrap[1]:+.4f}] (users)"
    return text + f"; pre-training {row.pretrain_seconds:,.0f} s, training {row.seconds:,.0f} s"


def _beside_baselines(headline: Sequence[Row]) -> list[str]:
    """One line: is the best model above the best baseline?"""
    models, baselines = ([r for r in headline if r.is_model is flag] for flag in (True, False))
    if not models or not baselines:
        return []
    best, bar = max(models, key=lambda row: row.mean), max(baselines, key=lambda row: row.mean)
    word = "above" if best.mean > bar.mean else "below"
    return [
        f"best model {best.label} {best.mean:.4f} is {word} the best simple baseline, {bar.label} {bar.mean:.4f} "
        f"({best.metric}, {best.protocol})"
    ]
