"""Fixed evaluation negatives: for each user with a hold-out, items it has not interacted with in any part.

`uniform-100` draws uniformly, `popular-100` in proportion to popularity without replacement (the item's degree; an
exponential race, Efraimidis & Spirakis 2006), `top-100` takes the most popular. A draw is a function of the seed, the
domain, the part and the *raw* ids of user and item: each (user, item) pair has a number of its own, and the smallest
win. What was drawn stays as it is when a new day comes, less what the user has taken meanwhile, which the next in line
replaces.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from etl.config import NegativesConfig
from etl.jobs.job import Job, Outcome, Run
from etl.sources.schema import spark_schema
from etl.tables import DOMAINS, ITEMS, NEGATIVES, SEQUENCES, USERS

NUM_NEGATIVES = 100
_CELLS = 1 << 21  # users × items at once
_TOP = "top-100"
_POPULAR = "popular-100"

Ints = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Candidates:
    """The `V` kept items of a domain by global index: `word` from the raw id, `weight` the popularity."""

    index: Ints
    word: Words
    weight: Floats


def transform(
    sequences: DataFrame,
    users: DataFrame,
    old: DataFrame | None,
    *,
    candidates: dict[str, Candidates],
    config: NegativesConfig,
) -> DataFrame:
    """NEGATIVES for the users of `sequences` that have a hold-out. `old`: earlier negatives to keep."""
    asked = sequences.where("valid_start < end").select(
        "split", "domain", "bucket", "user", "items",
        (F.col("valid_start") < F.col("test_start")).alias("validation"),
        (F.col("test_start") < F.col("end")).alias("test"),
    )  # fmt: skip
    asked = asked.join(users.select(F.col("index").alias("user"), F.xxhash64("user").alias("word")), "user")
    if old is None:
        asked = asked.withColumn(
            "drawn", F.lit(None).cast("array<struct<protocol: string, part: string, items: array<int>>>")
        )
    else:
        drawn = F.collect_list(F.struct("protocol", "part", "items")).alias("drawn")
        asked = asked.join(old.groupBy("split", "domain", "user").agg(drawn), ["split", "domain", "user"], "left")

    def draw(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            yield from _draw_batch(pa.Table.from_batches([batch]), candidates, config)

    return asked.mapInArrow(draw, spark_schema(NEGATIVES.schema))


def negatives(
    candidates: Candidates,
    seen_BV: Bools,
    *,
    protocol: str,
    part: str,
    seed_words: tuple[int, str],
    user_word_B: Words,
    kept: Sequence[Ints],
) -> list[Ints]:
    """Positions of each user's negatives among the candidates; those of `kept` (positions, already drawn) first."""
    if protocol == _TOP:
        order = np.lexsort((candidates.index, -candidates.weight))
        return [order[~seen_B[order]][:NUM_NEGATIVES] for seen_B in seen_BV]
    stream = _word(f"{seed_words[0]}/{seed_words[1]}/{protocol}/{part}".encode())
    word_BV = _mix(_mix(user_word_B ^ stream)[:, None] ^ candidates.word)
    number_BV = ((word_BV >> np.uint64(11)) + np.uint64(1)).astype(np.float64) * 2.0**-53  # in (0, 1]
    if protocol == _POPULAR:
        with np.errstate(divide="ignore", invalid="ignore"):
            number_BV = np.where(candidates.weight > 0, -np.log(number_BV) / candidates.weight, np.inf)
    for row, places in enumerate(kept):
        number_BV[row, places] = np.arange(len(places)) - float(len(places))
    number_BV[seen_BV] = np.inf
    most = min(NUM_NEGATIVES, number_BV.shape[1])
    if most < number_BV.shape[1]:
        nearest = np.argpartition(number_BV, most - 1, axis=1)[:, :most]
    else:
        nearest = np.broadcast_to(np.arange(most), (len(number_BV), most))
    value = np.take_along_axis(number_BV, nearest, axis=1)
    order = np.argsort(value, axis=1, kind="stable")
    nearest, value = np.take_along_axis(nearest, order, axis=1), np.take_along_axis(value, order, axis=1)
    return [places[finite] for places, finite in zip(nearest, np.isfinite(value), strict=True)]


def _draw_batch(rows: pa.Table, candidates: dict[str, Candidates], config: NegativesConfig) -> Iterator[pa.RecordBatch]:
    """Rows of users and domains, in any order, to rows of negatives."""
    for domain in rows["domain"].unique().to_pylist():
        of_domain = rows.filter(pa.compute.equal(rows["domain"], domain))
        chosen = candidates[domain]
        size = max(1, _CELLS // max(len(chosen.index), 1))
        for start in range(0, len(of_domain), size):
            yield from _draw_domain(of_domain.slice(start, size).combine_chunks(), domain, chosen, config)


def _draw_domain(
    rows: pa.Table, domain: str, candidates: Candidates, config: NegativesConfig
) -> Iterator[pa.RecordBatch]:
    places_of = _lookup(candidates.index)
    seen_BV = np.zeros((len(rows), len(candidates.index)), bool)
    for row, taken in enumerate(rows["items"]):
        seen_BV[row, places_of(taken.values.to_numpy())] = True
    words = rows["word"].to_numpy().astype(np.int64).view(np.uint64)
    drawn = rows["drawn"].to_pylist()
    for part in ("validation", "test"):
        asked = np.flatnonzero(rows[part].to_numpy())
        if not len(asked):
            continue
        for protocol in config.protocols:
            kept = [places_of(_earlier(drawn[row], protocol, part)) for row in asked]
            found = negatives(
                candidates,
                seen_BV[asked],
                protocol=protocol,
                part=part,
                seed_words=(config.seed, domain),
                user_word_B=words[asked],
                kept=kept,
            )
            columns = {
                name: rows[name].take(pa.array(asked)).combine_chunks() for name in ("split", "domain", "bucket")
            }
            columns["protocol"] = pa.repeat(protocol, len(asked))
            columns["part"] = pa.repeat(part, len(asked))
            columns["user"] = rows["user"].take(pa.array(asked)).combine_chunks()
            columns["items"] = pa.array([candidates.index[places] for places in found], pa.list_(pa.int32()))
            table = pa.table(columns).select(NEGATIVES.schema.names)
            yield from table.cast(pa.schema([f.with_nullable(True) for f in NEGATIVES.schema])).to_batches()


def _earlier(drawn: list[dict[str, object]] | None, protocol: str, part: str) -> list[int]:
    for entry in drawn or []:
        if entry["protocol"] == protocol and entry["part"] == part:
            items = entry["items"]
            assert isinstance(items, list)
            return items
    return []


def _lookup(index: Ints) -> Callable[[npt.ArrayLike], Ints]:
    """A function from global indices to positions in `index` (sorted), those that it lacks left out."""

    def places(wanted: npt.ArrayLike) -> Ints:
        asked = np.asarray(wanted, np.int64)
        at = np.minimum(np.searchsorted(index, asked), max(len(index) - 1, 0))
        found: Ints = at[index[at] == asked] if len(index) else at[:0]
        return found

    return places


def _word(text: bytes) -> np.uint64:
    return np.uint64(int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little"))


def _mix(words: Words) -> Words:
    """The finaliser of splitmix64 (Steele, Lea & Flood 2014): every bit of the input moves half of the output's."""
    words = words + np.uint64(0x9E3779B97F4A7C15)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def read_candidates(items: DataFrame, domains: DataFrame) -> dict[str, Candidates]:
    """The kept items of each domain. Collects the catalogue: it grows with the items alone."""
    kept = domains.join(items.where("kept").select("item", "degree"), "item").select(
        "domain", "item", "index", "degree"
    )
    found = kept.toArrow()
    word = np.array([_word(item.encode()) for item in found["item"].to_pylist()], np.uint64)
    index, weight = found["index"].to_numpy().astype(np.int64), found["degree"].to_numpy().astype(np.float64)
    names = np.array(found["domain"].to_pylist(), object)
    catalogue = {}
    for name in sorted(set(names.tolist())):
        at = np.flatnonzero(names == name)
        at = at[np.argsort(index[at])]
        catalogue[name] = Candidates(index[at], word[at], weight[at])
    return catalogue


def run(run: Run) -> Outcome:
    catalogue = read_candidates(run.read(ITEMS), run.read(DOMAINS))
    old = run.own() if run.same_rules else None
    frame = transform(run.read(SEQUENCES), run.read(USERS), old, candidates=catalogue, config=run.config.negatives)
    return run.commit(frame)


JOB = Job(
    NEGATIVES,
    run,
    reads=(USERS, ITEMS, DOMAINS, SEQUENCES),
    settings=lambda config: config.negatives.model_dump(),
)
