"""Simulated users: which items they take in the generated log, and in which order.

A user has a taste that drifts from an early to a late vector, and takes items in sessions. A session has a topic.
Topics lie on a ring: the next session's topic is a fixed step away, whose length and direction are the user's own, or,
less often, a random topic by taste. An event is the next part of a series that the user began earlier, an item of the
session's topic, or any item; items are drawn by popularity and taste, and none is taken twice. So the next item depends
on the user and on earlier sessions, which counts of neighbouring items can't capture. Taste and step are the same in
both domains, unless `share_tastes` is off.

Shape letters: ``B`` users of a block, ``T`` picks, ``C`` candidates, ``K`` tastes, ``Z`` topics, ``D`` domains.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from etl.config import GeneratorSource
from etl.generator import calendar
from etl.generator.synthetic_catalogue import DomainItems, Floats, Ints, World, generator, unit

COMMUNITY = 32  # users
_ALIKE = 0.5  # share of a user's taste that is the community's
_FAVOUR = 1.0  # how strongly taste decides the random topics
_MOST_STEP = 3  # topics
_WAIT = 4  # least number of picks between two parts of a series
_CANDIDATES = 2_048  # a larger shelf is first sampled by popularity
_USERS, _COMMUNITIES = 1, 2  # random streams
_NEVER = np.float32(-np.inf)

Uniforms = npt.NDArray[np.float64]


@dataclass(frozen=True)
class UserTastes:
    """What a block of users likes in the source and in the target domain."""

    early_DBK: Floats  # unit vectors
    late_DBK: Floats
    step_DB: Ints  # from a session's topic to the next one's
    favour_DBZ: npt.NDArray[np.float64]  # cumulative probabilities of the random topics


@dataclass(frozen=True)
class DomainActivity:
    """How much the users of a block take in one domain, and from when on."""

    domain: int
    counts_B: Ints  # items; fewer are taken if a user runs out of candidates
    begins_B: Ints  # the time of the first, in seconds since 1970
    age_B: npt.NDArray[np.float64]  # how far the tastes have drifted at the first, 0 to 1
    lives: calendar.Lives | None  # of a log with a calendar


@dataclass(frozen=True)
class Picks:
    """What a block of users takes in one domain, in order, padded."""

    item_BT: Ints  # positions on the shelf
    kept_BT: npt.NDArray[np.bool_]
    begins_BT: npt.NDArray[np.bool_]  # the first of a session
    match_BT: Floats  # taste match, about standard normal over items
    seconds_BT: Ints | None = None  # since 1970, in a log with a calendar


def draw_tastes(config: GeneratorSource, place: World, users: Ints) -> UserTastes:
    """The tastes of the users with these numbers; they depend on nothing else but the configuration."""
    draws = [generator(config.seed, _USERS, int(user)) for user in users]
    own = np.stack([draw.standard_normal((2, 2, config.tastes)) for draw in draws], axis=2)
    communities, which = np.unique(users // COMMUNITY, return_inverse=True)
    centres = np.stack(
        [generator(config.seed, _COMMUNITIES, int(c)).standard_normal((2, config.tastes)) for c in communities], axis=1
    )
    early = unit(np.sqrt(_ALIKE) * unit(centres)[:, which] + np.sqrt(1 - _ALIKE) * unit(own[0]))
    late = unit(np.sqrt(1 - config.drift) * early + np.sqrt(config.drift) * unit(own[1]))
    most = max(1, min(_MOST_STEP, (config.topics - 1) // 2))
    step = np.stack([draw.integers(1, most + 1, 2) * (2 * draw.integers(0, 2, 2) - 1) for draw in draws], axis=1)
    if config.share_tastes:
        for both in (early, late, step):
            both[1] = both[0]
    favour_DBZ = np.exp(_FAVOUR * np.sqrt(config.tastes) * early @ place.topic_ZK.T).cumsum(axis=-1)
    return UserTastes(early.astype(np.float32), late.astype(np.float32), step, favour_DBZ / favour_DBZ[..., -1:])


def most_picks(shelf: DomainItems) -> int:
    """The most items that a user takes in a domain: half of it, or half of the candidates in a large one."""
    return max(1, min(len(shelf.items), _CANDIDATES) // 2)


def pick(
    config: GeneratorSource,
    shelf: DomainItems,
    tastes: UserTastes,
    activity: DomainActivity,
    draws: list[np.random.Generator],
) -> Picks:
    """The items of each user in one domain, in order. `draws`: a random stream for each user."""
    domain, counts, age_B, lives = activity.domain, activity.counts_B, activity.age_B, activity.lives
    num_users, num_picks = len(counts), int(counts.max())
    uniform_5BT = np.ones((5, num_users, num_picks))
    for row, (draw, count) in enumerate(zip(draws, counts, strict=True)):
        uniform_5BT[:, row, :count] = draw.random((5, count))
    begins_BT = _sessions(config, uniform_5BT[0])
    seconds_BT = None if lives is None else lives.seconds(begins_BT, activity.begins_B, counts, domain)
    candidates = _candidates(shelf, num_users, draws)
    passed_BT = np.minimum(np.arange(num_picks) / np.maximum(counts - 1, 1)[:, None], 1)
    ages_BT = (age_B[:, None] + (1 - age_B[:, None]) * passed_BT).astype(np.float32)
    topic_BT = _topics(config, tastes, domain, begins_BT, uniform_5BT[1:3])
    taste_2BK = np.stack([tastes.early_DBK[domain], tastes.late_DBK[domain]])
    by_taste = domain == 1 or config.source_teaches
    if by_taste:
        context = _PickContext(topic_BT, ages_BT, uniform_5BT[3:], seconds_BT)
        item_BT, kept_BT = _pick_by_taste(config, shelf, candidates, taste_2BK, context)
    else:
        item_BT, kept_BT = _pick_by_popularity(candidates, uniform_5BT[3])
    if seconds_BT is not None:
        kept_BT &= shelf.released_V[item_BT] <= seconds_BT
    kept_BT &= np.arange(num_picks) < counts[:, None]
    taste_BTK = taste_2BK[0][:, None] * (1 - ages_BT[..., None]) + taste_2BK[1][:, None] * ages_BT[..., None]
    match_BT = np.einsum("btk,btk->bt", taste_BTK, shelf.taste_VK[item_BT]) * np.float32(np.sqrt(config.tastes))
    if not by_taste:
        match_BT = uniform_5BT[4].astype(np.float32) * 2 - 1
    return Picks(item_BT, kept_BT, begins_BT, match_BT, seconds_BT)


@dataclass(frozen=True)
class _Candidates:
    """What each user may choose from, with a random utility for each: taking the best that is left, again and again,
    draws without replacement (Gumbel top-k, Kool et al. 2019)."""

    item_BC: Ints
    liking_BC: Floats  # popularity and chance


@dataclass(frozen=True)
class _PickContext:
    """What decides each pick beside the user's candidates and tastes."""

    topic_BT: Ints  # of the pick's session
    age_BT: Floats  # how far the tastes have drifted, 0 to 1
    uniform_2BT: Uniforms  # for the kind of pick, and for which series goes on
    seconds_BT: Ints | None  # since 1970, in a log with a calendar


def _candidates(shelf: DomainItems, num_users: int, draws: list[np.random.Generator]) -> _Candidates:
    num_items = len(shelf.items)
    if num_items <= _CANDIDATES:
        gumbel_BC = np.stack([draw.gumbel(size=num_items) for draw in draws]).astype(np.float32)
        return _Candidates(
            np.broadcast_to(np.arange(num_items), (num_users, num_items)), shelf.log_popularity_V + gumbel_BC
        )
    uniform_2BC = np.stack([draw.random((2, _CANDIDATES)) for draw in draws], axis=1)
    gumbel_BC = -np.log(-np.log(np.maximum(uniform_2BC[1], 1e-300)))
    return _Candidates(np.searchsorted(shelf.cumulative_V, uniform_2BC[0]), gumbel_BC.astype(np.float32))


def _topics(
    config: GeneratorSource, tastes: UserTastes, domain: int, begins_BT: npt.NDArray[np.bool_], uniform_2BT: Uniforms
) -> Ints:
    """[B, T] the topic of each pick's session."""
    favour_BZ = tastes.favour_DBZ[domain]
    random_BT = (uniform_2BT[1][..., None] >= favour_BZ[:, None]).sum(axis=-1) % config.topics
    topic_BT = np.empty(begins_BT.shape, np.int64)
    topic_B = random_BT[:, 0]
    for at in range(begins_BT.shape[1]):
        steps_B = (topic_B + tastes.step_DB[domain]) % config.topics
        new_B = np.where(uniform_2BT[0, :, at] < config.rhythm, steps_B, random_BT[:, at])
        topic_BT[:, at] = topic_B = np.where(begins_BT[:, at], new_B, topic_B)
    return topic_BT


def _sessions(config: GeneratorSource, uniform_BT: Uniforms) -> npt.NDArray[np.bool_]:
    """Whether a pick is a session's first; a session's length is drawn from half to one and a half of the mean."""
    least, most = (max(1, round(share * config.session_events)) for share in (0.5, 1.5))
    begins_BT = np.zeros(uniform_BT.shape, bool)
    left_B = np.zeros(len(uniform_BT), np.int64)
    for at in range(uniform_BT.shape[1]):
        begins_BT[:, at] = left_B == 0
        length_B = least + (np.minimum(uniform_BT[:, at], 1 - 1e-9) * (most - least + 1)).astype(np.int64)
        left_B = np.where(left_B == 0, length_B, left_B) - 1
    return begins_BT


def _pick_by_taste(
    config: GeneratorSource,
    shelf: DomainItems,
    candidates: _Candidates,
    taste_2BK: Floats,
    context: _PickContext,
) -> tuple[Ints, npt.NDArray[np.bool_]]:
    """[B, T] items by series, topic, taste and popularity; and which picks found an item."""
    topic_BT, uniform_2BT, seconds_BT = context.topic_BT, context.uniform_2BT, context.seconds_BT
    item_BC = candidates.item_BC
    strength = np.float32(config.taste_strength * np.sqrt(config.tastes))
    taste_BCK = shelf.taste_VK[item_BC]
    early_BC, late_BC = (np.einsum("bk,bck->bc", taste, taste_BCK) * strength for taste in taste_2BK)
    free_BC = np.where(shelf.begins_V[item_BC], candidates.liking_BC, _NEVER)  # later parts come as sequels only
    topic_BC = shelf.topic_V[item_BC]
    offers = calendar.offers(config, shelf, item_BC) if seconds_BT is not None else None
    num_users, num_picks = topic_BT.shape
    rows = np.arange(num_users)
    item_BT, kept_BT = np.zeros((num_users, num_picks), np.int64), np.zeros((num_users, num_picks), bool)
    pending_BT = np.full((num_users, num_picks), -1)
    for step in range(num_picks):
        age_B1 = context.age_BT[:, step, None]
        score_BC = free_BC + early_BC * (1 - age_B1) + late_BC * age_B1
        if offers is not None and seconds_BT is not None:
            score_BC += offers.at(seconds_BT[:, step])
        kind_B = uniform_2BT[0, :, step]
        on_topic_BC = np.where(topic_BC == topic_BT[:, step, None], score_BC, _NEVER)
        chosen = np.where(kind_B < config.topical, on_topic_BC.argmax(axis=1), score_BC.argmax(axis=1))
        chosen = np.where(np.isfinite(on_topic_BC[rows, chosen]), chosen, score_BC.argmax(axis=1))
        item_B, found_B = item_BC[rows, chosen], np.isfinite(score_BC[rows, chosen])
        if step >= _WAIT:
            begun_BT = pending_BT[:, : step - _WAIT + 1]
            if seconds_BT is not None:
                begun_BT = np.where(shelf.released_V[begun_BT] <= seconds_BT[:, step, None], begun_BT, -1)
            sequel_B, place_B = _sequel(begun_BT, uniform_2BT[1, :, step])
            is_sequel = (place_B >= 0) & (kind_B > 1 - config.sequels)
            item_B, found_B = np.where(is_sequel, sequel_B, item_B), found_B | is_sequel
            pending_BT[rows[is_sequel], place_B[is_sequel]] = -1
        item_BT[:, step], kept_BT[:, step] = item_B, found_B
        pending_BT[:, step] = np.where(found_B, shelf.sequel_V[item_B], -1)
        free_BC[item_BC == item_B[:, None]] = _NEVER
    return item_BT, kept_BT


def _sequel(pending_BT: Ints, uniform_B: Uniforms) -> tuple[Ints, Ints]:
    """The next part of a random series that each user has begun, and its place in `pending_BT`; -1: none."""
    open_BT = pending_BT >= 0
    number_B = open_BT.sum(axis=1)
    wanted_B = (uniform_B * number_B).astype(np.int64) + 1
    place_B = np.where(number_B > 0, (open_BT.cumsum(axis=1) == wanted_B[:, None]).argmax(axis=1), -1)
    return pending_BT[np.arange(len(place_B)), place_B], place_B


def _pick_by_popularity(candidates: _Candidates, uniform_BT: Uniforms) -> tuple[Ints, npt.NDArray[np.bool_]]:
    """[B, T] items by popularity alone, in random order; `uniform_BT` is 1 after a user's last pick."""
    best_BT = np.argsort(-candidates.liking_BC, axis=1)[:, : uniform_BT.shape[1]]
    shuffled_BT = np.argsort(uniform_BT, axis=1, kind="stable")
    item_BT = np.take_along_axis(candidates.item_BC, np.take_along_axis(best_BT, shuffled_BT, axis=1), axis=1)
    order_BT = np.argsort(item_BT, axis=1, kind="stable")
    sorted_BT = np.take_along_axis(item_BT, order_BT, axis=1)
    fresh_BT = np.ones(item_BT.shape, bool)
    fresh_BT[:, 1:] = sorted_BT[:, 1:] != sorted_BT[:, :-1]
    kept_BT = np.empty(item_BT.shape, bool)
    np.put_along_axis(kept_BT, order_BT, fresh_BT, axis=1)
    return item_BT, kept_BT
