"""The catalogue of the generated world: items, people, topics, series, titles; O(items), the same on every worker.

A topic is a direction in `tastes` dimensions. A person (director, actor) works in one topic and has a taste near it; an
item has the topic of its director, its actors work in the same one, and its taste is that of its people and some of its
own. The parts of a series share their people. Popularity within a domain follows Zipf's law. People work in both
domains, so what a model learns about them in one holds in the other; with `share_tastes` off, a person has another
topic and taste in each. An item's title, year, genre and people go with its taste; with `feature_strength` below 1
some items of a domain exchange them.
"""

import functools
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from etl.config import GeneratorSource

DOMAINS = ("source", "target")
ACTORS = 3
BEGINNING = 1_577_836_800  # of the log: 2020-01-01, seconds
YEAR = 365 * 86_400
YEARS = 2  # in which users join and items come out
_DATES, _SHOWN = 4, 8  # random streams
_OWN_SHARE = 0.15  # of an item's taste that its people don't explain
_PERSON_SHARE = 0.5  # of a person's taste that the topic doesn't explain
_SERIES = (2, 4)  # parts, least and most

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class DomainItems:
    """The items of one domain, most popular first. `V` items, `K` tastes."""

    items: Ints  # [V] index in the catalogue
    taste_VK: Floats  # unit vectors
    topic_V: Ints
    log_popularity_V: Floats
    cumulative_V: npt.NDArray[np.float64]  # popularity, up to 1
    sequel_V: Ints  # the position of the series' next part; -1: none
    begins_V: npt.NDArray[np.bool_]  # no later part of a series
    released_V: Ints  # seconds since 1970; BEGINNING: there from the first day on
    phase_V: Floats  # where in the year its popularity stands, in radians


@dataclass(frozen=True)
class World:
    """`V` items, `Z` topics; people 0 … directors - 1 direct, the others act."""

    domain_V: Ints  # 0 source, 1 target
    director_V: Ints
    actors_VA: Ints
    taste_VK: Floats
    topic_V: Ints
    first_V: Ints  # the first part of the item's series; itself, where it is in none
    part_V: Ints  # from 0
    year_V: Ints
    word_VW: Ints
    topic_ZK: Floats  # unit vectors
    shown_V: Ints  # whose title, year, genre and people each item has: its own, or by feature_strength another's
    shelves: tuple[DomainItems, DomainItems]


@functools.lru_cache(maxsize=4)
def world(config: GeneratorSource) -> World:
    """The catalogue of a configuration; kept by each worker process."""
    draw = generator(config.seed, 0, 0)
    num_items, num_tastes = config.items, config.tastes
    num_target = min(max(1, round(num_items * config.target_share)), num_items - 1)
    domain = np.zeros(num_items, np.int64)
    domain[draw.permutation(num_items)[:num_target]] = 1
    first, part = _series(draw, domain, config.series_share)
    num_directors = max(1, config.people // 4)
    director = draw.integers(0, num_directors, num_items)[first]
    num_topics = config.topics if (config.people - num_directors) // config.topics >= ACTORS else 1
    actors = _actors(draw, director, config.people - num_directors, num_topics)[first] + num_directors
    topic_ZK = unit(draw.standard_normal((config.topics, num_tastes)))
    topic_DP = np.stack([np.r_[np.arange(num_directors), np.arange(config.people - num_directors)]] * 2) % config.topics
    own_DPK = unit(draw.standard_normal((2, config.people, num_tastes)))
    if config.share_tastes:
        own_DPK[1] = own_DPK[0]
    else:
        topic_DP[1] = draw.permutation(config.topics)[topic_DP[1]]
    person_DPK = np.sqrt(1 - _PERSON_SHARE) * topic_ZK[topic_DP] + np.sqrt(_PERSON_SHARE) * own_DPK
    cast = person_DPK[domain, director] * 1.5 + person_DPK[domain[:, None], actors].sum(axis=1)
    own = unit(draw.standard_normal((num_items, num_tastes)))
    taste = unit(np.sqrt(1 - _OWN_SHARE) * unit(cast) + np.sqrt(_OWN_SHARE) * own).astype(np.float32)
    topic = topic_DP[domain, director]
    shelves = [_shelf(draw, np.flatnonzero(domain == n), taste, topic, first, part, config) for n in range(2)]
    dates = generator(config.seed, _DATES, 0)  # a stream of its own, so that a calendar changes no item
    released, phase = _released(config, dates, first, part), dates.random(num_items) * 2 * np.pi
    shelves = [
        replace(shelf, released_V=released[shelf.items], phase_V=phase[shelf.items].astype(np.float32))
        for shelf in shelves
    ]
    return World(
        domain_V=domain,
        director_V=director,
        actors_VA=actors,
        taste_VK=taste,
        topic_V=topic,
        first_V=first,
        part_V=part,
        year_V=draw.integers(1970, 2015, num_items)[first] + 2 * part,
        word_VW=draw.integers(0, 1 << 30, (num_items, 2)),
        topic_ZK=topic_ZK.astype(np.float32),
        shown_V=_shown(config, domain),
        shelves=(shelves[0], shelves[1]),
    )


def _shown(config: GeneratorSource, domain: Ints) -> Ints:
    """[V] a permutation within each domain: all but a share `feature_strength` of the items change places at random, so
    the features stay the same ones, of other items."""
    draw, shown = generator(config.seed, _SHOWN, 0), np.arange(len(domain))
    strays = draw.random(len(domain)) >= config.feature_strength
    for number in range(len(DOMAINS)):
        items = np.flatnonzero(strays & (domain == number))
        shown[items] = draw.permutation(items)
    return shown


def generator(seed: int, stream: int, number: int) -> np.random.Generator:
    """A random stream of its own for each (seed, stream, number): counter-based (Philox, Salmon et al. 2011)."""
    return np.random.Generator(np.random.Philox(key=[seed & (1 << 64) - 1, stream << 56 | number]))


def person_name(number: int) -> str:
    """A name of its own for each person: "Mira Talon"."""
    first, last = divmod(number * 7_919 % 1_000_003, 1_000)
    return f"{_syllables(first, 2)} {_syllables(last + 1_000 * (number // 1_000_003), 3)}"


def title(place: World, item: int) -> str:
    """A unique title whose words name the item's two strongest tastes, "Silent River 17"; parts of a series share it:
    "Silent River 17, part 2"."""
    item = int(place.shown_V[item])
    first, part = int(place.first_V[item]), int(place.part_V[item])
    strongest = np.argsort(-np.abs(place.taste_VK[first]))[:2]
    words = []
    for vocabulary, dimension in zip((_ADJECTIVES, _NOUNS), [*strongest, *strongest][:2], strict=True):
        side = int(place.taste_VK[first, dimension] > 0)
        words.append(vocabulary[(2 * int(dimension) + side) % len(vocabulary)])
    return f"{' '.join(words)} {first}" + (f", part {part + 1}" if part else "")


def categories(place: World, item: int) -> list[str]:
    """The item's domain, and its topic as a genre."""
    return [DOMAINS[place.domain_V[item]], f"genre-{place.topic_V[place.shown_V[item]]}"]


def _series(draw: np.random.Generator, domain: Ints, share: float) -> tuple[Ints, Ints]:
    """[V] the first part of each item's series, and [V] which part it is; series lie within a domain."""
    first, part = np.arange(len(domain)), np.zeros(len(domain), np.int64)
    for number in range(2):
        items = draw.permutation(np.flatnonzero(domain == number))
        items = items[: int(share * len(items))]
        lengths = draw.integers(_SERIES[0], _SERIES[1] + 1, len(items))
        starts = np.concatenate([[0], np.cumsum(lengths)])
        which = np.searchsorted(starts, np.arange(len(items)), side="right") - 1
        first[items] = items[starts[which]] if len(items) else items
        part[items] = np.arange(len(items)) - starts[which]
    return first, part


def _released(config: GeneratorSource, draw: np.random.Generator, first: Ints, part: Ints) -> Ints:
    """[V] when each item comes out, in seconds; no part of a series before the one before it."""
    share, when = draw.random((2, len(first)))
    released = np.where(share < config.new_items, BEGINNING + (when * YEARS * YEAR).astype(np.int64), BEGINNING)
    order = np.lexsort((part, first))
    ordered, goes_on = released[order], np.diff(first[order]) == 0
    for _ in range(_SERIES[1] - 1):
        ordered[1:] = np.where(goes_on, np.maximum(ordered[1:], ordered[:-1]), ordered[1:])
    released[order] = ordered
    return released


def _actors(draw: np.random.Generator, director: Ints, num_actors: int, num_topics: int) -> Ints:
    """[V, ACTORS] of the director's topic (a number modulo `num_topics`)."""
    topic = director % num_topics
    size = (num_actors - 1 - topic) // num_topics + 1  # actors of the topic
    first = (draw.random((len(director), 1)) * size[:, None]).astype(np.int64)
    most = np.maximum((size - 1) // ACTORS, 1)
    gaps = 1 + (draw.random((len(director), ACTORS - 1)) * most[:, None]).astype(np.int64)
    places = np.concatenate([first, first + gaps.cumsum(axis=1)], axis=1) % size[:, None]
    return places * num_topics + topic[:, None]


def _shelf(
    draw: np.random.Generator, items: Ints, taste: Floats, topic: Ints, first: Ints, part: Ints, config: GeneratorSource
) -> DomainItems:
    items = draw.permutation(items)
    popularity = np.arange(1, len(items) + 1, dtype=np.float64) ** -config.popularity_exponent
    cumulative = np.cumsum(popularity) / popularity.sum()
    cumulative[-1] = 1.0
    by_part = np.lexsort((part[items], first[items]))
    sequel = np.full(len(items), -1)
    follows = first[items[by_part[1:]]] == first[items[by_part[:-1]]]
    sequel[by_part[:-1][follows]] = by_part[1:][follows]
    return DomainItems(
        items=items,
        taste_VK=taste[items],
        topic_V=topic[items],
        log_popularity_V=np.log(popularity).astype(np.float32),
        cumulative_V=cumulative,
        sequel_V=sequel,
        begins_V=part[items] == 0,
        released_V=np.full(len(items), BEGINNING),
        phase_V=np.zeros(len(items), np.float32),
    )


def unit(vectors: npt.NDArray[Any]) -> npt.NDArray[Any]:
    lengths: npt.NDArray[Any] = np.sqrt(np.square(vectors).sum(axis=-1, keepdims=True))
    scaled: npt.NDArray[Any] = vectors / np.maximum(lengths, 1e-12)
    return scaled


def _syllables(number: int, least: int) -> str:
    parts: list[str] = []
    while number or len(parts) < least:
        number, place = divmod(number, len(_SYLLABLES))
        parts.append(_SYLLABLES[place])
    return "".join(parts).capitalize()


_SYLLABLES_TEXT = "ba den fi gor ha jun ka lem mi nor pa quin ro sal ti ul va win xe yo"
_ADJECTIVES_TEXT = (
    "Silent Burning Golden Broken Hidden Endless Electric Frozen Gentle Hollow Crimson Distant Savage Tender "
    "Wild Lonely Secret Rising Bitter Radiant"
)
_NOUNS_TEXT = (
    "River Empire Garden Machine Harbour Winter Letter Mountain Dancer Shadow Kingdom Voyage Hunter Melody "
    "Island Mirror Storm Orchard Signal Carnival"
)
_SYLLABLES, _ADJECTIVES, _NOUNS = (text.split() for text in (_SYLLABLES_TEXT, _ADJECTIVES_TEXT, _NOUNS_TEXT))
