"""Requests that come at once are answered at once: whatever waits when the model is free is scored as one batch.

A batch is what came while the one before it was computed. Where that had several requests, its clients are likely to
ask again at once, so the next waits some milliseconds for as many: a batch of 8 costs little more than one of 1.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from trainer.config import ServingLimitsConfig
from trainer.inference.recommender import Answer, Request, RequestError
from trainer.registry.loading import Served
from trainer.serving.metrics import Metrics
from trainer.serving.split import Split

STUCK_SECONDS = 60.0  # a batch that takes longer than this, and than an answer may, never ends


class Overloaded(Exception):
    """More waits than may wait, or for longer than it may."""


@dataclass(frozen=True, eq=False)
class _Job:
    """The records of one HTTP request."""

    requests: Sequence[Request]
    k: int
    domain: str
    answers: "asyncio.Future[list[Answer]]"


_Outcome = list[Answer] | Exception


class Batcher:
    """Answers requests of one event loop by what `current` gives, a batch at a time, in a thread of its own.

    A batch is answered by one version as a whole, and batches one after the other: versions never go back. Everything
    but the answers themselves happens in the event loop.
    """

    def __init__(self, current: Callable[[], Served | Split], limits: ServingLimitsConfig, metrics: Metrics) -> None:
        self._current, self._limits, self._metrics = current, limits, metrics
        self._thread = ThreadPoolExecutor(1, "answer")
        self._jobs: deque[_Job] = deque()
        self._waiting = 0  # records
        self._expected = 1  # jobs that a batch is likely to get
        self._busy_since: float | None = None
        self._gathering: asyncio.TimerHandle | None = None

    def stop(self) -> None:
        """Wait for the batch under way."""
        self._thread.shutdown()

    @property
    def works(self) -> bool:
        """Whether batches come to an end."""
        begun = self._busy_since
        return begun is None or time.monotonic() - begun < STUCK_SECONDS + self._limits.answer_seconds

    async def answer(self, requests: Sequence[Request], k: int, domain: str) -> list[Answer]:
        """One answer for each request. Raises RequestError; Overloaded where too many wait, or too long."""
        if self._waiting and self._waiting + len(requests) > self._limits.queue:
            raise Overloaded(f"{self._waiting} records wait")
        job = _Job(requests, k, domain, asyncio.get_running_loop().create_future())
        self._jobs.append(job)
        self._count(len(requests))
        self._go_on()
        try:
            async with asyncio.timeout(self._limits.answer_seconds):
                return await job.answers
        except TimeoutError:
            raise Overloaded(f"no answer within {self._limits.answer_seconds:g} s") from None
        finally:
            if job in self._jobs:  # nobody waits for it any more: it makes room
                self._jobs.remove(job)
                self._count(-len(requests))

    def _count(self, records: int) -> None:
        self._waiting += records
        self._metrics.waiting.set(self._waiting)

    def _go_on(self) -> None:
        """Begin a batch, now or after some milliseconds, where the thread is free and something waits."""
        if self._busy_since is not None or not self._jobs:
            return
        if len(self._jobs) >= self._expected:
            self._begin()
        elif self._gathering is None:
            self._gathering = asyncio.get_running_loop().call_later(self._limits.gather_seconds, self._begin)

    def _begin(self) -> None:
        if self._gathering is not None:
            self._gathering.cancel()
            self._gathering = None
        if self._busy_since is not None or not self._jobs:
            return
        jobs = [self._jobs.popleft()]
        records = len(jobs[0].requests)
        while self._jobs and records + len(self._jobs[0].requests) <= self._limits.batch:
            jobs.append(self._jobs.popleft())
            records += len(jobs[-1].requests)
        self._count(-records)
        self._metrics.batch.observe(records)
        self._busy_since, self._expected = time.monotonic(), len(jobs)
        asyncio.get_running_loop().run_in_executor(self._thread, self._work, jobs).add_done_callback(self._deliver)

    def _work(self, jobs: Sequence[_Job]) -> list[tuple[_Job, _Outcome]]:
        """In the thread."""
        served = self._current()
        return [one for group in _alike(jobs) for one in _outcomes(served, group)]

    def _deliver(self, done: "asyncio.Future[list[tuple[_Job, _Outcome]]]") -> None:
        if self._busy_since is not None:
            self._metrics.batch_seconds.observe(time.monotonic() - self._busy_since)
        self._busy_since = None
        for job, outcome in done.result():
            if job.answers.done():
                continue
            if isinstance(outcome, Exception):
                job.answers.set_exception(outcome)
            else:
                job.answers.set_result(outcome)
        self._go_on()


def _alike(jobs: Sequence[_Job]) -> list[list[_Job]]:
    """Jobs that can be answered together."""
    groups: dict[tuple[str, int], list[_Job]] = {}
    for job in jobs:
        groups.setdefault((job.domain, job.k), []).append(job)
    return list(groups.values())


def _outcomes(served: Served | Split, jobs: Sequence[_Job]) -> list[tuple[_Job, _Outcome]]:
    """Of jobs that want as many items of the same domain."""
    try:
        chosen = served.of_domain(jobs[0].domain)
        answers = chosen.answer([request for job in jobs for request in job.requests], jobs[0].k)
    except Exception as error:
        if not isinstance(error, RequestError) or len(jobs) == 1:
            return [(job, error) for job in jobs]
        return [one for job in jobs for one in _outcomes(served, [job])]  # whose it was, and the others' answers
    found: list[tuple[_Job, _Outcome]] = []
    place = 0
    for job in jobs:
        found.append((job, answers[place : place + len(job.requests)]))
        place += len(job.requests)
    return found
