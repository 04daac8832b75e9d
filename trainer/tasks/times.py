"""When each position of a sequence was, and when it is asked, as tasks lay sequences out.

Where the request's time is not known (`model.time.request_time: last_event`), a position knows the times of the events
that it reads and no others.

Shape letters: ``B`` sequences, ``T`` positions.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.data.batch import Batch
from trainer.models import SequenceModel
from trainer.models.time import EventTimes

SECOND = 1_000_000  # in microseconds, as a batch has times


def seconds(times: Tensor) -> Tensor:
    """Whole seconds of microseconds."""
    return torch.div(times, SECOND, rounding_mode="floor")


def times_behind_cls(model: SequenceModel, batch: Batch) -> EventTimes | None:
    """Of [B, T + 1] positions, a CLS and the events: each is asked at the event that comes next, the last one at
    `batch.asked`, where there is such a time. A CLS is at the first event, or at the request where there is no event.
    None where the model reads no times."""
    if not model.config.reads_times:
        return None
    assert batch.times is not None, "times are read"
    events_BT, asked_B = seconds(batch.times), _asked(batch)
    first_B = torch.where(batch.lengths > 0, F.pad(events_BT, (0, 1))[:, 0], asked_B)
    own_BT = torch.cat([first_B[:, None], events_BT], 1)
    if not model.config.reads_request_time:
        return EventTimes.of(own_BT, own_BT)
    asked_BT = F.pad(events_BT, (0, 1)).scatter(1, batch.lengths[:, None], asked_B[:, None])
    return EventTimes.of(own_BT, asked_BT)


def times_before_mask(model: SequenceModel, batch: Batch) -> EventTimes | None:
    """Of [B, T + 1] positions, the events and a MASK behind the last, which is asked at `batch.asked`, or at the last
    event where the model doesn't know that. None where the model reads no times."""
    if not model.config.reads_times:
        return None
    assert batch.times is not None, "times are read"
    events_BT, asked_B = F.pad(seconds(batch.times), (0, 1)), _asked(batch)
    if not model.config.reads_request_time:
        last_B = events_BT.gather(1, (batch.lengths - 1).clamp(min=0)[:, None])[:, 0]
        asked_B = torch.where(batch.lengths > 0, last_B, asked_B)
    own_BT = events_BT.scatter(1, batch.lengths[:, None], asked_B[:, None])
    return EventTimes.of(own_BT, own_BT)


def times_of_masked(model: SequenceModel, batch: Batch, chosen_BT: Tensor) -> EventTimes | None:
    """Of a batch's events, some of them chosen to be predicted: these are at their own times, or, where the model
    doesn't know when it is asked, at that of the event before them which is not chosen; without one, of the first such
    event. None where the model reads no times."""
    if not model.config.reads_times:
        return None
    assert batch.times is not None, "times are read"
    own_BT = seconds(batch.times)
    if not model.config.reads_request_time:
        shown_BT = batch.mask_BT & ~chosen_BT
        never = torch.iinfo(torch.int64)
        before_BT = own_BT.masked_fill(~shown_BT, never.min).cummax(1).values
        first_B1 = own_BT.masked_fill(~shown_BT, never.max).amin(1, keepdim=True)
        first_B1 = torch.where(shown_BT.any(1, keepdim=True), first_B1, 0)
        own_BT = torch.where(before_BT == never.min, first_B1, before_BT)
    return EventTimes.of(own_BT, own_BT)


def _asked(batch: Batch) -> Tensor:
    """When each user asks, in seconds; in training nobody does, and no position that is trained reads it."""
    return torch.zeros_like(batch.lengths) if batch.asked is None else seconds(batch.asked)
