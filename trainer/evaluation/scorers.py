"""Who is ranked: models and the simple baselines, each as a score over the rows of one catalogue.

Models may come from other releases, lakes or domains than the one they are scored on. Items and users meet by raw id,
never by index. What a model does not know it can't find: such an item scores -inf, and is passed over in a history.

Shape letters: ``U`` held-out users, ``B`` users of a batch, ``V`` rows of the evaluated catalogue.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from etl import tables
from etl.settings import GraftrecError
from etl.tables import DOMAIN_ALL, FIRST_INDEX, SEP, UNK
from trainer.arrays import Int8Array
from trainer.config import BaselinesConfig, EvaluationConfig, PretrainConfig
from trainer.data.baskets import BasketDataset
from trainer.data.catalogue import Catalogue, read_catalogue, rows_by_raw_id
from trainer.data.held_out import HeldOut, Part, read_held_out, read_users, sampled, without_repeats
from trainer.data.histories import Histories, merge
from trainer.data.release import Release, domains_with_sequences, pin
from trainer.data.sequences import SequenceDataset, Sequences, training_interactions
from trainer.evaluation.baselines.names import (
    ITEM_TO_ITEM,
    ITEM_TO_ITEM_ALL,
    ITEM_TO_ITEM_ALL_DECAYED,
    ITEM_TO_ITEM_ALL_TRAINING,
    ITEM_TO_ITEM_DECAYED,
    POPULARITY,
    TRANSITIONS,
)
from trainer.evaluation.baselines.sequences import item_to_item, popularity, transitions
from trainer.inference.model_folder import TrainedModel
from trainer.inference.scorer import Scores, has_items

IntArray = npt.NDArray[np.int64]


class EvaluateError(GraftrecError):
    """A model that can't be scored on these examples, or results that can't be compared."""


@dataclass(frozen=True)
class EvaluationSet:
    """One pinned release, split, domain and part: the same questions for every contender."""

    release: Release
    split: str
    domain: str
    part: Part
    catalogue: Catalogue
    held_out: HeldOut
    event_types: tuple[str, ...] = ()  # that inputs tell apart

    @property
    def users(self) -> IntArray:
        return self.held_out.users

    @property
    def baskets(self) -> bool:
        """Whether next baskets are predicted."""
        return self.held_out.baskets

    @functools.cached_property
    def raw_users(self) -> list[str]:
        """Raw ids of the users, in their order."""
        return raw_users(self.release, self.users)

    @functools.cached_property
    def everything(self) -> Catalogue:
        """The items of all domains."""
        return read_catalogue(self.release, DOMAIN_ALL)

    @functools.cached_property
    def other_domains(self) -> list[str]:
        """Domains beside the evaluated one that have sequences in this split."""
        if self.domain == DOMAIN_ALL or not len(self.held_out.first_time):
            return []
        return [d for d in domains_with_sequences(self.release, self.split) if d not in (self.domain, DOMAIN_ALL)]

    @functools.cached_property
    def input_anywhere(self) -> Histories:
        """The users' inputs as rows of `everything`, with times."""
        given = self.held_out.histories
        rows = self.everything.rows(self.catalogue.global_index[given.items]).astype(np.int64)
        return dataclasses.replace(given, items=rows)

    @functools.cached_property
    def elsewhere(self) -> Histories:
        """What the users did in other domains strictly before their first held-out item, as rows of `everything`."""
        users = np.asarray(self.users)
        dataset = SequenceDataset(self.release, self.split, DOMAIN_ALL, event_types=self.event_types)
        found = read_users(dataset, _is_among(users), times=True)
        others = aligned(self._rows(found), users).before(self.held_out.first_time)
        return others.keep(~np.isin(others.items, self.own_rows))

    @functools.cached_property
    def training_elsewhere(self) -> Histories:
        """The training parts of the users in other domains, as rows of `everything`."""
        users = np.asarray(self.users)
        parts = [
            aligned(self._rows(read_users(dataset, _is_among(users), times=True), training=True), users)
            for dataset in (SequenceDataset(self.release, self.split, domain) for domain in self.other_domains)
        ]
        together = functools.reduce(merge, parts)
        return together.keep(~np.isin(together.items, self.own_rows))

    @functools.cached_property
    def training_interactions(self) -> IntArray:
        """[V] interactions of each row of the catalogue in the domain's training parts, of all users."""
        read = BasketDataset if self.baskets else SequenceDataset
        return training_interactions(read(self.release, self.split, self.domain), self.catalogue)

    @functools.cached_property
    def own_rows(self) -> IntArray:
        """[V] rows of the evaluated catalogue's items in `everything`."""
        return self.everything.rows(self.catalogue.global_index).astype(np.int64)

    def _rows(self, sequences: Sequences | None, *, training: bool = False) -> Histories:
        return in_rows(sequences, self.everything, training=training)

    def training(self, domain: str, *, max_users: int) -> Histories:
        """Training parts of a domain, of about `max_users` users, as rows of `everything`; without times."""
        dataset = SequenceDataset(self.release, self.split, domain)
        return training_histories(dataset, self.everything, max_users=max_users)


def in_rows(sequences: Sequences | None, catalogue: Catalogue, *, training: bool = False) -> Histories:
    """Sequences, or their training parts, as rows of a catalogue."""
    if sequences is None:
        none = np.empty(0, np.int64)
        return Histories(none, np.zeros(1, np.int64), none, none)
    rows = catalogue.rows(sequences.items).astype(np.int64)
    whole = Histories(sequences.users, sequences.offsets, rows, sequences.times, sequences.event_types)
    return whole.until(sequences.valid_start if training else sequences.end)


def training_histories(dataset: SequenceDataset, catalogue: Catalogue, *, max_users: int) -> Histories:
    """Training parts of about `max_users` users, in rows of a catalogue; without times."""
    share = max_users / max(dataset.num_rows, 1)
    return in_rows(read_users(dataset, lambda s: sampled(s.users, share)), catalogue, training=True)


def raw_users(release: Release, users: IntArray) -> list[str]:
    """Raw ids of users, who ascend."""
    found = release.read(tables.USERS, ["user", "index"], indices=users)
    raw: list[str] = found.sort_by("index")["user"].to_pylist()
    return raw


def read_evaluation_set(
    release: Release,
    split: str,
    domain: str,
    part: Part,
    config: EvaluationConfig,
    *,
    baskets: bool = False,
    event_types: Sequence[str] = (),
) -> EvaluationSet:
    """Pin the examples. `event_types`: kinds of event that models read. Raises GraftrecError."""
    catalogue = read_catalogue(release, domain)
    held_out = read_held_out(
        release,
        split,
        domain,
        catalogue,
        part,
        config.protocols,
        times=True,
        max_users=config.max_users,
        baskets=baskets,
        repeats=config.ranks_repeats(baskets=baskets),
        event_types=event_types,
    )
    held_out = without_repeats(held_out, where=f"split {split!r} and domain {domain!r} for {part}")
    return EvaluationSet(release, split, domain, part, catalogue, held_out, tuple(event_types))


def repeats_of(config: EvaluationConfig, models: Sequence[TrainedModel], *, baskets: bool) -> bool:
    """Whether what a user has had is a candidate: as configured, else as the models of the same task were trained.

    Raises EvaluateError where these differ.
    """
    named = {
        model.config.evaluation.ranks_repeats(baskets=baskets): model
        for model in models
        if model.config.task.reads_baskets == baskets
    }
    own = set(named)
    if config.repeats is None and len(own) > 1:
        apart = [named[flag] for flag in (True, False)]
        raise EvaluateError(
            f"evaluation.repeats: expected models that were trained with the same, found true in {apart[0].folder} and "
            f"false in {apart[1].folder}; set --evaluation.repeats for all of them"
        )
    return own.pop() if config.repeats is None and own else config.ranks_repeats(baskets=baskets)


def aligned(histories: Histories, users: IntArray) -> Histories:
    """The histories of exactly these users, in that order; empty for a user that has none. `histories` by user."""
    if not len(histories):
        return Histories(users, np.zeros(len(users) + 1, np.int64), histories.items, histories.times)
    place = np.minimum(np.searchsorted(histories.users, users), len(histories) - 1)
    found = histories.users[place] == users
    taken = histories.take(place)
    return dataclasses.replace(taken.keep(np.repeat(found, taken.lengths)), users=users)


def _is_among(users: IntArray) -> Callable[[Sequences], npt.NDArray[np.bool_]]:
    return lambda sequences: np.isin(sequences.users, users)


@dataclass(frozen=True)
class Scorer:
    """One scorer in the ranking, and what a reader of the table must know of it."""

    label: str
    seed: int | None  # None: it has none, as a counting baseline
    score: Callable[..., Any]  # of rankings: histories as rows of the evaluated catalogue -> [B, V]
    reads: str
    is_model: bool = False
    facts: dict[str, Any] = field(default_factory=dict)  # folder, hash, seconds…


# --- models ---------------------------------------------


def label_of(config: PretrainConfig) -> str:
    """The row of a model that is given no other name."""
    return str(getattr(config, "transfer", config.name))


def as_known(
    trained_model: TrainedModel, given: Histories, raw_users: Sequence[str], catalogue: Catalogue
) -> tuple[Histories, IntArray]:
    """(Histories of a catalogue's rows as a model knows users and items, others left out; [V] its row of each row of
    the catalogue, UNK where it has none)."""
    rows = rows_by_raw_id(trained_model.catalogue, catalogue)
    own = Histories(
        user_rows(trained_model, raw_users), given.offsets, rows[given.items], given.times, given.event_types
    )
    return own.keep(own.items != UNK), rows


def model_scorer(
    trained_model: TrainedModel,
    examples: EvaluationSet,
    *,
    label: str | None = None,
    seed: int | None = None,
    device: str = "cpu",
    must_know: bool = True,
) -> Scorer:
    """A model, scored on the evaluated domain's items whatever it was trained on.

    A model of the evaluated domain reads that domain's items; a model of the domain `all` also reads what the user did
    elsewhere before the first held-out item. A user of whom the model reads nothing gets the popular items, as when
    served: by interactions in the training parts of the evaluated split.

    Raises EvaluateError: it was trained on what is held out here, or (`must_know`) knows none of the items; without
    `must_know` such a model finds nothing.
    """
    reads_all = trained_model.config.data.domain == DOMAIN_ALL != examples.domain and bool(examples.other_domains)
    if examples.baskets and trained_model.config.data.domain != examples.domain:
        raise EvaluateError(
            f"expected a model that reads domain {examples.domain!r}, whose next baskets are asked for, found "
            f"{trained_model.folder}, which reads {trained_model.config.data.domain!r}"
        )
    own_kinds = _kinds_as_known(trained_model, examples)
    rows = rows_by_raw_id(trained_model.catalogue, examples.catalogue)
    known = np.flatnonzero(rows != UNK)
    known = known[known >= FIRST_INDEX]
    if (predicted_V := trained_model.model.predicted_V) is not None:
        known = known[predicted_V.cpu().numpy()[rows[known]]]
    if must_know and not len(known):
        raise EvaluateError(
            f"expected a model that predicts items of domain {examples.domain!r}, found none of its "
            f"{len(examples.catalogue) - FIRST_INDEX:,} items in {trained_model.folder} (trained on domain "
            f"{trained_model.config.data.domain!r}, to predict {trained_model.config.data.answered!r}); "
            "fine-tune it on the domain first"
        )
    _refuse_leak(trained_model, examples)
    own_users = user_rows(trained_model, examples.raw_users)
    item_rows = rows_by_raw_id(trained_model.catalogue, examples.everything) if reads_all else rows
    source = merge(examples.input_anywhere, examples.elsewhere) if reads_all else examples.held_out.histories
    scorer = trained_model.scorer(device=device, baskets=examples.baskets)
    reads_pauses = trained_model.config.task.reads_baskets
    candidates = rows[known]
    width = len(examples.catalogue)

    def score(histories: Histories) -> Scores:
        place = np.searchsorted(examples.users, histories.users)
        given = source.take(place) if reads_all else histories
        kinds = own_kinds[given.event_types] if len(own_kinds) else own_kinds
        own = Histories(own_users[place], given.offsets, item_rows[given.items], given.times, kinds)
        if len(known) == 0:
            return Scores.of(torch.full((1, 1), -torch.inf).expand(len(histories), width))
        is_read = own.items != UNK
        if examples.baskets and not reads_pauses:  # the same items, without what stands between baskets
            is_read &= own.items != SEP
        read = own.keep(is_read)
        scores, nothing_B = scorer.scores(read, candidates), torch.from_numpy(~has_items(read))
        popular_C = None
        if nothing_B.any():
            popular_C = torch.from_numpy(examples.training_interactions[known].astype(np.float32))

        def columns(start: int, stop: int) -> Tensor:
            first, last = np.searchsorted(known, [start, stop])
            own_BC = scores.columns(first, last)
            if popular_C is not None:
                own_BC = torch.where(nothing_B[:, None].to(own_BC.device), popular_C[first:last].to(own_BC), own_BC)
            block = own_BC.new_full((len(histories), stop - start), -torch.inf)
            block[:, torch.from_numpy(known[first:last] - start).to(block.device)] = own_BC
            return block

        return Scores(len(histories), width, columns)

    reads = "all domains, others until the first held-out item" if reads_all else examples.domain
    return Scorer(
        label or label_of(trained_model.config),
        trained_model.config.train.seed if seed is None else seed,
        score,
        reads,
        is_model=True,
        facts=trained_model.facts,
    )


def _kinds_as_known(trained_model: TrainedModel, examples: EvaluationSet) -> Int8Array:
    """The model's place of each kind of event that inputs tell apart; empty where it reads none. Raises EvaluateError
    for a model that reads what they don't tell."""
    own = trained_model.event_types
    if not own:
        return np.empty(0, np.int8)
    if not set(own) <= set(examples.event_types):
        raise EvaluateError(
            f"expected models that read at most the kinds of event {', '.join(examples.event_types) or 'none'}, found "
            f"{trained_model.folder}, which reads {', '.join(own)}; run "
            "again, it was not there when the kinds were read"
        )
    places = {name: place for place, name in enumerate(own, 1)}
    return np.array([0, *(places.get(name, 0) for name in examples.event_types)], dtype=np.int8)


def user_rows(trained_model: TrainedModel, raw_users: Sequence[str]) -> IntArray:
    """[U] rows of the model's user table, UNK for users that it does not know."""
    known = trained_model.users or {}
    return np.array([known.get(raw, UNK) for raw in raw_users], dtype=np.int64)


def _refuse_leak(trained_model: TrainedModel, examples: EvaluationSet) -> None:
    """A domain's training part may hold what another holds out: that of `all` under `last-5` does, not so `causal`; and
    a sequence's may hold the last basket, where that is longer than what the split holds out."""
    data, release = trained_model.config.data, examples.release
    if trained_model.lake == release.lake and trained_model.release > release.number:
        raise EvaluateError(
            f"expected a release at least as new as {trained_model.release}, which {trained_model.folder} was "
            f"trained on, found {release.number}, which may hold out what the model has seen; evaluate on a newer "
            "release"
        )
    same = data.domain == examples.domain and examples.baskets == trained_model.config.task.reads_baskets
    if data.split != examples.split and release.by_time.keys() & {data.split, examples.split}:
        same &= examples.baskets  # sequences of other dates may hold what is asked
    if data.split == examples.split and trained_model.lake == release.lake and data.split in release.by_time:
        until = pin(release.lake, trained_model.release).by_time.get(data.split)
        if until is not None and until > release.by_time[data.split]:
            raise EvaluateError(
                f"expected a model trained until {release.by_time[data.split]:%Y-%m-%d}, as split {data.split!r} of "
                f"release {release.number} has it, found {trained_model.folder}, trained until {until:%Y-%m-%d} on "
                f"release {trained_model.release}; train it again, or evaluate later dates"
            )
    if same or data.domain not in domains_with_sequences(examples.release, data.split):
        return
    dataset = SequenceDataset(examples.release, data.split, data.domain)
    trained = aligned(examples._rows(read_users(dataset, _is_among(examples.users)), training=True), examples.users)
    owner = np.repeat(np.arange(len(trained)), trained.lengths)
    own = np.bincount(owner[np.isin(trained.items, examples.own_rows)], minlength=len(trained))
    given = examples.held_out.histories
    leaked = int(np.maximum(own - given.keep(given.items != SEP).lengths, 0).sum())
    if leaked and examples.baskets:
        raise EvaluateError(
            f"expected a model that has not seen what it is asked, found {leaked:,} items of last baskets in what "
            f"{trained_model.folder} was trained on (split {data.split!r}); train it on a split that holds out more"
        )
    if leaked:
        raise EvaluateError(
            f"expected a model that has not seen what it is asked, found {leaked:,} held-out interactions of domain "
            f"{examples.domain!r} in what {trained_model.folder} was trained on (split {data.split!r}, domain "
            f"{data.domain!r}); train it on a split that is causal for {examples.domain!r}"
        )


# --- baselines ---------------------------------------------


def baseline_scorers(examples: EvaluationSet, config: BaselinesConfig) -> list[Scorer]:
    """Popularity; item-to-item and transitions of the evaluated domain's last items; item-to-item of all domains'."""
    own_rows = examples.own_rows
    num_items = len(examples.everything)
    own = examples.training(examples.domain, max_users=config.max_users)
    popular = popularity(own, num_items)
    within = item_to_item(own, num_items, last=config.last, towards=own_rows)
    decayed = dataclasses.replace(within, last=None, decay=config.decay)
    steps, fading = config.transition_steps, config.transition_decay
    following = transitions(own, num_items, steps=steps, decay=fading, towards=own_rows)
    here = examples.input_anywhere
    last = f"last {config.last}"
    scorers = [
        Scorer(POPULARITY, None, lambda given: Scores.of(popular.score(given, own_rows)), "nothing"),
        _over(ITEM_TO_ITEM, within, here, f"{last} of {examples.domain}", examples),
        _over(
            ITEM_TO_ITEM_DECAYED, decayed, here, f"{examples.domain}, the n-th last weighs {config.decay}^n", examples
        ),
        _over(
            TRANSITIONS,
            following,
            here,
            f"last {steps} of {examples.domain}, the n-th last weighs {fading}^n",
            examples,
        ),
    ]
    if examples.other_domains:
        rest = [examples.training(domain, max_users=config.max_users) for domain in examples.other_domains]
        joined = functools.reduce(_side_by_side, [own, *rest])
        across = item_to_item(joined, num_items, last=config.last, towards=own_rows)
        across = dataclasses.replace(across, popularity=popular)
        decayed = dataclasses.replace(across, last=None, decay=config.decay)
        training, prior = merge(here, examples.training_elsewhere), merge(here, examples.elsewhere)
        before = "others: until the first held-out item"
        scorers += [
            _over(
                ITEM_TO_ITEM_ALL_TRAINING, across, training, f"{last} of all domains (others: training part)", examples
            ),
            _over(ITEM_TO_ITEM_ALL, across, prior, f"{last} of all domains ({before})", examples),
            _over(
                ITEM_TO_ITEM_ALL_DECAYED,
                decayed,
                prior,
                f"all domains ({before}), the n-th last weighs {config.decay}^n",
                examples,
            ),
        ]
    return scorers


def _over(label: str, scorer: Any, histories: Histories, reads: str, examples: EvaluationSet) -> Scorer:
    """A baseline that reads its own histories of the evaluated users, as rows of all domains' catalogue."""

    def score(given: Histories) -> Scores:
        own, rows = histories.take(np.searchsorted(examples.users, given.users)), examples.own_rows
        return Scores(len(own), len(rows), lambda start, stop: scorer.score(own, rows[start:stop]))

    return Scorer(label, None, score, reads)


def _side_by_side(first: Histories, second: Histories) -> Histories:
    """Both domains' interactions of each user, the order of domains for want of times: for counting only."""
    users, places = np.unique(np.concatenate([first.users, second.users]), return_inverse=True)
    owner = np.repeat(places, np.concatenate([first.lengths, second.lengths]))
    offsets = np.concatenate([[0], np.cumsum(np.bincount(owner, minlength=len(users)))])
    items = np.concatenate([first.items, second.items])[np.argsort(owner, kind="stable")]
    return Histories(users, offsets, items, np.empty(0, np.int64))
