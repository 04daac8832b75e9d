"""Requests that come at once are answered at once: one thread takes whatever waits, and scores it as one batch.

No request waits for others to come: a batch is what came while the one before it was computed.
"""

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from trainer.config import ServingLimitsConfig
from trainer.inference.recommender import Answer, Request, RequestError
from trainer.registry.loading import Served
from trainer.serving.metrics import Metrics


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
    """Answers requests of one event loop by what `current` gives, a batch at a time.

    A batch is answered by one version as a whole, and batches one after the other: versions never go back.
    """

    def __init__(self, current: Callable[[], Served], limits: ServingLimitsConfig, metrics: Metrics) -> None:
        self._current, self._limits, self._metrics = current, limits, metrics
        self._jobs: deque[_Job] = deque()
        self._waiting = 0  # records
        self._change = threading.Condition()
        self._ended = False
        self._thread = threading.Thread(target=self._work, name="answer", daemon=True)

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def stop(self) -> None:
        """End after what waits has been answered."""
        with self._change:
            self._ended = True
            self._change.notify()
        self._thread.join()

    @property
    def works(self) -> bool:
        return self._thread.is_alive()

    async def answer(self, requests: Sequence[Request], k: int, domain: str) -> list[Answer]:
        """One answer for each request. Raises RequestError; Overloaded where too many wait, or too long."""
        job = _Job(requests, k, domain, self._loop.create_future())
        with self._change:
            if self._waiting and self._waiting + len(requests) > self._limits.queue:
                raise Overloaded(f"{self._waiting} records wait")
            self._jobs.append(job)
            self._waiting += len(requests)
            self._change.notify()
        try:
            return await asyncio.wait_for(job.answers, self._limits.answer_seconds)
        except TimeoutError:
            self._give_up(job)
            raise Overloaded(f"no answer within {self._limits.answer_seconds:g} s") from None

    def _give_up(self, job: _Job) -> None:
        """Nobody waits for it any more: it makes room, unless it is being answered."""
        with self._change:
            if job in self._jobs:
                self._jobs.remove(job)
                self._waiting -= len(job.requests)

    def _work(self) -> None:
        while jobs := self._next():
            begun = time.monotonic()
            jobs = [job for job in jobs if not job.answers.done()]  # those that waited too long are gone
            served = self._current()
            outcomes = [one for group in _alike(jobs) for one in _outcomes(served, group)]
            self._metrics.batch_seconds.observe(time.monotonic() - begun)
            self._loop.call_soon_threadsafe(_deliver, outcomes)

    def _next(self) -> list[_Job]:
        """As many jobs as a batch holds, one at least; none at the end."""
        with self._change:
            while not self._jobs:
                if self._ended:
                    return []
                self._change.wait()
            jobs = [self._jobs.popleft()]
            records = len(jobs[0].requests)
            while self._jobs and records + len(self._jobs[0].requests) <= self._limits.batch:
                jobs.append(self._jobs.popleft())
                records += len(jobs[-1].requests)
            self._waiting -= records
            self._metrics.waiting.set(self._waiting)
        self._metrics.batch.observe(records)
        return jobs


def _alike(jobs: Sequence[_Job]) -> list[list[_Job]]:
    """Jobs that can be answered together."""
    groups: dict[tuple[str, int], list[_Job]] = {}
    for job in jobs:
        groups.setdefault((job.domain, job.k), []).append(job)
    return list(groups.values())


def _deliver(outcomes: Sequence[tuple[_Job, _Outcome]]) -> None:
    for job, outcome in outcomes:
        if job.answers.done():
            continue
        if isinstance(outcome, Exception):
            job.answers.set_exception(outcome)
        else:
            job.answers.set_result(outcome)


def _outcomes(served: Served, jobs: Sequence[_Job]) -> list[tuple[_Job, _Outcome]]:
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
