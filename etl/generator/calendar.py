"""The calendar of the generated log: when users are there, and which items there are and are in fashion then.

Without a calendar a user takes items for about LIFE from the day it joins on. With one, users come back after breaks
of a month and more, items come out while the log is under way and are in demand for some weeks, every item's popularity
has its own time of the year, and evenings, weekends and winters are busier.

Shape letters: ``B`` users of a block, ``T`` picks, ``C`` candidates, ``N`` breaks.
"""

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from etl.config import GeneratorSource
from etl.generator.synthetic_catalogue import BEGINNING, YEAR, YEARS, DomainItems, Floats, Ints, generator

DAY, HOUR = 86_400, 3_600
LIFE = 200 * DAY  # about how long a user stays, without breaks
_BREAK = (30 * DAY, 60 * DAY)  # at least, and what is added on average
_FRESH = 2.0  # logarithm of how much more popular an item is when it comes out
_FADES = 30  # days until that is a third
_MOST = 20 * YEAR  # no event is later
_UNTIL = 0.8  # share of a life after which no break begins
_NEVER = 1 << 60
_TIMES, _BREAKS = (5, 6), 7  # random streams; of the two domains


def gaps(
    begins_BT: npt.NDArray[np.bool_],
    uniform_BT: npt.NDArray[np.float64],
    sessions_B1: npt.NDArray[np.float64],
    kept_BT: npt.NDArray[np.bool_],
) -> Ints:
    """[B, T] seconds since the pick before: hours and days before a session, minutes within it."""
    between = np.minimum(-np.log1p(-uniform_BT) * LIFE / (sessions_B1 + 1), LIFE)
    gap = np.where(begins_BT, HOUR + between, (20 + 600 * uniform_BT) * kept_BT)
    return gap.astype(np.int64)


@dataclass(frozen=True)
class Lives:
    """When the users of a block are there. A break is the same in both domains. `N` breaks of a user, padded."""

    config: GeneratorSource
    users: Ints  # [B]
    starts_BN: Ints  # seconds, as if there had been no break before
    lengths_BN: Ints

    def seconds(self, begins_BT: npt.NDArray[np.bool_], begins_B: Ints, counts: Ints, domain: int) -> Ints:
        """[B, T] times of a domain's picks, from `begins_B` on, with breaks, at the hours that the season prefers."""
        uniform_BT = np.zeros(begins_BT.shape)
        for row, (user, count) in enumerate(zip(self.users.tolist(), counts.tolist(), strict=True)):
            uniform_BT[row, :count] = generator(self.config.seed, _TIMES[domain], user).random(count)
        sessions_B1 = counts[:, None] / self.config.session_events
        gap_BT = gaps(begins_BT, uniform_BT, sessions_B1, np.ones_like(begins_BT))
        own_BT = self._without_breaks(begins_B)[:, None] + np.cumsum(gap_BT, axis=1)
        session_BT = np.maximum.accumulate(np.where(begins_BT, own_BT, 0), axis=1)  # a break parts no session
        passed_BTN = session_BT[..., None] >= self.starts_BN[:, None]
        return _in_season(own_BT + (passed_BTN * self.lengths_BN[:, None]).sum(-1), self.config.season)

    def _without_breaks(self, time_B: Ints) -> Ints:
        """The times, less the breaks before them."""
        ends_BN = self.starts_BN + np.cumsum(self.lengths_BN, axis=1)
        passed_B: Ints = (self.lengths_BN * (ends_BN <= time_B[:, None])).sum(1)
        return time_B - passed_B


def lives(config: GeneratorSource, users: Ints, joined_B: Ints) -> Lives:
    """The breaks of users who joined then, in seconds: as many as `config.returns` on average."""
    draws = [generator(config.seed, _BREAKS, int(user)) for user in users]
    numbers = np.array([draw.poisson(config.returns) for draw in draws])
    starts_BN = np.full((len(users), int(numbers.max(initial=0))), _NEVER)
    lengths_BN = np.zeros_like(starts_BN)
    for row, (draw, number) in enumerate(zip(draws, numbers, strict=True)):
        starts_BN[row, :number] = joined_B[row] + np.sort(draw.random(number) * _UNTIL * LIFE)
        lengths_BN[row, :number] = _BREAK[0] + draw.exponential(_BREAK[1], number)
    return Lives(config, users, starts_BN, lengths_BN)


@dataclass(frozen=True)
class Offers:
    """What there is for each user to choose from, by date. Made by `offers`, so that a date costs few sums."""

    released_BC: Floats  # days since BEGINNING
    fashion_2BC: Floats  # what the year's sine and cosine count for
    fresh_BC: Floats

    def at(self, seconds_B: Ints) -> Floats:
        """[B, C] what is added to the logarithm of popularity: -inf before an item comes out, more when it is new or in
        fashion."""
        days_B1 = ((seconds_B[:, None] - BEGINNING) / DAY).astype(np.float32)
        of_year_B1 = days_B1 * np.float32(2 * np.pi * DAY / YEAR)
        more_BC: Floats = np.sin(of_year_B1) * self.fashion_2BC[0] + np.cos(of_year_B1) * self.fashion_2BC[1]
        more_BC += np.exp(-days_B1 / np.float32(_FADES)) * self.fresh_BC
        more_BC[self.released_BC > days_B1] = -np.inf
        return more_BC


def offers(config: GeneratorSource, shelf: DomainItems, item_BC: Ints) -> Offers:
    """Of the candidates `item_BC`, positions on the shelf."""
    days_V = ((shelf.released_V - BEGINNING) / DAY).astype(np.float32)
    fashion_2V = config.trends * np.sqrt(2) * np.stack([np.cos(shelf.phase_V), np.sin(shelf.phase_V)])
    fresh_V = np.where(days_V > 0, _FRESH * np.exp(days_V / _FADES), 0).astype(np.float32)
    return Offers(days_V[item_BC], fashion_2V.astype(np.float32)[:, item_BC], fresh_V[item_BC])


def _in_season(time: Ints, season: float) -> Ints:
    """Times moved to the busy hours, in the same order: as a process of constant rate becomes one of changing rate."""
    if not season:
        return time
    passed = np.interp(np.minimum(time - BEGINNING, _MOST), _work(season), np.arange(len(_work(season))) * HOUR)
    return BEGINNING + passed.astype(np.int64)


@functools.lru_cache(maxsize=2)
def _work(season: float) -> npt.NDArray[Any]:
    """Seconds of a constant rate that have passed at each full hour since BEGINNING, a Wednesday."""
    hour = np.arange(_MOST // HOUR)
    day = hour // 24
    evening = np.sin(2 * np.pi * (hour % 24 - 14) / 24)  # most at 20 UTC
    weekend = np.where(np.isin((day + 2) % 7, (5, 6)), 1.0, -0.4)
    winter = np.cos(2 * np.pi * day / 365)
    rate = np.exp(season * (0.8 * evening + 0.5 * weekend + 0.4 * winter))
    whole = 24 * 365 * YEARS
    passed: npt.NDArray[Any] = np.concatenate([[0], np.cumsum(rate * HOUR)]) * whole / rate[:whole].sum()
    return passed
