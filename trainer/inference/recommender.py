"""What a served model answers: raw item ids in, the k best raw item ids, their scores and the version out.

    mlflow models serve -m models:/graftrec-target@champion --env-manager local --port 5001
    curl -d '{"dataframe_records": [{"user": "42", "items": ["318", "858"]}], "params": {"k": 5}}' \
         -H 'Content-Type: application/json' localhost:5001/invocations

`items` is a history, oldest first; `user` may be left out, and so may `event_types`, the kind of event that each item's
was, for a model that reads kinds (others pass it over). A model of next baskets takes `baskets` in the place of
`items`: a list of lists, oldest first. A model that reads times needs `times`, when each item's event was, and takes
`time`, when the request is made: seconds since 1970 (UTC), numbers; others pass them over. Times never fall, and none
is later than `time`. Without `time` it is now, or the last event where that is later: clocks differ. An answer holds

    items     raw ids, best first; what is in the history is left out (not so of baskets, where things are had again)
    scores    the scorer's own: what evaluation ranked by; of a model that tells clicks, log-odds of one; of `popular`
              answers, training interactions
    basis     model | friends (what friends have) | popular (the history is empty, or holds no known item, and the model
              does not answer by the features of `user`: `model.user_features.alone`)
    unknown   ids of the history that the model does not know, and has no features of, which were ignored
    version   registered version, e.g. graftrec/3

`items` may be ids of any domain. Where the model knows none of them, as those of a user who is new in its domain, the
version at the alias `companion` answers if it knows one, and `version` says so. The rule for ids is that of logs
(`etl.identifiers`): " 5" and, where a caller's schema lets them through, the numbers 5 and 5.0 are "5".

Where neither knows an item, the version at the alias `friends`, if there is one, answers from what friends have: those
that the request gives, `friends` (a list of raw user ids), or else those of `user` in the log. `basis` says so.

`exclude` is a list of item ids that must not be an answer. `only` is a list of categories, of which an item must have
one: a server that knows the categories of items takes it (`trainer/serving`), others refuse it.

An item that came after training is ranked, and read, by its features alone. A version reads the vectors of later items
from the release that $GRAFTREC_FEATURES names (`<lake>@<release>`), and from the request: `features` is a list of
{"item": raw id, "encoder": name, "vector": numbers as the encoder gives them}. Without any, such an item is unknown.

`params: {"domain": "books"}` asks for another domain's items: of that domain's champion in the same family of
registered models, or of the patch for it that stands on the same backbone. A malformed request gets a 400. Fields and
params of other names are refused; behind MLflow they never arrive: it leaves them out, with a warning in the server's
log. This module knows nothing of MLflow, nor of HTTP; `pyfunc.py` is what MLflow runs, `trainer/serving` another
server.
"""

import dataclasses
import functools
import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from etl.identifiers import raw_ids
from etl.redaction import one_line
from etl.settings import GraftrecError
from etl.tables import FIRST_INDEX, SEP, UNK
from trainer.arrays import Int8Array, IntArray
from trainer.data.events import Events
from trainer.inference.allowed_items import AllowedItems, Within, within
from trainer.inference.later_items import LaterItemsError, with_vectors
from trainer.inference.model_folder import TrainedModel
from trainer.inference.scorer import Scores, answered, top_k

DEFAULT_K, MAX_K = 10, 10_000
PARAMS = ("k", "domain")
MAX_DEPTH = 8  # of lists and objects in a record
MAX_NAME = 200  # characters of a domain
RETRY_SECONDS = 10.0  # until what was not there is looked for again
MAX_ABSENT = 1_000  # names that are remembered as not there
BATCH_SIZE = 256  # histories scored at once
# Of a record.
FIELDS = ("items", "user", "event_types", "baskets", "features", "friends", "times", "time", "exclude", "only")
MAX_NUMBER = 2**1023  # of any field: ids may be large whole numbers
LATEST = 2**33  # seconds since 1970 that a time may be, the year 2242: more are milliseconds, or microseconds
MICROSECONDS = 1_000_000  # of a second
_FIELDS = f"a record has {', '.join(FIELDS)}"
MODEL, FRIENDS, POPULAR = "model", "friends", "popular"  # what an answer is based on


class RequestError(GraftrecError):
    """A request that can't be understood."""


@dataclass(frozen=True)
class Request:
    """One history of raw item ids, oldest first; of `baskets`, where these are not None."""

    items: Sequence[str]
    user: str | None = None
    event_types: Sequence[str] | None = None  # of each item
    baskets: Sequence[Sequence[str]] | None = None
    features: Sequence[tuple[str, str, Sequence[float]]] = ()  # of later items: raw id, encoder, vector
    friends: Sequence[str] = ()  # raw ids of the user's friends
    times: Sequence[float] | None = None  # of each item, seconds since 1970, ascending
    time: float | None = None  # of the request; None: now
    exclude: Sequence[str] = ()  # raw ids of items that must not be an answer
    only: Sequence[str] = ()  # categories, of which an item must have one
    allowed: AllowedItems | None = None  # items that may be an answer, as the server that knows them says; None: all

    @property
    def form(self) -> str:
        """Name of what holds the history."""
        return "items" if self.baskets is None else "baskets"


@dataclass(frozen=True)
class Answer:
    """The answer to one request; see the top of this module."""

    items: list[str]
    scores: list[float]
    basis: str
    unknown: list[str]
    version: str


_Found = TypeVar("_Found")


class Kept(Generic[_Found]):
    """What `look_up` finds for a name, looked up once. That there is nothing is believed for `RETRY_SECONDS` only: it
    may come later, and names that nobody has must not fill the memory."""

    def __init__(self, look_up: Callable[[str], _Found | None], *, clock: Callable[[], float] = time.monotonic) -> None:
        self._look_up, self._clock = look_up, clock
        self._found: dict[str, _Found] = {}
        self._absent: dict[str, float] = {}  # when it was looked for, oldest first

    def __call__(self, name: str = "") -> _Found | None:
        if name in self._found:
            return self._found[name]
        now = self._clock()
        if now - self._absent.get(name, -math.inf) < RETRY_SECONDS:
            return None
        found = self._look_up(name)
        if found is not None:
            self._absent.pop(name, None)
            return self._found.setdefault(name, found)
        self._absent.pop(name, None)
        while len(self._absent) >= MAX_ABSENT:
            self._absent.pop(next(iter(self._absent)), None)
        self._absent[name] = now
        return None


class Answering(Protocol):
    """What answers requests: a `Recommender`, or an attention over friends."""

    def answer(self, requests: Sequence[Request], k: int = DEFAULT_K) -> list[Answer]: ...


class TopK:
    """The best rows for histories: the model's, and for an empty history the popular ones."""

    def __init__(self, trained_model: TrainedModel) -> None:
        self._scorer, self._model = trained_model.scorer(clicks=True), trained_model.model
        self._repeats = trained_model.config.ranks_repeats
        popularity = torch.from_numpy(trained_model.popularity.astype(np.float32))
        if (predicted_V := trained_model.predicted_V) is not None:
            popularity.masked_fill_(~torch.from_numpy(predicted_V), -torch.inf)
        self._popularity = Scores.of(popularity[None])
        self._popular = functools.lru_cache(maxsize=16)(self._popular_rows)

    def best(self, histories: Events, k: int, within: Within | None = None) -> tuple[IntArray, Tensor]:
        """Rows [B, K] and scores [B, K], best first, that are not in the history, or with `repeats` maybe are; see
        `trainer.inference.scorer.top_k`. `within`: none but these."""
        rows, scores = self._popular(k)
        rows_BK, scores_BK = rows.repeat(len(histories), axis=0), scores.repeat(len(histories), 1)
        is_answered = answered(self._model, histories)
        examples = np.flatnonzero(is_answered)
        if len(examples):
            own = histories.take(examples)
            left_out, scored = (
                own.until(np.zeros(len(own), np.int64)) if self._repeats else own,
                self._scorer.scores(own),
            )
            if within is not None:
                left_out, scored = within.left_out(left_out, examples), within.of(scored, examples)
            rows_BK[examples], scores_BK[torch.from_numpy(examples)] = top_k(scored, left_out, k)
        others = np.flatnonzero(~is_answered)
        if within is not None and len(others):
            nothing = histories.take(others).until(np.zeros(len(others), np.int64))
            popular = self._popularity.whole().repeat(len(others), 1)
            scored, left_out = within.of(Scores.of(popular), others), within.left_out(nothing, others)
            rows_BK[others], scores_BK[torch.from_numpy(others)] = top_k(scored, left_out, k)
        return rows_BK, scores_BK

    def _popular_rows(self, k: int) -> tuple[IntArray, Tensor]:
        nothing = Events.of(np.array([UNK]), np.zeros(2, np.int64), np.empty(0, dtype=np.int64))
        return top_k(self._popularity, nothing, k)


class Recommender:
    """A model, ready to answer. `beside`: gives the one for another domain; `companion`: the one for histories of which
    this one knows no item; `friends`: what answers users of whom neither knows an item. Each gives None where there is
    none, and is read once it is there."""

    def __init__(
        self,
        trained_model: TrainedModel,
        version: str,
        beside: "Callable[[str], Recommender | None]" = lambda domain: None,
        companion: "Callable[[], Recommender | None]" = lambda: None,
        friends: Callable[[], Answering | None] = lambda: None,
    ) -> None:
        self.trained_model, self.version, self._beside = trained_model, version, Kept(beside)
        self._companion, self._friends = Kept(lambda name: companion()), Kept(lambda name: friends())
        self._shortlist, self.reads = TopK(trained_model), trained_model.config.task.needs.request
        self.reads_times = trained_model.config.reads_times
        self._place_of = {name: place for place, name in enumerate(trained_model.event_types, 1)}
        self._allowed: WeakKeyDictionary[AllowedItems, Tensor] = WeakKeyDictionary()
        self._raw_ids = list(trained_model.catalogue.raw_ids)
        self._row_of = {raw: row for row, raw in enumerate(self._raw_ids) if row >= FIRST_INDEX}

    def of_domain(self, domain: str) -> "Recommender":
        """The one that predicts that domain's items; "": this one. Raises RequestError."""
        own = self.trained_model.config.data.answered
        if domain in ("", own):
            return self
        other = self._beside(domain) if _is_name(domain) else None
        if other is None:
            raise RequestError(
                f"domain: expected {own!r}, of which {self.version} predicts items, or one that has a champion of the "
                f"same family or a patch beside it; found {domain[:80]!r}"
            )
        return other

    def request(self, items: Sequence[str]) -> Request:
        """A request with that history: of one basket, where baskets are read."""
        return {"items": Request(items), "baskets": Request([], baskets=[items])}[self.reads]

    def prepare(self) -> None:
        """Read what stands beside it, and answer once: not at the first request that needs it."""
        self._companion()
        self._friends()
        request = self.request(list(self._row_of)[:3])
        times = [0.0] * len(request.items) if self.reads_times else None
        self.answer([dataclasses.replace(request, times=times)])

    def answer(self, requests: Sequence[Request], k: int = DEFAULT_K) -> list[Answer]:
        """One answer for each request, in order. Raises RequestError."""
        check_k(k)
        for place, request in enumerate(requests):
            if self.reads_times and request.items and request.times is None:
                raise RequestError(
                    f"record {place}: expected `times`, which {self.version} reads: a number of seconds since 1970 "
                    "(UTC) for each of `items`, found none; give when each item's event was"
                )
            if request.only and request.allowed is None:
                raise RequestError(
                    f"record {place}: expected no `only`, since this server knows no categories of items, found "
                    f"{str(list(request.only))[:100]}; ask a server that has `shelf.items`"
                )
            if request.form != self.reads:
                raise RequestError(
                    f"record {place}: expected `{self.reads}`, which {self.version} reads, found `{request.form}`"
                )
        plain = [place for place, request in enumerate(requests) if not request.features]
        found: dict[int, Answer] = {}
        for start in range(0, len(plain), BATCH_SIZE):
            places = plain[start : start + BATCH_SIZE]
            found |= zip(places, self._answer([requests[place] for place in places], k), strict=True)
        for place, request in enumerate(requests):
            if request.features:
                (found[place],) = self._with(request)._answer([request], k)
        answers = [found[place] for place in range(len(requests))]
        unread = [place for place, answer in enumerate(answers) if answer.basis == POPULAR and answer.unknown]
        companion = self._companion() if unread else None
        if companion is not None and companion.reads_times:  # requested by a request for a model that reads none
            unread = [place for place in unread if requests[place].times is not None]
        if companion is not None and companion.reads == self.reads and unread:
            others = companion.answer([requests[place] for place in unread], k)
            for place, other in zip(unread, others, strict=True):
                if other.basis == MODEL:
                    answers[place] = other
        self._ask_friends(requests, answers, k)
        return answers

    def _ask_friends(self, requests: Sequence[Request], answers: list[Answer], k: int) -> None:
        """Replace answers by what is popular by those from what friends have, where these are known."""
        alone = [
            place
            for place, request in enumerate(requests)
            if answers[place].basis == POPULAR and (request.user is not None or request.friends)
        ]
        friends = self._friends() if alone else None
        if friends is not None:
            for place, other in zip(alone, friends.answer([requests[place] for place in alone], k), strict=True):
                if other.basis == FRIENDS:
                    answers[place] = other

    def _with(self, request: Request) -> "Recommender":
        """One that has the later items of a request, too. Raises RequestError."""
        own = self.trained_model.features
        ids = list(dict.fromkeys(item for item, _, _ in request.features if item not in self._row_of))
        place_of = {item: place for place, item in enumerate(ids)}
        given = {
            name: (np.zeros((len(ids), one.vectors_VF.shape[1]), np.float32), np.zeros(len(ids), bool))
            for name, one in own.items()
        }
        for item, encoder, vector in request.features:
            if encoder not in given:
                known = ", ".join(own) or "none"
                raise RequestError(
                    f"features: expected encoders that {self.version} reads ({known}), found {encoder!r}"
                )
            vectors, has = given[encoder]
            if len(vector) != vectors.shape[1] or not np.isfinite(vector).all():
                raise RequestError(
                    f"features: expected {vectors.shape[1]} finite numbers by {encoder!r}, found {len(vector)} of item "
                    f"{item!r}"
                )
            if item in place_of:  # of an item that the model knows, it has its own
                vectors[place_of[item]], has[place_of[item]] = vector, True
        if not ids:
            return self
        try:
            extended = with_vectors(self.trained_model, np.full(len(ids), -1), ids, [""] * len(ids), given)
        except LaterItemsError as error:
            raise RequestError(f"features: {error}") from None
        return Recommender(extended, self.version)

    def _answer(self, requests: Sequence[Request], k: int) -> list[Answer]:
        read = [_read(request) for request in requests]
        rows = [[SEP if item is None else self._row_of.get(item, UNK) for item in items] for items in read]
        users = self.trained_model.users or {}
        times, requested = self._times(requests)
        given = np.array([row for history in rows for row in history], dtype=np.int64)
        whole = Events.of(
            np.array([users.get(request.user or "", UNK) for request in requests], dtype=np.int64),
            np.concatenate([[0], np.cumsum([len(history) for history in rows])]).astype(np.int64),
            given,
            times,
            self._event_types(requests),
        )
        whole = dataclasses.replace(whole, request_times=requested)
        histories = whole.keep(given != UNK)
        is_answered = answered(self.trained_model.model, histories)
        best_rows, best = self._shortlist.best(histories, k, self._within(requests))
        counts = torch.isfinite(best).sum(1).tolist()
        lists = zip(read, rows, best_rows.tolist(), best.tolist(), counts, is_answered.tolist(), strict=True)
        return [
            Answer(
                [self._raw_ids[row] for row in best_of_one[:count]],
                scores[:count],
                MODEL if by_model else POPULAR,
                [item for item, row in zip(items, history, strict=True) if row == UNK and item is not None],
                self.version,
            )
            for items, history, best_of_one, scores, count, by_model in lists
        ]

    def _within(self, requests: Sequence[Request]) -> Within | None:
        """What the requests say of their answers; None where none says anything."""
        if not any(request.exclude or request.only or request.allowed is not None for request in requests):
            return None
        return within(requests, self._row_of, self._flags)

    def _flags(self, allowed: AllowedItems) -> Tensor:
        if allowed not in self._allowed:
            self._allowed[allowed] = allowed.flags(self.trained_model.catalogue)
        return self._allowed[allowed]

    def _event_types(self, requests: Sequence[Request]) -> Int8Array:
        """Places among the names that the model tells apart, 0 for others; empty where it reads none."""
        if not self._place_of:
            return np.empty(0, np.int8)
        kinds = [request.event_types or [""] * len(request.items) for request in requests]
        return np.array([self._place_of.get(kind, 0) for of_one in kinds for kind in of_one], dtype=np.int8)

    def _times(self, requests: Sequence[Request]) -> tuple[IntArray, IntArray | None]:
        """In microseconds, of all items one behind the other, and of the requests; nothing where none are read."""
        if not self.reads_times:
            return np.empty(0, np.int64), None
        now = time.time()
        given = [second for request in requests for second in request.times or ()]
        requested = [now if request.time is None else request.time for request in requests]
        times, requested = (np.floor(np.array(part) * MICROSECONDS).astype(np.int64) for part in (given, requested))
        return times, requested


def check_k(k: int) -> None:
    """Raises RequestError."""
    if not 1 <= k <= MAX_K:
        raise RequestError(f"k is a number of items from 1 to {MAX_K}, found {shown(k)}")


def parse_params(params: Mapping[str, Any]) -> tuple[str, int]:
    """(domain, k) of a request's params; "" where it names no domain. Raises RequestError."""
    if unknown := [name for name in params if name not in PARAMS]:
        raise RequestError(f"params: expected {' or '.join(PARAMS)}, found {shown(unknown[0])}; leave it out")
    domain, k = _plain(params.get("domain")), _plain(params.get("k", DEFAULT_K))
    if domain is not None and not isinstance(domain, str):
        raise RequestError(f"domain: expected a name, found {shown(domain)}")
    if isinstance(k, float) and k.is_integer():
        k = int(k)
    if not isinstance(k, int) or isinstance(k, bool):
        raise RequestError(f"k is a number of items from 1 to {MAX_K}, found {shown(k)}")
    check_k(k)
    return domain or "", k


def _is_name(domain: str) -> bool:
    """Whether a registered model or a folder can have that name: nobody else is asked for another one."""
    return len(domain) <= MAX_NAME and domain.isprintable() and not set(domain) & set("/:@")


def shown(given: Any) -> str:
    """A value of a request, as a message says it: short, and one line."""
    if isinstance(given, int) and given.bit_length() > 256:
        return f"a number of {given.bit_length()} bits"
    text = given[:100] if isinstance(given, str) else str(given)[:100]
    return repr(text) if not isinstance(given, int | float | None) else text


def _read(request: Request) -> Sequence[str | None]:
    """Raw ids, oldest first; None where a basket ends."""
    if request.baskets is None:
        return request.items
    return [item for basket in request.baskets for item in (*basket, None)]


def parse(records: Sequence[Mapping[str, Any]]) -> list[Request]:
    """Requests of records with `items` or `baskets`, and perhaps `user`. Raises RequestError."""
    if not records:
        raise RequestError(f"expected one record at least, with `items` or `baskets`, found none; {_FIELDS}")
    return [_parse(record, place) for place, record in enumerate(records)]


def _parse(record: Any, place: int) -> Request:
    if not isinstance(record, Mapping):
        raise RequestError(
            f"record {place}: expected an object with `items` or `baskets`, found {type(record).__name__}"
        )
    if unknown := [name for name in record if name not in FIELDS]:
        raise RequestError(f"record {place}: {_FIELDS}, found {shown(unknown[0])}; leave it out")
    fields = [_plain(record.get(name)) for name in FIELDS]
    items, user, kinds, baskets, features, friends, times, requested, exclude, only = fields
    if baskets is not None:
        if items is not None or not isinstance(baskets, list) or not all(map(_is_ids, baskets)):
            raise RequestError(
                f"record {place}: `baskets`, in the place of `items`, is a list of lists of raw item ids (strings), "
                f"found {shown(baskets)}"
            )
        items, baskets = [], [_ids(basket, place, "baskets") for basket in baskets]
    if items is None:
        raise RequestError(
            f"record {place}: `items` is a list of raw item ids (strings), or `baskets` a list of such lists, found "
            f"neither; {_FIELDS}"
        )
    if not _is_ids(items):
        raise RequestError(f"record {place}: `items` is a list of raw item ids (strings), found {shown(items)}")
    if user is not None and not _is_ids([user]):
        raise RequestError(f"record {place}: `user` is a raw user id (a string), found {shown(user)}")
    if kinds is not None and (not _is_texts(kinds) or len(kinds) != len(items)):
        raise RequestError(
            f"record {place}: `event_types` is a list of strings as long as `items`, found {shown(kinds)}"
        )
    if friends is not None and not _is_ids(friends):
        raise RequestError(f"record {place}: `friends` is a list of raw user ids (strings), found {shown(friends)}")
    if exclude is not None and not _is_ids(exclude):
        raise RequestError(f"record {place}: `exclude` is a list of raw item ids (strings), found {shown(exclude)}")
    if only is not None and not _is_texts(only):
        raise RequestError(f"record {place}: `only` is a list of categories (strings), found {shown(only)}")
    user = None if user is None else _ids([user], place, "user")[0]
    _check_times(times, requested, len(items), place)
    return Request(
        _ids(items, place, "items"),
        user,
        kinds,
        baskets,
        _vectors(features, place),
        tuple(_ids(friends or [], place, "friends")),
        times,
        requested,
        tuple(_ids(exclude or [], place, "exclude")),
        tuple(only or ()),
    )


def _check_times(times: Any, requested: Any, num_items: int, place: int) -> None:
    """Raises RequestError for times of a record that are no numbers of seconds, that fall, or that are to come."""
    for name, given in (("times", times), ("time", [] if requested is None else [requested])):
        if given is None:
            continue
        what = f"`{name}` is a number of seconds since 1970 (UTC)" + (" for each of `items`" if name == "times" else "")
        if not isinstance(given, list) or not all(map(_is_number, given)):
            raise RequestError(f"record {place}: {what}, found {shown(given if name == 'times' else requested)}")
        if wrong := [one for one in given if not -LATEST < one < LATEST]:
            raise RequestError(
                f"record {place}: {what}, found {wrong[0]:g}; divide milliseconds by 1,000, microseconds by 1,000,000"
            )
    if times is None:
        return
    if len(times) != num_items:
        raise RequestError(
            f"record {place}: `times` is as long as `items`, found {len(times)} times of {num_items} items"
        )
    if fallen := [at for at, (before, after) in enumerate(itertools.pairwise(times), 1) if after < before]:
        raise RequestError(
            f"record {place}: `items` and `times` are oldest first, found time {fallen[0]} before the one that stands "
            "before it; sort both by time"
        )
    if requested is not None and times and times[-1] > requested:
        raise RequestError(
            f"record {place}: expected events until the request's `time`, {requested:.0f}, found one at "
            f"{times[-1]:.0f}; leave out later events, or correct `time`"
        )


def _is_number(given: Any) -> bool:
    if not isinstance(given, int | float) or isinstance(given, bool):
        return False
    return -MAX_NUMBER < given < MAX_NUMBER  # neither NaN, nor more than a float can be


def _vectors(features: Any, place: int) -> tuple[tuple[str, str, list[float]], ...]:
    """Raw id, encoder and vector of each of a record's `features`."""
    found = []
    if not isinstance(features, list | None):
        raise RequestError(f"record {place}: `features` is a list of objects, found {shown(features)}")
    for one in features or ():
        named = _plain(one) if isinstance(one, Mapping) else {}
        item, encoder, vector = (_plain(named.get(name)) for name in ("item", "encoder", "vector"))
        is_vector = isinstance(vector, list) and all(map(_is_number, vector))
        if not _is_ids([item]) or not isinstance(encoder, str) or not is_vector:
            raise RequestError(
                f"record {place}: `features` is a list of objects with `item` (a raw id), `encoder` (a name) and "
                f"`vector` (numbers), found {shown(one)}"
            )
        found.append((_ids([item], place, "features")[0], encoder, [float(x) for x in vector]))
    return tuple(found)


def _ids(given: Sequence[str | int | float], place: int, name: str) -> list[str]:
    """Raw ids, by the rule for those of a log."""
    try:
        return raw_ids(given)
    except UnicodeEncodeError:
        raise RequestError(f"record {place}: `{name}`: expected text in Unicode, found half a character") from None
    except ValueError as error:
        raise RequestError(f"record {place}: `{name}`: {one_line(error, 200)}") from None


def _plain(given: Any, depth: int = 0) -> Any:
    """What pandas and numpy made of JSON, as it was; NaN is pandas' word for what is not there. Raises RequestError
    for what is nested deeper than any field is."""
    if depth > MAX_DEPTH:
        raise RequestError(f"expected fields of at most {MAX_DEPTH} lists in each other, found more; leave some out")
    if isinstance(given, np.ndarray | list | tuple):
        return [_plain(one, depth + 1) for one in given]
    if isinstance(given, np.generic):
        given = given.item()
    return None if isinstance(given, float) and given != given else given


def _is_texts(given: Any) -> bool:
    return isinstance(given, list | tuple) and all(isinstance(text, str) for text in given)


def _is_ids(given: Any) -> bool:
    return isinstance(given, list | tuple) and all(isinstance(one, str) or _is_number(one) for one in given)
