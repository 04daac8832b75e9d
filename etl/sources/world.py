"""The catalogue of the generated world: items, people, tastes, popularity, titles; O(items), the same on every worker.

A person (director, actor) has a taste, a direction in `tastes` dimensions; an item's taste is that of its people and
some of its own. Popularity within a domain follows Zipf's law. With `share_tastes` off, a person has another,
independent taste in each domain, so that nothing learned about people in one domain holds in the other.
"""

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from etl.config import GeneratorSource

DOMAINS = ("source", "target")
ACTORS = 3
_OWN_SHARE = 0.15  # of an item's taste that its people don't explain
_CELLS = 1_024  # at most, of items near each other in taste
_CELL_ITEMS = 12

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Shelf:
    """The items of one domain, most popular first. `V` items, `K` tastes."""

    items: Ints  # [V] index in the catalogue
    taste_VK: Floats  # unit vectors
    log_popularity_V: Floats
    cumulative_V: npt.NDArray[np.float64]  # popularity, up to 1
    cell_V: Ints  # the cell of items near in taste that an item is in
    cell_start: Ints  # [cells + 1] into cell_items
    cell_items: Ints  # [V] positions on this shelf, cell by cell


@dataclass(frozen=True)
class World:
    """`V` items; people 0 … directors - 1 direct, the others act."""

    domain_V: Ints  # 0 source, 1 target
    director_V: Ints
    actors_VA: Ints
    taste_VK: Floats
    year_V: Ints
    word_VW: Ints
    shelves: tuple[Shelf, Shelf]


@functools.lru_cache(maxsize=4)
def world(config: GeneratorSource) -> World:
    """The catalogue of a configuration; kept by each worker process."""
    draw = generator(config.seed, 0, 0)
    num_items, num_tastes = config.items, config.tastes
    num_directors = max(1, config.people // 4)
    num_target = min(max(1, round(num_items * config.target_share)), num_items - 1)
    domain = np.zeros(num_items, np.int64)
    domain[draw.permutation(num_items)[:num_target]] = 1
    director = draw.integers(0, num_directors, num_items)
    actors = _distinct(draw, num_items, config.people - num_directors) + num_directors
    person_DPK = unit(draw.standard_normal((2, config.people, num_tastes)))
    if config.share_tastes:
        person_DPK[1] = person_DPK[0]
    cast = person_DPK[domain, director] * 1.5 + person_DPK[domain[:, None], actors].sum(axis=1)
    own = unit(draw.standard_normal((num_items, num_tastes)))
    taste = unit(np.sqrt(1 - _OWN_SHARE) * unit(cast) + np.sqrt(_OWN_SHARE) * own).astype(np.float32)
    shelves = [_shelf(draw, np.flatnonzero(domain == number), taste, config) for number in range(2)]
    return World(
        domain_V=domain,
        director_V=director,
        actors_VA=actors,
        taste_VK=taste,
        year_V=draw.integers(1970, 2020, num_items),
        word_VW=draw.integers(0, 1 << 30, (num_items, 2)),
        shelves=(shelves[0], shelves[1]),
    )


def generator(seed: int, stream: int, number: int) -> np.random.Generator:
    """A random stream of its own for each (seed, stream, number): counter-based (Philox, Salmon et al. 2011)."""
    return np.random.Generator(np.random.Philox(key=[seed & (1 << 64) - 1, stream << 56 | number]))


def person_name(number: int) -> str:
    """A name of its own for each person: "Mira Talon"."""
    first, last = divmod(number * 7_919 % 1_000_003, 1_000)
    return f"{_syllables(first, 2)} {_syllables(last + 1_000 * (number // 1_000_003), 3)}"


def title(place: World, item: int) -> str:
    """A title of its own, whose words tell the item's two strongest tastes: "Silent River 17"."""
    strongest = np.argsort(-np.abs(place.taste_VK[item]))[:2]
    words = []
    for vocabulary, dimension in zip((_ADJECTIVES, _NOUNS), [*strongest, *strongest][:2], strict=True):
        side = int(place.taste_VK[item, dimension] > 0)
        words.append(vocabulary[(2 * int(dimension) + side) % len(vocabulary)])
    return f"{' '.join(words)} {item}"


def categories(place: World, item: int) -> list[str]:
    """The item's domain, and a genre by its strongest taste."""
    return [DOMAINS[place.domain_V[item]], f"genre-{int(np.argmax(np.abs(place.taste_VK[item])))}"]


def _shelf(draw: np.random.Generator, items: Ints, taste: Floats, config: GeneratorSource) -> Shelf:
    items = draw.permutation(items)
    popularity = np.arange(1, len(items) + 1, dtype=np.float64) ** -config.popularity_exponent
    cumulative = np.cumsum(popularity) / popularity.sum()
    cumulative[-1] = 1.0
    num_cells = min(max(1, len(items) // _CELL_ITEMS), _CELLS)
    centres = taste[items[draw.permutation(len(items))[:num_cells]]]
    cell = np.concatenate(
        [np.argmax(np.einsum("vk,ck->vc", taste[part], centres), axis=1) for part in _parts(items, 1 << 14)]
    )
    return Shelf(
        items=items,
        taste_VK=taste[items],
        log_popularity_V=np.log(popularity).astype(np.float32),
        cumulative_V=cumulative,
        cell_V=cell,
        cell_start=np.concatenate([[0], np.cumsum(np.bincount(cell, minlength=num_cells))]),
        cell_items=np.argsort(cell, kind="stable"),
    )


def _parts(items: Ints, size: int) -> list[Ints]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def _distinct(draw: np.random.Generator, rows: int, people: int) -> Ints:
    """[rows, ACTORS] people, distinct within a row where there are enough."""
    first = draw.integers(0, people, (rows, 1))
    steps = 1 + draw.integers(0, max(1, (people - 1) // ACTORS), (rows, ACTORS - 1)).cumsum(axis=1)
    return np.concatenate([first, (first + steps + np.arange(ACTORS - 1)) % people], axis=1)


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
