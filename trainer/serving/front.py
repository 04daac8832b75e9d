"""HTTP around the recommender: recommendations, health, readiness, metrics.

    POST /invocations   as of `mlflow models serve`: {"dataframe_records": […], "params": {…}}, or `inputs` for records
    GET  /health        200 while the process can answer at all: restart it otherwise
    GET  /ready         200 while it should get requests; 503 before it ends
    GET  /metrics       for Prometheus

A request and its answer are described in `trainer/inference/recommender.py`, which validates them too. A request that
is refused gets {"message": one line}: 400 malformed, 408 too slow, 413 too large, 503 too much at once, with
Retry-After. What a request holds is never logged.
"""

import asyncio
import contextlib
import json
import re
import time
import traceback
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn, Protocol

from fastapi import FastAPI, Request, Response
from starlette.routing import BaseRoute, Route

from etl.redaction import one_line
from etl.settings import GraftrecError
from trainer.config import ServingLimitsConfig, SplitConfig
from trainer.inference.recommender import RequestError, parse, parse_params
from trainer.registry.loading import Served
from trainer.serving import metrics as measured
from trainer.serving.batching import Batcher, Overloaded
from trainer.serving.following import Followed
from trainer.serving.metrics import Metrics
from trainer.serving.served_log import ServedLog
from trainer.serving.shelf import Shelf
from trainer.serving.split import Split

RETRY_SECONDS = 1
REQUEST_ID = "x-request-id"
_RECORDS = ("dataframe_records", "inputs")
_ID = re.compile(r"[\w.:-]{1,64}", re.ASCII)
_JSON = "application/json"


class Refused(Exception):
    """A request that gets no answer, but a status and one line that says why."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Thread(Protocol):
    """What has a thread of its own, from `start` to `stop`."""

    def start(self) -> None: ...

    def stop(self) -> None: ...


@dataclass(frozen=True)
class Parts:
    """What a server is made of: the model that it follows, perhaps another that shares its traffic, a shelf, a log."""

    followed: Followed
    other: Followed | None
    split: SplitConfig
    shelf: Shelf
    log: ServedLog

    @property
    def threads(self) -> list[Thread]:
        return [self.followed, *([] if self.other is None else [self.other]), self.shelf, self.log]

    def answering(self) -> Served | Split:
        """What answers now."""
        own = self.followed.current.served
        if self.other is None:
            return own
        return Split(own, self.other.current.served, self.split.share, self.split.salt)


class Front:
    """What the routes share: the followed model, the batches, and whether requests are still wanted."""

    def __init__(
        self,
        parts: Parts,
        limits: ServingLimitsConfig,
        metrics: Metrics,
        say: Callable[[str], None],
    ) -> None:
        self.limits, self.metrics, self.draining = limits, metrics, False
        self._parts, self._say = parts, say
        self._batcher = Batcher(parts.answering, limits, metrics)

    def app(self) -> FastAPI:
        # Not FastAPI's own routes: a request is validated by the recommender, whoever serves it.
        routes: list[BaseRoute] = [
            Route("/invocations", self.invocations, methods=["POST"]),
            Route("/health", self.health),
            Route("/ready", self.ready),
            Route("/metrics", self.read_metrics),
        ]
        return FastAPI(
            title="graftrec", routes=routes, docs_url=None, redoc_url=None, openapi_url=None, lifespan=self._lifespan
        )

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        for part in self._parts.threads:
            part.start()
        yield
        for part in self._parts.threads:
            await asyncio.to_thread(part.stop)
        await asyncio.to_thread(self._batcher.stop)

    async def health(self, request: Request) -> Response:
        return _json({"healthy": True}) if self._batcher.works else _json({"healthy": False}, 500)

    async def ready(self, request: Request) -> Response:
        if self.draining or not self._batcher.works:
            return _json({"ready": False, "reason": "the server is about to end"}, 503)
        return _json({"ready": True, "version": self._parts.followed.current.label})

    async def read_metrics(self, request: Request) -> Response:
        return Response(self.metrics.text(), media_type=measured.CONTENT_TYPE)

    async def invocations(self, request: Request) -> Response:
        begun = time.monotonic()
        given = request.headers.get(REQUEST_ID, "")
        request_id = given if _ID.fullmatch(given) else uuid.uuid4().hex
        headers = {REQUEST_ID: request_id}
        try:
            answer = _json({"predictions": await self._predictions(request, request_id)}, 200, headers)
        except RequestError as error:
            answer = _json({"message": one_line(error)}, 400, headers)
        except Refused as error:
            answer = _json({"message": str(error)}, error.status, headers)
        except Overloaded as error:
            message = f"expected less at once, found that {error}; ask again after {RETRY_SECONDS} s"
            answer = _json({"message": message}, 503, headers | {"retry-after": str(RETRY_SECONDS)})
        except Exception as error:
            self._say(f"request {request_id} failed: {_told(error)}")
            answer = _json({"message": f"the server failed; its log says more of request {request_id}"}, 500, headers)
        self.metrics.requests.labels(str(answer.status_code)).inc()
        self.metrics.seconds.observe(time.monotonic() - begun)
        return answer

    async def _predictions(self, request: Request, request_id: str) -> list[dict[str, Any]]:
        body = _parsed(await self._body(request))
        domain, k = parse_params(body.get("params", {}))
        records = next(body[name] for name in _RECORDS if name in body)
        if len(records) > self.limits.records:
            raise RequestError(
                f"expected at most {self.limits.records} records, found {len(records)}; send several requests"
            )
        requests = [replace(one, allowed=self._parts.shelf.allowed(one.only)) for one in parse(records)]
        answers = await self._batcher.answer(requests, k, domain)
        for answer in answers:
            self.metrics.answers.labels(answer.version, answer.basis).inc()
        self._parts.log.add(request_id, requests, answers, domain)
        return [vars(answer) for answer in answers]

    async def _body(self, request: Request) -> bytes:
        """Raises Refused for one that is too large, or too slow."""
        most = self.limits.body_bytes
        length = request.headers.get("content-length", "")
        if length.isdecimal() and int(length) > most:
            raise Refused(413, f"expected a body of at most {most} bytes, found {length}; send several requests")
        parts: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(self.limits.body_seconds):
                async for part in request.stream():
                    size += len(part)
                    if size > most:
                        raise Refused(
                            413, f"expected a body of at most {most} bytes, found more; send several requests"
                        )
                    parts.append(part)
        except TimeoutError:
            raise Refused(
                408,
                f"expected the body within {self.limits.body_seconds:g} s, found {size} bytes of it; send it at once",
            ) from None
        return b"".join(parts)


def _parsed(body: bytes) -> dict[str, Any]:
    """An object with one list of records, and perhaps params. Raises RequestError."""
    try:
        given = json.loads(body, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"expected JSON, found {len(body)} bytes of other text ({one_line(error, 100)})") from None
    if not isinstance(given, dict):
        raise RequestError(f"expected an object with `dataframe_records`, found {_kind(given)}")
    if unknown := [name for name in given if name not in (*_RECORDS, "params")]:
        raise RequestError(f"expected `dataframe_records` and `params`, found {unknown[0][:100]!r}; leave it out")
    found = [name for name in _RECORDS if name in given]
    if len(found) != 1:
        raise RequestError(
            f"expected one of {' and '.join(_RECORDS)}, found {len(found)} of them; give a list of records"
        )
    records = given[found[0]]
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise RequestError(f"`{found[0]}` is a list of objects with `items` or `baskets`, found {_kind(records)}")
    if not isinstance(given.get("params", {}), dict):
        raise RequestError(f"`params` is an object with `k` and `domain`, found {_kind(given['params'])}")
    return given


def _no_number(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no number of JSON")


def _kind(given: Any) -> str:
    names = {list: "a list", dict: "an object", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(given), "a number")


def _json(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(json.dumps(content), status, headers, _JSON)


def _told(error: Exception) -> str:
    """Of an error: its kind and place, and the text of our own. Others' texts may hold what the request held."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    text = f": {one_line(error)}" if isinstance(error, GraftrecError) else ""
    return f"{type(error).__name__} at {Path(last.filename).name}:{last.lineno}{text}"
