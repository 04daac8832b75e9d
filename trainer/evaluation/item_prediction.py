"""Models that rank items, evaluated by what users held out.

Shape letters: ``S`` seeds, ``U`` users, ``R`` held-out items of a user.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from matplotlib.figure import Figure
from torch import Tensor

from etl.settings import ConfigError
from etl.tables import DOMAIN_ALL, FIRST_INDEX, SEP
from etl.text_table import with_sign
from trainer.arrays import IntArray
from trainer.config import BaselinesConfig, EvaluateConfig, TaskSettings
from trainer.data.catalogue import rows_of_domain
from trainer.data.cold_items import COLD, WARM
from trainer.data.events import Events
from trainer.data.held_out import FULL, HeldOut, ReadOptions, without_repeats
from trainer.evaluation import newness
from trainer.evaluation.baselines import names, next_basket
from trainer.evaluation.baselines.cold_items import cold_scorers
from trainer.evaluation.comparison import Key, Results, Row, block, by_key, in_order, notes_on_tests
from trainer.evaluation.evaluator import Evaluator, Measure, Output, Question, TaskMetrics, Validation
from trainer.evaluation.item_ranking import BASKET, SINGLE, convention_of, metrics_of, rank, ranks
from trainer.evaluation.outside import OutsideRanks, complete_protocols, outside_scorers
from trainer.evaluation.ranking_metrics import MISSED, FloatArray, means, metrics_from_ranks
from trainer.evaluation.scorers import (
    EvaluateError,
    EvaluationSet,
    Scorer,
    baseline_scorers,
    model_scorer,
    read_evaluation_set,
)
from trainer.evaluation.significance import gain_text, p_text
from trainer.figures import Gain, transfer_gains
from trainer.inference.model_folder import TrainedModel
from trainer.inference.scorer import ModelScorer, Scores, has_items
from trainer.parallel.distributed import World, join

GAINS = "gains.png"
ITEM_METRICS = ("NDCG@10", "Recall@10", "MRR")
BROKEN = "broken"  # scores, in an output
RankArray = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Evaluation(Results):
    """Ranks of everyone's held-out items, from which any metric of any user follows."""

    examples: EvaluationSet
    ranks: Mapping[Key, Mapping[str, RankArray]]  # protocol -> [U, R]
    broken: Mapping[Key, int]  # scores that were not a number, or +inf (-inf is what must not be taken)
    shown: Sequence[str] = ITEM_METRICS
    has_bootstrap = True

    @classmethod
    def of(
        cls, scorers: Mapping[Key, Scorer], outputs: Mapping[Key, Output], examples: EvaluationSet, shown: Sequence[str]
    ) -> Self:
        found: dict[Key, Any] = {key: dict(output) for key, output in outputs.items()}
        broken = {key: int(output.pop(BROKEN)) for key, output in found.items()}
        return cls(scorers, examples, found, broken, shown)

    prefixes: ClassVar[tuple[str, ...]] = (SINGLE,)  # of conventions beside `list`

    @property
    def conventions(self) -> Mapping[str, str]:
        return {"list": "", "single": SINGLE}

    @property
    def columns(self) -> Sequence[str]:
        return self.shown

    @property
    def protocols(self) -> Sequence[str]:
        return self.examples.held_out.protocols

    @property
    def num_users(self) -> int:
        return len(self.examples.users)

    @property
    def training_items(self) -> IntArray:
        return self.examples.held_out.training_items

    @property
    def items_read(self) -> IntArray:
        given = self.examples.held_out.histories
        return given.keep(given.items != SEP).lengths

    def metrics(self, key: Key, protocol: str) -> dict[str, FloatArray]:
        """Metrics of each user [U], in all conventions."""
        return metrics_of(self.ranks[key][protocol].astype(np.int64), prefixes=self.prefixes)

    def of_users(
        self, key: Key, protocol: str, metric: str, only_UR: npt.NDArray[np.bool_] | None = None
    ) -> FloatArray:
        """`only_UR`: of these held-out items alone, NaN for users without."""
        convention, name = convention_of(metric)
        found = torch.from_numpy(self.ranks[key][protocol].astype(np.int64))
        metrics = metrics_from_ranks(found, convention=convention, only_BR=only_UR)
        if name not in metrics:
            raise EvaluateError(
                f"no metric {metric!r}; expected one of {', '.join(metrics)}, or {SINGLE} or {BASKET} before it"
            )
        return metrics[name]

    def seed_means(self, label: str, protocol: str, metric: str) -> FloatArray:
        found: FloatArray = np.nanmean(self.matrix(label, protocol, metric, seeds=in_order(self.seeds(label))), axis=1)
        return found

    def averages(self, key: Key, protocol: str) -> dict[str, float]:
        return {name: float(np.nanmean(values)) for name, values in self.metrics(key, protocol).items()}

    def means(self, key: Key) -> dict[str, dict[str, float]]:
        return {protocol: means(self.metrics(key, protocol)) for protocol in self.protocols}

    def faults(self) -> list[str]:
        return [
            f"{count:,} scores of {label}, seed {seed}, are not numbers"
            for (label, seed), count in self.broken.items()
            if count
        ]

    def on_rare_items(self, key: Key, protocol: str, metric: str, *, at_most: int, at_least: int = 0) -> FloatArray:
        """Each held-out item with so few training interactions by itself; users who have none are left out."""
        targets_UR = self.examples.held_out.targets
        count_UR = self.examples.training_interactions[targets_UR]
        rare_UR = (targets_UR >= 0) & (count_UR >= at_least) & (count_UR <= at_most)
        alone = SINGLE + convention_of(metric)[1].replace("HR@", "Recall@").replace("F1@", "Recall@")
        return self.of_users(key, protocol, alone, rare_UR)[rare_UR.any(1)]

    def text(self, rows: Sequence[Row], *, against: str) -> str:
        """Every metric of the first protocol, then the first metric of the others."""
        protocols, metrics = (
            list(dict.fromkeys(names)) for names in zip(*((r.protocol, r.metric) for r in rows), strict=True)
        )
        examples = self.examples
        where = f"{examples.part} · domain {examples.domain} · split {examples.split} · {len(examples.users):,} users"
        blocks = [f"{protocols[0]} ranking · {where}\n" + block(rows, [(protocols[0], metric) for metric in metrics])]
        if protocols[1:]:
            columns = [(protocol, metrics[0]) for protocol in protocols[1:]]
            how = "by protocol" if examples.held_out.sets else "among sampled negatives"
            blocks.append(f"{metrics[0]} {how}\n" + block(rows, columns))
        if (new := newness.newness(examples)) is not None:
            blocks.append(newness.table(self, new, FULL if FULL in protocols else protocols[0], metrics[0]))
        headline = [row for row in rows if (row.protocol, row.metric) == (protocols[0], metrics[0])]
        convention = convention_of(metrics[0])[0]
        notes = [
            f"{protocol}: {int(among_V.sum()):,} items, held out by "
            f"{int(among_V[np.maximum(examples.held_out.targets, 0)].any(1).sum()):,} users"
            for protocol, among_V in examples.held_out.sets.items()
        ]
        notes += [f"several held-out items are relevant in one list (convention `{convention}`)"]
        if examples.held_out.repeats:
            notes.append("what a user has had is a candidate too")
        if examples.held_out.num_repeats:
            notes.append(
                f"{examples.held_out.num_repeats:,} held-out items that their users had had before are left out "
                "(evaluation.repeats=true ranks them)"
            )
        notes += notes_on_tests([row for row in rows if row.protocol == protocols[0]], f"gains over {against}")
        notes += [_account(row) for row in headline if row.is_model and row.gain is not None]
        notes += [
            f"{row.label} reads {row.reads}" for row in headline if not row.is_model or row.reads != examples.domain
        ]
        notes += _beside_baselines(headline)
        return "\n\n".join(blocks) + "\n\n" + "\n".join(notes)

    def tables(self) -> Iterator[pa.Table]:
        """Label, seed, protocol, convention, user (raw id), length of its training part (0: it is new) and a column a
        metric."""
        users = pa.array(self.examples.raw_users, pa.string())
        prefixes = {convention_of(prefix)[0]: prefix for prefix in ("", *self.prefixes)}
        lacking = np.full(len(users), np.nan)
        for (label, seed), by_protocol in self.ranks.items():
            for protocol in by_protocol:
                metrics = self.metrics((label, seed), protocol)
                names = list(dict.fromkeys(convention_of(name)[1] for name in metrics))
                for convention, prefix in prefixes.items():
                    columns: dict[str, Any] = {
                        "label": pa.array([label] * len(users), pa.string()),
                        "seed": pa.array([seed] * len(users), pa.int64()),
                        "protocol": pa.array([protocol] * len(users), pa.string()),
                        "convention": pa.array([convention] * len(users), pa.string()),
                        "user": users,
                        "training_items": pa.array(self.training_items, pa.int64()),
                    } | {name: metrics.get(prefix + name, lacking) for name in names}
                    yield pa.table(columns)

    def figure(self, rows: Sequence[Row], *, against: str) -> tuple[str, Figure] | None:
        """Gains in the first metric of the first protocol; None where nothing was compared."""
        shown = [r for r in rows if r.gain and (r.protocol, r.metric) == (rows[0].protocol, rows[0].metric)]
        gains = [
            Gain(
                row.label,
                row.gain.gain,
                row.gain.low,
                row.gain.high,
                gain_text(row.gain.gain, row.gain.relative_gain)
                + (f", p {p_text(row.p_value)}" if row.is_model else ""),
                is_baseline=not row.is_model,
                marked=row.is_candidate,
            )
            for row in shown
            if row.gain
        ]
        if not gains:
            return None
        over = "from scratch" if against == "none" else against
        title = f"{self.examples.domain}, {rows[0].protocol} ranking, {self.num_users:,} users"
        return GAINS, transfer_gains(gains, metric=rows[0].metric, over=over, title=title)

    def about(self) -> dict[str, Any]:
        return {"held_out": int(self.examples.held_out.targets.shape[1])}

    def summary(self) -> dict[str, Any]:
        new = newness.newness(self.examples)
        return ({} if new is None else {"new": newness.summary(self, new, self.protocols, self.columns[0])}) | {
            "users": self.num_users,
            "items": len(self.examples.catalogue) - FIRST_INDEX,
            "contenders": [
                {"label": label, "seed": seed, "reads": scorer.reads, "is_model": scorer.is_model}
                | {"facts": scorer.facts, "scores_not_a_number": self.broken[label, seed]}
                | {"means": self.means((label, seed))}
                for (label, seed), scorer in self.scorers.items()
            ],
        }


def evaluate_scorers(
    scorers: Sequence[Scorer],
    examples: EvaluationSet,
    *,
    batch_size: int = 256,
    progress: bool = False,
    shown: Sequence[str] = ITEM_METRICS,
) -> Evaluation:
    """Rank what the users held out, once by each scorer. Raises EvaluateError for two of one label and seed."""
    named = by_key(scorers)
    outputs = {key: _ranked(one, examples, batch_size=batch_size, progress=progress) for key, one in named.items()}
    return Evaluation.of(named, outputs, examples, shown)


def _ranked(scorer: Scorer, examples: EvaluationSet, *, batch_size: int, progress: bool) -> Output:
    """Ranks [U, R] by protocol, and the number of scores that are not numbers."""
    broken = 0

    def counted(histories: Events) -> Scores:
        scores = scorer.score(histories)
        met: set[int] = set()  # a block may be made twice

        def columns(start: int, stop: int) -> Tensor:
            nonlocal broken
            block: Tensor = scores.columns(start, stop)
            if start not in met:
                met.add(start)
                broken += int((block.isnan() | block.isposinf()).sum())
            return block

        return Scores(scores.num_users, scores.num_rows, columns)

    given = ranks(counted, examples.held_out, batch_size=batch_size, progress=progress)
    if scorer.listed is not None:
        cannot_UR = ~scorer.listed
        given = {name: np.where(cannot_UR & (ranks_UR > 0), MISSED, ranks_UR) for name, ranks_UR in given.items()}
    return {protocol: ranks_UR.astype(np.int32) for protocol, ranks_UR in given.items()} | {BROKEN: np.array(broken)}


def validate(scorer: ModelScorer, held_out: HeldOut, world: World, *, batch_size: int) -> dict[str, float]:
    """Mean metrics; each process ranks its share of the users."""
    """By the first protocol; beside it the NDCG of others, of which the name says the protocol."""
    by_protocol = rank(scorer.scores, held_out.take(world.share(len(held_out))), batch_size=batch_size)
    ranked = by_protocol[held_out.protocols[0]]
    ranked |= {f"{protocol}/NDCG@10": by_protocol[protocol]["NDCG@10"] for protocol in held_out.protocols[1:]}
    names = [name for name in ranked if not name.startswith(SINGLE)]
    table = world.gather(torch.from_numpy(np.stack([ranked[name] for name in names], axis=1)))[: len(held_out)]
    return means({name: table[:, place].numpy() for place, name in enumerate(names)})


def _account(row: Row) -> str:
    """A model's gain with its intervals, and what it cost."""
    gain = row.gain
    assert gain is not None
    varied = "users and seeds" if gain.seeds_varied else "users, one seed"
    interval = f"[{with_sign(gain.low, 4)}, {with_sign(gain.high, 4)}]"
    text = f"{row.label}: {row.metric} {with_sign(gain.gain, 4)} {interval} ({varied})"
    if row.bootstrap is not None:
        text += f", bootstrap [{row.bootstrap[0]:+.4f}, {row.bootstrap[1]:+.4f}] (users)"
    if not row.seconds:  # other software's
        return text
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


# --- the evaluator ---------------------------------------------


class ItemPrediction(Evaluator):
    """Held-out items, ranked."""

    evaluation: ClassVar[type[Evaluation]] = Evaluation
    encoders: tuple[str, ...] = ()  # whose vectors of items the models read

    def __init__(self, examples: EvaluationSet, config: EvaluateConfig) -> None:
        self.examples, self.config, self.release = examples, config, examples.release
        self.split, self.domain, self.part = examples.split, examples.domain, examples.part

    @property
    def table(self) -> str:
        return self.examples.table

    @property
    def ranks_repeats(self) -> bool:
        return self.examples.held_out.repeats

    @staticmethod
    def metrics_of(task: TaskSettings | None) -> TaskMetrics:
        per_user = tuple(metrics_of(np.ones((1, 1), np.int64)))
        baselines = (
            *names.OF_ONE_DOMAIN,
            *names.OF_ALL_DOMAINS,
            names.FRIENDS,
            names.PERSONAL_FREQUENCY,
            *names.OF_COLD_ITEMS,
        )
        return TaskMetrics("NDCG@10", per_user, ITEM_METRICS, baselines)

    @staticmethod
    def measure(validation: Validation) -> Measure:
        held_out, among = _validated(validation)
        batch_size = validation.config.evaluation.batch_size
        return Measure(
            len(held_out), lambda scorer, world: validate(scorer, held_out, world, batch_size=batch_size), among
        )

    @classmethod
    def read(cls, question: Question) -> Sequence[Self]:
        config, repeats = question.config.evaluation, cls.repeats(question)
        # No negatives are drawn for baskets, and none that a user has had.
        protocols = (FULL,) if repeats else cls.protocols or config.protocols
        if question.split in question.release.cold_items and not {COLD, WARM} & set(config.protocols):
            protocols = (COLD, WARM, FULL)
        kinds = [name for model in question.models for name in model.event_types] + list(question.event_types)
        options = ReadOptions(
            protocols,
            question.task.needs.table,
            repeats,
            event_types=list(dict.fromkeys(kinds)),
            max_users=config.max_users,
        )
        part = question.config.part
        examples = read_evaluation_set(question.release, question.split, question.domain, part, options)
        found = cls(examples, question.config)
        found.encoders = tuple(
            dict.fromkeys(name for model in question.models for name in model.config.model.features.encoders)
        )
        return [found]

    @staticmethod
    def repeats(question: Question) -> bool:
        """Whether what a user has had is a candidate too: as configured, else as the models of the same task were
        trained. Raises EvaluateError where these differ."""
        config, needs = question.config.evaluation, question.task.needs
        models = [model for model in question.models if model.config.task.needs.table == needs.table]
        named = {model.config.ranks_repeats: model for model in models}
        if config.repeats is None and len(named) > 1:
            raise EvaluateError(
                "evaluation.repeats: expected models that were trained with the same, found true in "
                f"{named[True].folder} and false in {named[False].folder}; set --evaluation.repeats for all of them"
            )
        return next(iter(named)) if config.repeats is None and named else config.ranks_repeats(needs.repeats)

    def scorer(
        self, model: TrainedModel, *, label: str | None = None, seed: int | None = None, must_know: bool = True
    ) -> Scorer:
        device = str(join(self.config.runtime).device)
        return model_scorer(model, self.examples, label=label, seed=seed, device=device, must_know=must_know)

    def baselines(self, config: BaselinesConfig) -> Sequence[Scorer]:
        repeated = [next_basket.frequency_scorer(self.examples)] if self.examples.held_out.repeats else []
        encoders = config.encoders or self.encoders
        by_content = cold_scorers(self.examples, config, encoders) if self.examples.held_out.sets and encoders else []
        return [*baseline_scorers(self.examples, config), *repeated, *by_content]

    def outside(self, files: Sequence[OutsideRanks]) -> tuple[list[Scorer], list[str]]:
        """Other software's scores as rows of the table, and notes on them. Protocols that the files don't suffice for
        are left out from here on. Raises ConfigError."""
        scorers = [scorer for file in files for scorer in outside_scorers(file, self.examples)]
        protocols, notes = complete_protocols(scorers, self.examples)
        if not protocols:
            raise ConfigError(
                f"evaluation.protocols: expected {FULL} beside ranks, found "
                f"{', '.join(self.examples.held_out.protocols)}, of whose items the files score some only; add {FULL}"
            )
        held_out = self.examples.held_out
        negatives = {name: drawn for name, drawn in held_out.negatives.items() if name in protocols}
        held_out = replace(held_out, protocols=tuple(protocols), negatives=negatives)
        self.examples = replace(self.examples, held_out=held_out)
        of_files = [f"{scorer.label}: {note}" for scorer in scorers for note in scorer.facts["notes"]]
        unknown = "what it was trained on and whether it read the request's time, its file doesn't say"
        return scorers, [
            *notes,
            *of_files,
            *(f"{label}: {unknown}" for label in dict.fromkeys(s.label for s in scorers)),
        ]

    def output(self, scorer: Scorer) -> Output:
        batch_size, progress = self.config.evaluation.batch_size, self.config.runtime.progress
        return _ranked(scorer, self.examples, batch_size=batch_size, progress=progress)

    def results(self, scorers: Mapping[Key, Scorer], outputs: Mapping[Key, Output]) -> Evaluation:
        shown = self.config.metrics or self.metrics_of(None).table
        return self.evaluation.of(scorers, outputs, self.examples, shown)


def _validated(validation: Validation) -> tuple[HeldOut, Tensor | None]:
    """Who is validated, and the rows that are ranked, bool [V]; None: all.

    Where more is read than is predicted, what comes after a user's first held-out item is not: as in evaluation. A
    joint split has such events in the training part. Raises ConfigError where it would ask for items that are not
    ranked.
    """
    data = validation.config.data
    held_out = without_repeats(
        validation.held_out, where=f"split {data.split!r} and domain {data.domain!r} for validation"
    )
    alone = validation.config.model.user_features.alone
    if not alone and not has_items(held_out.histories).any():
        raise ConfigError(
            f"expected users with something to read before what split {data.split!r} holds out, found none in domain "
            f"{data.domain!r}: its users are new there; read all domains (data.domain: {DOMAIN_ALL}, data.predicted: "
            f"{data.answered}), or take another split"
        )
    if data.answered == data.domain:
        return held_out if alone else _with_history(held_out), None
    among = rows_of_domain(validation.release, validation.catalogue, data.answered)
    examples = held_out.targets[held_out.targets >= 0]
    if strange := int((~among[examples]).sum()):
        raise ConfigError(
            f"expected split {data.split!r} to hold out items of domain {data.answered!r} from domain "
            f"{data.domain!r}, found {strange:,} of {len(examples):,} that are none; take a split with a "
            f"joint_target: {data.answered} (etl.splits)"
        )
    given = held_out.histories
    before = given.before(held_out.first_time, always=among[given.items])
    read = replace(held_out, histories=before)
    return read if alone else _with_history(read), torch.from_numpy(among)


def _with_history(held_out: HeldOut) -> HeldOut:
    """Users who are new since training are ranked by popularity, which no epoch changes: they are not validated. Unless
    the model answers by their features."""
    known = has_items(held_out.histories)
    return held_out if known.all() else held_out.take(np.flatnonzero(known))
