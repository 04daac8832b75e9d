"""Batches packed and copied to the device while the step before them runs.

A thread takes batches from the loader, packs them, and starts their copies, from pinned memory on a stream of their
own; the trainer finds the next one ready. The state that a checkpoint holds is that of the batch in use, not of the
thread.
"""

import queue
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from etl.tables import PAD, UNK
from trainer.data.batch import Batch
from trainer.data.packing import Packing

READY = 2  # batches that wait, at most


class Batches(Protocol):
    """What a training run asks of a loader."""

    epoch: int
    step: int  # of the next batch

    @property
    def num_steps(self) -> int: ...
    def __iter__(self) -> Iterator[Batch]: ...
    def state_dict(self) -> dict[str, int]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Ahead:
    """Another loader's batches, packed to at most `rows` sequences of `max_length` and on the device."""

    def __init__(self, loader: Batches, *, rows: int, max_length: int, device: torch.device) -> None:
        self.loader, self.rows, self.max_length, self.device = loader, rows, max_length, device
        self.epoch, self.step = loader.epoch, loader.step
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._num_steps: tuple[int, int] | None = None  # epoch, its steps

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loader.load_state_dict(state)
        self.epoch, self.step = int(state["epoch"]), int(state["step"])

    @property
    def num_steps(self) -> int:
        """Batches of the current epoch; found before the thread may be in the next one."""
        if self._num_steps is None or self._num_steps[0] != self.epoch:
            self.loader.load_state_dict(self.state_dict())
            self._num_steps = self.epoch, self.loader.num_steps
        return self._num_steps[1]

    def __iter__(self) -> Iterator[Batch]:
        """The rest of the current epoch; afterwards the state is at the next epoch's start. Raises what the loader
        does."""
        assert self.num_steps >= 0
        self.loader.load_state_dict(self.state_dict())
        ready: queue.Queue[tuple[Batch, Any] | BaseException | None] = queue.Queue(READY)
        left = threading.Event()

        def put(found: tuple[Batch, Any] | BaseException | None) -> None:
            while not left.is_set():
                try:
                    return ready.put(found, timeout=0.1)
                except queue.Full:
                    continue

        def run() -> None:
            try:
                for batch in self.loader:
                    put(self._copied(packed(batch, rows=self.rows, max_length=self.max_length)))
                    if left.is_set():
                        return
                put(None)
            except BaseException as error:  # the trainer's thread raises it
                put(error)

        thread = threading.Thread(target=run, name="ahead", daemon=True)
        thread.start()
        try:
            while (found := ready.get()) is not None:
                if isinstance(found, BaseException):
                    raise found
                batch, copied = found
                self._wait(batch, copied)
                self.step += 1
                yield batch
            self.epoch, self.step = self.epoch + 1, 0
        finally:
            left.set()
            thread.join()

    def _copied(self, batch: Batch) -> tuple[Batch, Any]:
        """The batch on its way to the device, and the event of its arrival."""
        if self._copies is None:
            return batch.to(self.device), None
        with torch.cuda.stream(self._copies):
            found = batch.pinned().to(self.device)
            return found, self._copies.record_event()

    def _wait(self, batch: Batch, copied: Any) -> None:
        """The device's work from here on waits for the copy; this thread doesn't."""
        if copied is None:
            return
        stream = torch.cuda.current_stream(self.device)
        stream.wait_event(copied)
        for tensor in batch.tensors():
            if tensor.device.type == "cuda":
                tensor.record_stream(stream)  # its memory is not the next copy's before the step is done with it


def packed(batch: Batch, *, rows: int, max_length: int) -> Batch:
    """A batch of at most `rows` sequences of at most `max_length` items, with its `packing`: padded to [rows,
    max_length], the last sequences empty. A pure function of the batch."""
    more, wider = rows - len(batch.items), max_length - batch.items.shape[1]

    def padded(values_BT: Tensor | None, fill: int = 0) -> Tensor | None:
        return None if values_BT is None else F.pad(values_BT, (0, wider, 0, more), value=fill)

    return replace(
        batch,
        items=F.pad(batch.items, (0, wider, 0, more), value=PAD),
        lengths=F.pad(batch.lengths, (0, more)),
        users=F.pad(batch.users, (0, more), value=UNK),
        owners=batch.users if batch.owners is None else batch.owners,  # on the host, for messages
        values=padded(batch.values),
        event_types=padded(batch.event_types),
        times=padded(batch.times),
        packing=Packing.of(
            batch.lengths.numpy(), batch.draw, first=batch.rows.start or 0, rows=rows, max_length=max_length
        ),
    )
