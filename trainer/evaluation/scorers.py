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
from etl.program import spelled
from etl.settings import GraftrecError
from etl.tables import DOMAIN_ALL, FIRST_INDEX, SEP, UNK
from trainer.arrays import Int8Array
from trainer.config import BaselinesConfig, PretrainConfig
from trainer.config.data import READS_ALL
from trainer.data.baskets import open_dataset
from trainer.data.catalogue import Catalogue, read_catalogue, rows_by_raw_id
from trainer.data.cold_items import cold_rows
from trainer.data.events import Events, beside, merge, sampled
from trainer.data.held_out import HeldOut, Part, ReadOptions, read_held_out, read_users, without_repeats
from trainer.data.release import DataError, Release, described, domains_with_sequences
from trainer.data.sequences import SequenceDataset, Sequences, training_interactions
from trainer.data.social import has_network, read_network, read_training
from trainer.evaluation.baselines.friends import counted_friends
from trainer.evaluation.baselines.names import (
    FRIENDS,
    ITEM_TO_ITEM,
    ITEM_TO_ITEM_ALL,
    ITEM_TO_ITEM_ALL_DECAYED,
    ITEM_TO_ITEM_ALL_TRAINING,
    ITEM_TO_ITEM_DECAYED,
    POPULARITY,
    TRANSITIONS,
)
from trainer.evaluation.baselines.sequences import item_to_item, popularity, transitions
from trainer.inference.later_items import with_release
from trainer.inference.model_folder import TrainedModel
from trainer.inference.scorer import Scores, answered

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
    def table(self) -> str:
        """That the users' events are of."""
        return self.held_out.table

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
    def input_anywhere(self) -> Events:
        """The users' inputs as rows of `everything`, with times."""
        given = self.held_out.histories
        return given.with_columns(items=self.everything.rows(self.catalogue.global_index[given.items]).astype(np.int64))

    @functools.cached_property
    def elsewhere(self) -> Events:
        """What the users did in other domains strictly before their first held-out item, as rows of `everything`."""
        users = np.asarray(self.users)
        dataset = SequenceDataset(self.release, self.split, DOMAIN_ALL, event_types=self.event_types)
        found = read_users(dataset, _is_among(users), times=True)
        # With cold items the rest of a row is held out: some of it is of cold items of those domains.
        others = self._rows(found, training=bool(self.held_out.sets)).of_users(users).before(self.held_out.first_time)
        return others.keep(~np.isin(others.items, self.own_rows))

    @functools.cached_property
    def training_elsewhere(self) -> Events:
        """The training parts of the users in other domains, as rows of `everything`."""
        users = np.asarray(self.users)
        parts = [
            self._rows(read_users(dataset, _is_among(users), times=True), training=True).of_users(users)
            for dataset in (SequenceDataset(self.release, self.split, domain) for domain in self.other_domains)
        ]
        together = functools.reduce(merge, parts)
        return together.keep(~np.isin(together.items, self.own_rows))

    @functools.cached_property
    def training_interactions(self) -> IntArray:
        """[V] interactions of each row of the catalogue in the domain's training parts, of all users."""
        return training_interactions(open_dataset(self.table, self.release, self.split, self.domain), self.catalogue)

    @functools.cached_property
    def own_rows(self) -> IntArray:
        """[V] rows of the evaluated catalogue's items in `everything`."""
        return self.everything.rows(self.catalogue.global_index).astype(np.int64)

    def _rows(self, sequences: Sequences | None, *, training: bool = False) -> Events:
        return in_rows(sequences, self.everything, training=training)

    def training(self, domain: str, *, max_users: int) -> Events:
        """Training parts of a domain, of about `max_users` users, as rows of `everything`; without times."""
        dataset = SequenceDataset(self.release, self.split, domain)
        return training_histories(dataset, self.everything, max_users=max_users)


def in_rows(sequences: Sequences | None, catalogue: Catalogue, *, training: bool = False) -> Events:
    """Sequences, or their training parts, as rows of a catalogue."""
    if sequences is None:
        none = np.empty(0, np.int64)
        return Events.of(none, np.zeros(1, np.int64), none)
    whole = sequences.with_columns(items=catalogue.rows(sequences.items).astype(np.int64))
    return whole.until(sequences.valid_start if training else sequences.end)


def training_histories(dataset: SequenceDataset, catalogue: Catalogue, *, max_users: int) -> Events:
    """Training parts of about `max_users` users, in rows of a catalogue; without times."""
    share = max_users / max(dataset.num_rows, 1)
    return in_rows(read_users(dataset, lambda s: sampled(s.users, share)), catalogue, training=True)


def raw_users(release: Release, users: IntArray) -> list[str]:
    """Raw ids of users, who ascend. Raises DataError where the vocabulary lacks one."""
    found = release.read(tables.USERS, ["user", "index"], indices=users)
    if len(found) != len(users):
        raise DataError(
            f"expected {len(users):,} users of other tables in the table users, found {len(found):,} of them in "
            f"release {release.number} of {release.lake}; take another release, or write the lake anew: "
            f"`{spelled('etl', 'all')}`"
        )
    raw: list[str] = found.sort_by("index")["user"].to_pylist()
    return raw


def read_evaluation_set(release: Release, split: str, domain: str, part: Part, options: ReadOptions) -> EvaluationSet:
    """Pin the examples, with their times. Raises GraftrecError."""
    catalogue = read_catalogue(release, domain)
    options = dataclasses.replace(options, times=True)
    held_out = read_held_out(release, split, domain, catalogue, part, options)
    held_out = without_repeats(held_out, where=f"split {split!r} and domain {domain!r} for {part}")
    return EvaluationSet(release, split, domain, part, catalogue, held_out, tuple(options.event_types))


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
    listed: npt.NDArray[np.bool_] | None = None  # [U, R] the held-out items that can be found at all; None: all


# --- models ---------------------------------------------


def label_of(config: PretrainConfig) -> str:
    """The row of a model that is given no other name."""
    transfer = str(getattr(config, "transfer", config.name))
    return READS_ALL if transfer == "none" and config.data.predicted is not None else transfer


def as_known(
    trained_model: TrainedModel, given: Events, raw_users: Sequence[str], catalogue: Catalogue
) -> tuple[Events, IntArray]:
    """(Histories of a catalogue's rows as a model knows users and items, others left out; [V] its row of each row of
    the catalogue, UNK where it has none)."""
    rows = rows_by_raw_id(trained_model.catalogue, catalogue)
    own = dataclasses.replace(given.with_columns(items=rows[given.items]), users=user_rows(trained_model, raw_users))
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
    elsewhere before the first held-out item. A user of whom the model reads nothing, features of users included
    where it answers by them alone, gets the popular items, as when served: by interactions in the training parts of the
    evaluated split.

    Raises EvaluateError: it was trained on what is held out here, or (`must_know`) knows none of the items; without
    `must_know` such a model finds nothing.
    """
    reads_all = trained_model.config.data.domain == DOMAIN_ALL != examples.domain and bool(examples.other_domains)
    needs = trained_model.config.task.needs
    if needs.separators and needs.table != examples.table:
        raise EvaluateError(
            f"expected a model that reads the table {examples.table}, found {trained_model.folder}, which reads "
            f"{needs.table}; name a model first that does, too"
        )
    own_kinds = _kinds_as_known(trained_model, examples)
    if trained_model.config.reads_times:
        examples.release.require_times(tables.SEQUENCES, str(trained_model.folder))
    trained_model = with_release(
        trained_model, examples.release, examples.everything if reads_all else examples.catalogue
    )
    rows = rows_by_raw_id(trained_model.catalogue, examples.catalogue)
    known = np.flatnonzero(rows != UNK)
    known = known[known >= FIRST_INDEX]
    if (predicted_V := trained_model.predicted_V) is not None:
        known = known[predicted_V[rows[known]]]
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
    scorer = trained_model.scorer(device=device)
    candidates = rows[known]
    width = len(examples.catalogue)

    def score(histories: Events) -> Scores:
        place = np.searchsorted(examples.users, histories.users)
        given = source.take(place) if reads_all else histories
        kinds = own_kinds[given.event_types] if len(own_kinds) else own_kinds
        own = Events.of(own_users[place], given.offsets, item_rows[given.items], given.times, kinds)
        own = dataclasses.replace(own, request_times=histories.request_times)
        if len(known) == 0:
            return Scores.of(torch.full((1, 1), -torch.inf).expand(len(histories), width))
        is_read = own.items != UNK
        if not needs.separators:  # the same items, without what stands between baskets
            is_read &= own.items != SEP
        read = own.keep(is_read)
        scores, nothing_B = scorer.scores(read, candidates), torch.from_numpy(~answered(trained_model.model, read))
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
    if trained_model.config.reads_request_time:
        reads += ", and when the held-out event was: the request's time"
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
    """A domain's training part may hold what another holds out: that of `all` under `last-5` does, not so `causal`; so
    may that of another split of the same domain, which holds out less or orders ties otherwise; and a sequence's may
    hold the last basket, where that is longer than what the split holds out."""
    data, release = trained_model.config.data, examples.release
    if trained_model.lake == release.lake and trained_model.release > release.number:
        raise EvaluateError(
            f"expected a release at least as new as {trained_model.release}, which {trained_model.folder} was "
            f"trained on, found {release.number}, which may hold out what the model has seen; evaluate on a newer "
            "release"
        )
    same = (data.domain, trained_model.config.task.needs.table) == (examples.domain, examples.table)
    if data.split == examples.split and trained_model.lake == release.lake and data.split in release.by_time:
        until = described(release.lake, trained_model.release).by_time.get(data.split)
        if until is not None and until > release.by_time[data.split]:
            raise EvaluateError(
                f"expected a model trained until {release.by_time[data.split]:%Y-%m-%d}, as split {data.split!r} of "
                f"release {release.number} has it, found {trained_model.folder}, trained until {until:%Y-%m-%d} on "
                f"release {trained_model.release}; train it again, or evaluate later dates"
            )
    _refuse_cold(trained_model, examples)
    if same and data.split == examples.split:
        return
    if data.domain not in domains_with_sequences(examples.release, data.split):
        return
    dataset = SequenceDataset(examples.release, data.split, data.domain)
    trained = examples._rows(read_users(dataset, _is_among(examples.users)), training=True).of_users(examples.users)
    is_own = np.isin(trained.items, examples.own_rows)
    if same:  # who has nothing to read there gets the popular items, whatever the model was trained on
        is_own &= np.repeat(examples.held_out.histories.lengths > 0, trained.lengths)
    if leaked := _num_beyond(trained.keep(is_own), examples):
        raise EvaluateError(
            f"expected a model that has not seen what it is asked, found {leaked:,} held-out interactions of domain "
            f"{examples.domain!r} in what {trained_model.folder} was trained on (split {data.split!r}, domain "
            f"{data.domain!r}); train it on a split that is causal for {examples.domain!r}, and holds out as much"
        )


def _num_beyond(trained: Events, examples: EvaluationSet) -> int:
    """How many of the events `trained` on, in rows of `everything`, are not in the input, or not as often."""
    given, width = examples.input_anywhere, len(examples.everything)
    counts = []
    for events in (trained, given.keep(given.items >= FIRST_INDEX)):
        pairs, count = np.unique(events.owners * width + events.items, return_counts=True)
        counts.append(dict(zip(pairs.tolist(), count.tolist(), strict=True)))
    return sum(max(count - counts[1].get(pair, 0), 0) for pair, count in counts[0].items())


def _refuse_cold(trained_model: TrainedModel, examples: EvaluationSet) -> None:
    """Raises EvaluateError for a model that was trained on items that are cold here."""
    parts = cold_rows(examples.release, examples.split, examples.catalogue)
    if not parts:
        return
    rows = rows_by_raw_id(trained_model.catalogue, examples.catalogue)
    is_seen_V = (rows >= FIRST_INDEX) & (trained_model.popularity[rows] > 0)
    if seen := int((is_seen_V & (parts["validation"] | parts["test"])).sum()):
        raise EvaluateError(
            f"expected a model that has seen no cold item of split {examples.split!r}, found {seen:,} of them in what "
            f"{trained_model.folder} was trained on (split {trained_model.config.data.split!r}); train it on that split"
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
    last, weighed = f"last {config.last}", f"the n-th last weighs {config.decay}^n"
    domain, by_step = examples.domain, f"the n-th last weighs {fading}^n"
    rows: list[tuple[str, Any, Events, str]] = [
        (ITEM_TO_ITEM, within, here, f"{last} of {domain}"),
        (ITEM_TO_ITEM_DECAYED, decayed, here, f"{domain}, {weighed}"),
        (TRANSITIONS, following, here, f"last {steps} of {domain}, {by_step}"),
    ]
    if examples.other_domains:
        rest = [examples.training(other, max_users=config.max_users) for other in examples.other_domains]
        joined = functools.reduce(beside, [own, *rest])
        across = item_to_item(joined, num_items, last=config.last, towards=own_rows)
        across = dataclasses.replace(across, popularity=popular)
        fading_across = dataclasses.replace(across, last=None, decay=config.decay)
        training, prior = merge(here, examples.training_elsewhere), merge(here, examples.elsewhere)
        before = "all domains (others: until the first held-out item)"
        rows += [
            (ITEM_TO_ITEM_ALL_TRAINING, across, training, f"{last} of all domains (others: training part)"),
            (ITEM_TO_ITEM_ALL, across, prior, f"{last} of {before}"),
            (ITEM_TO_ITEM_ALL_DECAYED, fading_across, prior, f"{before}, {weighed}"),
        ]
    by_count = Scorer(POPULARITY, None, lambda given: Scores.of(popular.score(given, own_rows)), "nothing")
    of_friends = [_friends_scorer(examples, config)] if has_network(examples.release) else []
    return [by_count, *(_over(*row, examples) for row in rows), *of_friends]


def _friends_scorer(examples: EvaluationSet, config: BaselinesConfig) -> Scorer:
    """What friends have in their training parts, for users with or without a history."""
    taken = read_training(
        examples.release, examples.split, examples.domain, examples.catalogue, newest=config.friends_last
    )
    counted = counted_friends(read_network(examples.release), *taken)

    def score(given: Events) -> Scores:
        width = len(examples.catalogue)
        return Scores(len(given), width, lambda start, stop: counted.score(given.users, slice(start, stop)))

    return Scorer(FRIENDS, None, score, f"last {config.friends_last} of each friend")


def _over(label: str, scorer: Any, histories: Events, reads: str, examples: EvaluationSet) -> Scorer:
    """A baseline that reads its own histories of the evaluated users, as rows of all domains' catalogue."""

    def score(given: Events) -> Scores:
        own, rows = histories.take(np.searchsorted(examples.users, given.users)), examples.own_rows
        return Scores(len(own), len(rows), lambda start, stop: scorer.score(own, rows[start:stop]))

    return Scorer(label, None, score, reads)
