"""When each position's event was, and when its query is made, as tasks lay sequences out.

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
    """Of [B, T + 1] positions, a CLS and the events: the query of each is at the next event, that of the last at
    `batch.request_times`, where there are any. A CLS is at the first event, or at the request where there is no event.
    None where the model reads no times."""
    if not model.config.reads_times:
        return None
    assert batch.times is not None, "times are read"
    events_BT, request_B = seconds(batch.times), _request_seconds(batch)
    first_B = torch.where(batch.lengths > 0, F.pad(events_BT, (0, 1))[:, 0], request_B)
    own_BT = torch.cat([first_B[:, None], events_BT], 1)
    if not model.config.reads_request_time:
        return EventTimes.of(own_BT, own_BT)
    query_BT = F.pad(events_BT, (0, 1)).scatter(1, batch.lengths[:, None], request_B[:, None])
    return EventTimes.of(own_BT, query_BT)


def times_before_mask(model: SequenceModel, batch: Batch) -> EventTimes | None:
    """Of [B, T + 1] positions, the events and a MASK behind the last, which is at `batch.request_times`, or at the
    last event where the model doesn't know that. None where the model reads no times."""
    if not model.config.reads_times:
        return None
    assert batch.times is not None, "times are read"
    events_BT, request_B = F.pad(seconds(batch.times), (0, 1)), _request_seconds(batch)
    if not model.config.reads_request_time:
        last_B = events_BT.gather(1, (batch.lengths - 1).clamp(min=0)[:, None])[:, 0]
        request_B = torch.where(batch.lengths > 0, last_B, request_B)
    own_BT = events_BT.scatter(1, batch.lengths[:, None], request_B[:, None])
    return EventTimes.of(own_BT, own_BT)


def times_of_masked(model: SequenceModel, batch: Batch, chosen_BT: Tensor) -> EventTimes | None:
    """Of a batch's events, some of them chosen to be predicted: these are at their own times, or, where the model
    doesn't read the request's time, at that of the event before them which is not chosen; without one, of the first
    such event. None where the model reads no times."""
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


def _request_seconds(batch: Batch) -> Tensor:
    """When requests are made; 0 in training, where no position that is trained reads it."""
    return torch.zeros_like(batch.lengths) if batch.request_times is None else seconds(batch.request_times)
