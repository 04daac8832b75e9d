"""What a network reads of events beside items: when they were, by log-spaced buckets, and which domain is asked.
Nothing at first: all begins at zero.

`RelativeBias`: what attention adds to a query's score of a key, by the time between them and by how far they stand
apart, for each head (HSTU: Zhai et al. 2024, section 3.2; positions as in T5: Raffel et al. 2020). As there, the query
of position i is made at the time of the event that it predicts, in an answer at the request's: `EventTimes.query_BT`.

`Intervals`: how long an event's predecessor lies before it and, where it is known, how long after it the next request
is, each a vector that is added to the item's. For any network that reads items.

`DomainAsked`: whether the item that a position predicts is of the domain that is asked (`data.ranked`); in an answer it
is.

A bucket holds the times between two powers of two, or the middle of them: 0 is under a second, then there are two
buckets for each doubling of seconds, 63 is 50 years and more (HSTU's: 2.3 for each doubling, its logarithm's base is
e^0.301). A bucket is the exponent and the first bit behind it of the number of seconds, no logarithm: on every machine
the same.

Shape letters: ``B`` sequences, ``T`` positions, ``Q`` queries, positions that attend, ``H`` heads, ``D`` width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.data.packing import Packing
from trainer.models.cpu.bucket_values import bucket_values

NUM_BUCKETS = 64
MOST_SECONDS = 2**31 - 1  # between two events of a sequence; what is further apart counts as so far


@dataclass(frozen=True)
class EventTimes:
    """Whole seconds [B, T] int32, since the first position's: `own` of each position's event, `query` of the event
    that it predicts, or of the request, where that is known; else as `own`. Anything past a sequence's end."""

    own_BT: Tensor
    query_BT: Tensor
    packed_since: Tensor | None = None  # [R, T] of packed rows: as `since_BT`, where neighbours may be of two sequences

    @property
    def since_BT(self) -> Tensor:
        """Seconds since the sequence's event before; 0 at the first."""
        return F.pad(self.own_BT.diff(dim=1), (1, 0)) if self.packed_since is None else self.packed_since

    @classmethod
    def of(cls, own_BT: Tensor, query_BT: Tensor) -> "EventTimes":
        """Of seconds int64 since any moment."""
        first_B1 = own_BT[:, :1]
        own, query = ((seconds - first_B1).clamp(0, MOST_SECONDS).int() for seconds in (own_BT, query_BT))
        return cls(own, query)

    def take(self, rows: Tensor) -> "EventTimes":
        """Those of some sequences, in that order."""
        return EventTimes(self.own_BT[rows], self.query_BT[rows])

    def until(self, end: int) -> "EventTimes":
        """Those of the first positions."""
        return EventTimes(self.own_BT[:, :end], self.query_BT[:, :end])

    def packed(self, packing: Packing) -> "EventTimes":
        """Those of the positions of packed rows."""
        return EventTimes(*(packing.packed(x) for x in (self.own_BT, self.query_BT, self.since_BT)))

    def split(self, sizes: Sequence[int]) -> list["EventTimes"]:
        """So many sequences each."""
        sizes = list(sizes)
        own, query = torch.split(self.own_BT, sizes), torch.split(self.query_BT, sizes)
        return [EventTimes(*both) for both in zip(own, query, strict=True)]


@dataclass(frozen=True)
class EventInputs:
    """What a network reads of events beside items. `event_types` int64 [B, T]: kinds of event, where the model reads
    them (`data.event_types`); 0 for none of them, or for a reserved row; None: all are. `times`: where it reads them
    (`model.time`). `asked` bool [B, T]: whether the item that the position predicts is of the domain that is asked,
    where it reads that (`model.domain_asked`)."""

    event_types_BT: Tensor | None = None
    times: EventTimes | None = None
    asked_BT: Tensor | None = None

    def take(self, rows: Tensor) -> "EventInputs":
        """Those of some sequences, in that order."""
        kinds, times, asked = self.event_types_BT, self.times, self.asked_BT
        return EventInputs(
            None if kinds is None else kinds[rows],
            None if times is None else times.take(rows),
            None if asked is None else asked[rows],
        )

    def packed(self, packing: Packing) -> "EventInputs":
        """Those of the positions of packed rows."""
        kinds, times, asked = self.event_types_BT, self.times, self.asked_BT
        return EventInputs(
            None if kinds is None else packing.packed(kinds),
            None if times is None else times.packed(packing),
            None if asked is None else packing.packed(asked, False),
        )

    def until(self, end: int) -> "EventInputs":
        """Those of the first positions."""
        kinds, times, asked = self.event_types_BT, self.times, self.asked_BT
        return EventInputs(
            None if kinds is None else kinds[:, :end],
            None if times is None else times.until(end),
            None if asked is None else asked[:, :end],
        )


ITEMS_ONLY = EventInputs()


def time_buckets(seconds: Tensor) -> Tensor:
    """Buckets int32 of how far times int32 lie apart, either way."""
    bits = seconds.abs().float().view(torch.int32)
    return (bits >> 22).sub_(253).clamp_(min=0)  # 253: of a second it is 1


class Intervals(nn.Module):
    """Vectors [B, T, D] of the time since the event before, and until the request."""

    def __init__(self, width: int, *, until: bool) -> None:
        super().__init__()
        self.since_embedding = nn.Parameter(torch.zeros(NUM_BUCKETS, width))
        self.until_embedding = nn.Parameter(torch.zeros(NUM_BUCKETS, width)) if until else None

    def forward(self, times: EventTimes) -> Tensor:
        found = F.embedding(time_buckets(times.since_BT), self.since_embedding)
        if self.until_embedding is not None:
            found = found + F.embedding(time_buckets(times.query_BT - times.own_BT), self.until_embedding)
        return found


class DomainAsked(nn.Module):
    """Vectors [B, T, D] of whether the domain that is asked is that of the predicted item."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.zeros(2, width))

    def forward(self, asked_BT: Tensor) -> Tensor:
        return F.embedding(asked_BT.int(), self.embedding)


@dataclass(frozen=True)
class Pairs:
    """Queries and the positions that they attend to, of some sequences: the same for all layers. `blocked`, 0 or -inf,
    [T, T] with `causal`, else [B, 1 or T, T]; `places` [B, Q]: of the queries, None: all."""

    buckets_BQT: Tensor
    apart_TT: Tensor  # int32: how far a query stands behind a key, from 0 on
    blocked: Tensor
    places_BQ: Tensor | None
    causal: bool

    @classmethod
    def of(cls, times: EventTimes, lengths_B: Tensor, T: int, *, causal: bool) -> "Pairs":
        """All pairs of the first T positions."""
        device, own_BT, query_BT = times.own_BT.device, times.own_BT[:, :T], times.query_BT[:, :T]
        if causal:
            is_blocked = torch.ones(T, T, dtype=torch.bool, device=device).triu(1)
        else:
            # An empty sequence looks at its first position: a softmax over nothing is no number.
            is_blocked = (torch.arange(T, device=device) >= lengths_B.clamp(min=1)[:, None])[:, None]
        blocked = torch.zeros(is_blocked.shape, device=device).masked_fill_(is_blocked, -torch.inf)
        place_T = torch.arange(T, dtype=torch.int32, device=device)
        apart_TT = place_T[:, None] - place_T + (T - 1)
        return cls(time_buckets(query_BT[:, :, None] - own_BT[:, None]), apart_TT, blocked, None, causal)

    @classmethod
    def packed(cls, times: EventTimes, sees_RTT: Tensor) -> "Pairs":
        """All pairs of packed rows, of which each position `sees` some."""
        T = sees_RTT.shape[1]
        place_T = torch.arange(T, dtype=torch.int32, device=sees_RTT.device)
        blocked = torch.zeros(sees_RTT.shape, device=sees_RTT.device).masked_fill(~sees_RTT, -torch.inf)
        buckets = time_buckets(times.query_BT[:, :, None] - times.own_BT[:, None])
        return cls(buckets, place_T[:, None] - place_T + (T - 1), blocked, None, causal=False)

    def of_places(self, places_BQ: Tensor) -> "Pairs":
        """Only those of queries at some places."""
        index = places_BQ[:, :, None].expand(-1, -1, self.buckets_BQT.shape[2])
        return Pairs(self.buckets_BQT.gather(1, index), self.apart_TT, self.blocked, places_BQ, self.causal)


class RelativeBias(nn.Module):
    """What is added to the scores of attention, [B, H, Q, T]; -inf for what a position may not look at."""

    def __init__(self, heads: int, max_length: int) -> None:
        super().__init__()
        self.max_length = max_length
        self.time_embedding = nn.Parameter(torch.zeros(heads, NUM_BUCKETS))
        self.position_embedding = nn.Parameter(torch.zeros(heads, 2 * max_length - 1))  # of i - j, ascending

    def forward(self, pairs: Pairs) -> Tensor:
        T = pairs.buckets_BQT.shape[2]
        apart_HX = self.position_embedding[:, self.max_length - T : self.max_length + T - 1]
        of_place = bucket_values(apart_HX, pairs.apart_TT)
        if pairs.causal:
            of_place = of_place + pairs.blocked.to(of_place.dtype)
        of_place = of_place[:, None] if pairs.places_BQ is None else of_place[:, pairs.places_BQ]
        if not pairs.causal:
            of_place = of_place + pairs.blocked.to(of_place.dtype)
        return (bucket_values(self.time_embedding, pairs.buckets_BQT) + of_place).transpose(0, 1)
