"""Which differences of a transfer experiment are real: each gain over from-scratch, and the survey's three observations
(4.5) as named hypotheses.

Shape letters: ``S`` seeds, ``U`` users.

A hypothesis is a *contrast*: the mean of paired differences between rows that differ in one factor only, over all
levels of the other factors, or by how much two such means differ. It is tested like a single gain (`significance`:
users and seeds both random). Its p-value is adjusted by Holm's method over the hypotheses within one protocol and
convention; those of gains over from-scratch over the grid. A pair with a missing row is named and left out, and the
verdict is about the other pairs. With one seed a verdict is about users only (`num_seeds`): another initialisation may
give another one.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from etl.settings import GraftrecError
from trainer.evaluation.significance import Comparison, FloatArray, bootstrap_interval, holm, users_and_seeds_test
from trainer.report import survey
from trainer.report.survey import row_id

Row = Mapping[str, Any]
Matrix = Callable[[str, str, str, str], FloatArray]  # row id, protocol, convention, metric -> [S, U]
Verdict = Literal["supported", "not supported", "reversed", "unknown"]

LEVEL = 0.05  # of Holm-adjusted p-values
SLICES = ((0, 0), (1, 5), (6, 10), (11, 20), (21, 50), (51, 100), (101, None))  # items in a user's history, inclusive
TASKS = ("next_item", "masked_item")


class HypothesisError(GraftrecError):
    """Rows and metrics that do not belong together."""


@dataclass(frozen=True)
class Hypothesis:
    name: str
    claim: str
    pairs: tuple[tuple[str, str], ...]  # row ids: (should be better, than)
    less: tuple[tuple[str, str], ...] = ()  # pairs whose mean difference should be smaller than that of `pairs`


def _pretraining_helps(model: str, name: str) -> Hypothesis:
    cells = product(("shallow", "deep"), TASKS, (False, True))
    return Hypothesis(
        f"{model}-pretraining",
        f"Pre-training helps {name}",
        tuple((row_id(model, kind, task, known), row_id(model, "none", None, known)) for kind, task, known in cells),
    )


def _transfer(model: str, claim: str, better: str, worse: str) -> Hypothesis:
    cells = list(product(TASKS, (False, True)))
    pairs = tuple((row_id(model, better, *cell), row_id(model, worse, *cell)) for cell in cells)
    return Hypothesis(f"{model}-transfer", claim, pairs)


def _task(model: str, claim: str, better: str, worse: str) -> Hypothesis:
    cells = list(product(("shallow", "deep"), (False, True)))
    pairs = tuple((row_id(model, kind, better, known), row_id(model, kind, worse, known)) for kind, known in cells)
    return Hypothesis(f"{model}-task", claim, pairs)


def _knowledge(model: str, claim: str) -> Hypothesis:
    cells = list(product(("shallow", "deep"), TASKS))
    pairs = tuple((row_id(model, *cell, True), row_id(model, *cell, False)) for cell in cells)
    return Hypothesis(f"{model}-knowledge", claim, pairs)


HYPOTHESES = (
    _pretraining_helps("bert4rec", "BERT4Rec"),
    _pretraining_helps("caser", "Caser"),
    _transfer("bert4rec", "Deep transfer beats shallow for BERT4Rec", "deep", "shallow"),
    _transfer("caser", "Shallow transfer beats deep for Caser", "shallow", "deep"),
    _task("bert4rec", "Masked item beats next item as BERT4Rec's pre-training", "masked_item", "next_item"),
    _task("caser", "Next item beats masked item as Caser's pre-training", "next_item", "masked_item"),
    _knowledge("bert4rec", "Metadata helps pre-trained BERT4Rec"),
)


def _of_depths(name: str, claim: str, pair: Callable[[int], tuple[str, str]]) -> Hypothesis:
    """The difference of a pair of rows is larger with four and eight blocks than with one and two."""
    return Hypothesis(name, claim, tuple(map(pair, (4, 8))), less=tuple(map(pair, (1, 2))))


# The survey's explanation of its first observation (4.5): general knowledge is better captured by networks of high
# capacity. Rows of conf/experiment/capacity.yaml: transfer, blocks, users of pre-training.
OF_CAPACITY = (
    _of_depths(
        "capacity-transfer",
        "The deeper the network, the more deep transfer is better than shallow",
        lambda blocks: (f"deep-{blocks}-all", f"shallow-{blocks}-all"),
    ),
    _of_depths(
        "capacity-users",
        "The deeper the network, the more ten times the users to pre-train on give",
        lambda blocks: (f"deep-{blocks}-all", f"deep-{blocks}-tenth"),
    ),
)


def judge(
    rows: Sequence[Row],
    matrix: Matrix,
    lengths_U: npt.NDArray[np.int64],
    *,
    protocols: Sequence[str],
    conventions: Sequence[str],
    metric: str,
) -> dict[str, list[dict[str, Any]]]:
    """Tests of an experiment's rows: ``comparisons``, ``hypotheses`` and ``slices``, as plain data for results.json.

    rows: dicts with id, kind, against (of kind `own`), model, transfer, pretrain_task, task, knowledge, status and
    seeds ([{"seed": …}]); `matrix(id, protocol, convention, metric)` is that row's metric [S, U], a seed of the row a
    line, NaN for a user who holds nothing out; it is called only for rows whose status is done. lengths [U]: items of
    the target domain in each user's input. Seeds are paired by their number; a seed that only one side has is not used.

    Raises HypothesisError where a matrix does not have the row's seeds and the users of `lengths_U`.
    """
    found: dict[str, list[dict[str, Any]]] = {"comparisons": [], "hypotheses": [], "slices": []}
    for protocol in protocols:
        for convention in conventions:
            scored = _Scored(rows, matrix, len(lengths_U), protocol, convention, metric)
            where = {"protocol": protocol, "convention": convention, "metric": metric}
            found["comparisons"] += _comparisons(scored, where)
            found["hypotheses"] += _judged(scored, where)
            found["slices"] += _slices(scored, np.asarray(lengths_U), where)
    return found


def from_scratch_of(row: Row, rows: Iterable[Row]) -> Row | None:
    """The row that a gain is counted over: from scratch, of the same model, metadata and fine-tuning task (an `extra`
    row is itself from scratch, under another task). A row of kind `own` names it itself. None for
    baselines and from-scratch, or where there is none.
    """
    if row["kind"] == "custom":
        return next((other for other in rows if other["id"] == row["against"]), None)
    if row["kind"] not in ("model", "joint", "extra") or (row["kind"] == "model" and row["transfer"] == "none"):
        return None
    for other in rows:
        same = other["model"] == row["model"] and bool(other["knowledge"]) == bool(row["knowledge"])
        task = row["kind"] == "extra" or other["task"] == row["task"]
        if same and task and other["kind"] == "model" and other["transfer"] == "none":
            return other
    return None


class _Scored:
    """The rows that are done, with their metrics under one protocol and convention, each read once."""

    def __init__(
        self, rows: Sequence[Row], matrix: Matrix, num_users: int, protocol: str, convention: str, metric: str
    ) -> None:
        self.rows = {row["id"]: row for row in rows if row["status"] == "done"}
        self.reasons = {row["id"]: row.get("reason") or "missing" for row in rows if row["status"] != "done"}
        self.metric = metric
        self._seeds = {name: [run["seed"] for run in row["seeds"]] for name, row in self.rows.items()}
        self._values = {}
        for name in self.rows:
            values = np.atleast_2d(np.asarray(matrix(name, protocol, convention, metric), dtype=np.float64))
            expected = (max(len(self._seeds[name]), 1), num_users)
            if values.shape != expected:
                raise HypothesisError(
                    f"expected {metric} of {name!r} for {expected[0]} seeds and {expected[1]} users, found "
                    f"{list(values.shape)}; score all rows on one set of users"
                )
            self._values[name] = values

    def values(self, name: str) -> FloatArray:
        return self._values[name]

    def is_done(self, *names: str) -> bool:
        return all(name in self.rows for name in names)

    def reason(self, *names: str) -> str:
        """Why a pair can't be compared: of the first of its rows that is not done."""
        gone = next(name for name in names if name not in self.rows)
        return f"{gone}: {self.reasons.get(gone, 'not in this experiment')}"

    def difference(
        self, pairs: Sequence[tuple[str, str]], less: Sequence[tuple[str, str]] = ()
    ) -> tuple[FloatArray, float, npt.NDArray[np.bool_]] | None:
        """Mean over the pairs of row - against [S, U], less that over the pairs of `less`; the mean of `against`, and
        which users are in it. Only seeds that all rows have; None where there is no such seed."""
        names = [name for pair in (*pairs, *less) for name in pair]
        common = [seed for seed in self._seeds[names[0]] if all(seed in self._seeds[name] for name in names)]
        if not common:
            return None
        picked = {name: self._values[name][[self._seeds[name].index(seed) for seed in common]] for name in names}
        known_U = ~np.any([np.isnan(values).any(0) for values in picked.values()], axis=0)
        diff = np.mean([picked[row] - picked[against] for row, against in pairs], axis=0)
        if less:
            diff = diff - np.mean([picked[row] - picked[against] for row, against in less], axis=0)
        against = float(np.mean([picked[against][:, known_U].mean() for _, against in pairs]))
        return diff[:, known_U], against, known_U


def _comparisons(scored: _Scored, where: Mapping[str, str]) -> list[dict[str, Any]]:
    """Each trained row's gain over from-scratch; Holm over all of them."""
    found = []
    for name, row in scored.rows.items():
        against = from_scratch_of(row, scored.rows.values())
        difference = scored.difference([(name, against["id"])]) if against else None
        if against is None or difference is None:
            continue
        diff_SU, mean, _ = difference
        tested = users_and_seeds_test(diff_SU, baseline=mean)
        found.append(
            {"row": name, "against": against["id"], **where, **_gain(tested)}
            | {
                "relative_gain": _number(tested.relative_gain),
                "bootstrap": list(bootstrap_interval(diff_SU.mean(0), seed=0)),
            }
        )
    _adjust(found)
    return found


def _judged(scored: _Scored, where: Mapping[str, str]) -> list[dict[str, Any]]:
    """Each hypothesis with its single rows and its verdict; Holm over those that could be tested. Hypotheses
    without rows in this experiment are left out."""
    planned = scored.rows.keys() | scored.reasons.keys()
    own = [one for one in (*HYPOTHESES, *OF_CAPACITY) if any(planned.issuperset(pair) for pair in one.pairs)]
    found = [_contrast(hypothesis, scored) | dict(where) for hypothesis in own]
    tested = [hypothesis for hypothesis in found if hypothesis["p_value"] is not None]
    _adjust(tested)
    for hypothesis in tested:
        hypothesis["verdict"] = verdict(hypothesis["gain"], hypothesis["p_holm"])
    return found


def verdict(gain: float, p_holm: float) -> Verdict:
    if p_holm > LEVEL:
        return "not supported"
    return "supported" if gain > 0 else "reversed"


def _contrast(hypothesis: Hypothesis, scored: _Scored) -> dict[str, Any]:
    rows = [_single(pair, scored) for pair in (*hypothesis.pairs, *hypothesis.less)]
    tested_pairs = {(row["row"], row["against"]) for row in rows if row["gain"] is not None}
    pairs, less = ([pair for pair in given if pair in tested_pairs] for given in (hypothesis.pairs, hypothesis.less))
    has_both = bool(pairs) and bool(less) == bool(hypothesis.less)
    difference = scored.difference(pairs, less) if has_both else None
    tested = _gain(users_and_seeds_test(difference[0])) if difference else dict.fromkeys(_GAIN)
    contrast: dict[str, Any] = {"name": hypothesis.name, "claim": hypothesis.claim} | tested
    return contrast | {
        "p_holm": None,
        "verdict": "unknown",
        "num_pairs": len(tested_pairs) if difference else 0,
        "rows": rows,
        "survey": in_survey(hypothesis, scored.metric),
    }


def _single(pair: tuple[str, str], scored: _Scored) -> dict[str, Any]:
    """A hypothesis's single row: its gain and unadjusted p-value, or why it is missing."""
    row: dict[str, Any] = {"row": pair[0], "against": pair[1]}
    nothing = dict.fromkeys(_GAIN)
    if not scored.is_done(*pair):
        return row | nothing | {"reason": scored.reason(*pair)}
    difference = scored.difference([pair])
    if difference is None:
        return row | nothing | {"reason": f"{pair[0]} and {pair[1]} share no seed"}
    return row | _gain(users_and_seeds_test(difference[0]))


def in_survey(hypothesis: Hypothesis, metric: str) -> dict[str, Any] | None:
    """The same contrast of the survey's numbers, and in how many of its rows the claim holds. The survey gives no
    intervals. None for a metric, or rows, that it does not report."""
    if metric not in survey.METRICS or hypothesis in OF_CAPACITY:
        return None
    column = survey.METRICS.index(metric)
    gains = [(survey.TABLE_2[row][column] - survey.TABLE_2[against][column]) / 100 for row, against in hypothesis.pairs]
    holds = sum(gain > 0 for gain in gains)
    return {"gain": float(np.mean(gains)), "verdict": f"holds in {holds} of {len(gains)} rows"}


def _slices(scored: _Scored, lengths_U: npt.NDArray[np.int64], where: Mapping[str, str]) -> list[dict[str, Any]]:
    """Each row's mean, and gain over from-scratch, by the length of a user's target history; the coldest first."""
    found = []
    for low, high in SLICES:
        inside_U = (lengths_U >= low) & (lengths_U <= (np.inf if high is None else high))
        if not inside_U.any():
            continue
        label = f"{low}+" if high is None else str(low) if low == high else f"{low}-{high}"
        for name, row in scored.rows.items():
            values = scored.values(name)[:, inside_U]
            known = ~np.isnan(values).any(0)
            if not known.any():
                continue
            found.append(
                {
                    "row": name,
                    **where,
                    "slice": label,
                    "users": int(known.sum()),
                    "mean": float(values[:, known].mean()),
                }
                | _gain_inside(scored, row, inside_U)
            )
    return found


def _gain_inside(scored: _Scored, row: Row, inside_U: npt.NDArray[np.bool_]) -> dict[str, float | None]:
    against = from_scratch_of(row, scored.rows.values())
    difference = scored.difference([(row["id"], against["id"])]) if against else None
    if difference is not None:
        diff_SU, _, known_U = difference
        diff_SU = diff_SU[:, inside_U[known_U]]
        if diff_SU.shape[1] >= 2:  # of one user there is no interval
            gain = _gain(users_and_seeds_test(diff_SU))
            return {key: gain[key] for key in ("gain", "low", "high")}
    return {"gain": None, "low": None, "high": None}


_GAIN = ("gain", "p_value", "low", "high", "num_seeds", "num_users")


def _gain(tested: Comparison) -> dict[str, Any]:
    return {key: getattr(tested, key) for key in _GAIN}


def _adjust(tested: Sequence[dict[str, Any]]) -> None:
    """Sets p_holm of all that were tested together."""
    for row, p_holm in zip(tested, holm([row["p_value"] for row in tested]) if tested else [], strict=True):
        row["p_holm"] = p_holm


def _number(value: float) -> float | None:
    return value if np.isfinite(value) else None
