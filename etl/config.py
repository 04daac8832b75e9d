"""Settings of the ETL, as frozen types."""

import shlex
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self
from urllib.parse import unquote

from pydantic import Field, field_validator, model_validator

from etl import program
from etl.file_config import EdgesFileConfig, EventsFileConfig, FileConfig, ItemsFileConfig, UsersFileConfig
from etl.redaction import remember
from etl.settings import MAX_SECONDS, ConfigError, FileName, Place, Section, named, overridden, setting_words
from etl.settings import GraftrecError as GraftrecError  # versions of 0.1 import it from here: goes with 0.2

# Cores, and how often a task may fail. A local number of 0 is none.
_MASTER = r"^(local(\[(\*|[1-9][0-9]{0,3})(, *[1-9][0-9]{0,3})?\])?|yarn|(spark|k8s|sc|mesos|local-cluster).*)$"


class SparkConfig(Section):
    """What runs the jobs, and how (etl/README.md, "Engines").

    `spark`: Spark, embedded or on the cluster `master` names; `connect`: the Spark Connect server at `master` (sc://…)
    or $SPARK_REMOTE; `sail`: Sail in this process, without Java; `auto`: the first of connect, spark and sail that can.
    """

    engine: Literal["auto", "spark", "connect", "sail"] = "auto"
    # local, local[n], local[*], yarn, or a URL: spark://…, k8s://…, sc://… of Connect
    master: str = Field("local[*]", pattern=_MASTER)
    driver_memory: str = Field("1g", pattern="^ *[1-9][0-9]{0,11}([kKmMgGtT]?[bB]?)? *$")  # e.g. 512m, 4g
    shuffle_partitions: int = Field(4, ge=1, le=1_000_000)
    # Any further spark.* setting; of Sail's own, sail.*. What is secret by name (password, token…) is shown nowhere.
    settings: dict[str, str] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _secrets_are_not_shown(self) -> "SparkConfig":
        remember({"master": self.master, "settings": self.settings})
        return self


class LogSource(Section):
    """Your own log, described by one YAML: an events file, and optionally items, users and edges beside it."""

    kind: Literal["log"] = "log"
    root: Place = "."
    events: EventsFileConfig
    items: ItemsFileConfig | None = None
    users: UsersFileConfig | None = None
    edges: EdgesFileConfig | None = None
    require_known_items: bool = True  # with an items file: an event whose item it lacks goes to quarantine


class MovielensSource(Section):
    """MovieLens-1M: GroupLens' ratings.dat, movies.dat, users.dat (or order.parquet in the place of ratings.dat)."""

    kind: Literal["movielens"] = "movielens"
    root: Place


MAX_TASTES = 500_000_000  # of a generated catalogue: some GB of each worker


class GeneratorSource(Section):
    """A synthetic two-domain log of any size, reproducible from `seed` whatever the number of partitions."""

    kind: Literal["generator"] = "generator"
    users: int = Field(1_000, ge=10, le=1_000_000_000)
    items: int = Field(600, ge=20, le=10_000_000)
    target_share: float = Field(0.3, gt=0, lt=1)  # of items, in the domain `target`
    mean_events: float = Field(60, gt=1, le=1_000_000)  # per user, both domains together
    target_event_share: float = Field(0.25, gt=0, lt=1)
    tastes: int = Field(12, ge=1, le=1_000)  # latent dimensions
    taste_strength: float = Field(3.0, ge=0, le=1_000)  # how far taste outweighs popularity
    drift: float = Field(0.5, ge=0, le=1)  # share of a user's taste that changes between the first and the last event
    popularity_exponent: float = Field(0.9, ge=0, le=100)  # Zipf
    people: int = Field(120, ge=4, le=10_000_000)  # directors and actors
    share_tastes: bool = True  # False: a user's taste and step, and a person's, differ from domain to domain
    friends: float = Field(4, ge=0, le=100_000)  # mean number per user
    topics: int = Field(12, ge=1, le=10_000)  # genres
    session_events: float = Field(3, ge=1, le=1_000_000)  # mean, in one domain
    topical: float = Field(0.85, ge=0, le=1)  # share of events on the topic of their session
    rhythm: float = Field(0.95, ge=0, le=1)  # share of sessions whose topic is the user's step from the last one's
    series_share: float = Field(0.2, ge=0, le=1)  # of items, parts of series: each is taken after the one before
    sequels: float = Field(0.1, ge=0, le=1)  # share of events that are the next part of a series begun, if any
    late_share: float = Field(0.0, ge=0, le=1)  # of users, who come to the target after most of their source events
    source_teaches: bool = True  # False: the source domain is drawn by popularity alone, in random order
    # Share of items with a title, genre and people of their own, the others have those of another item; and of users'
    # communities and near friends. 0: a noise twin, with the same events, in which features say nothing of tastes.
    feature_strength: float = Field(1.0, ge=0, le=1)
    # A log with a calendar, to be split by time: where one of the next four is set, dates decide what is taken.
    returns: float = Field(0.0, ge=0, le=10_000)  # mean number of breaks of a month and more in a user's 200 days
    new_items: float = Field(0.0, ge=0, lt=1)  # share of items that come out after the log's beginning
    trends: float = Field(0.0, ge=0, le=1_000)  # how far items' popularity rises and falls within a year
    season: float = Field(0.0, ge=0, le=1)  # how far evenings, weekends and winters are busier
    seed: int = 0

    @model_validator(mode="after")
    def _catalogue_fits_workers(self) -> Self:
        numbers = (self.items + self.people + self.topics) * self.tastes
        if numbers > MAX_TASTES:
            raise ValueError(
                f"tastes: expected at most {MAX_TASTES:,} numbers of items, people and topics, which each worker "
                f"keeps, found {numbers:,}; lower tastes, items or people"
            )
        return self

    @property
    def has_calendar(self) -> bool:
        return bool(self.returns or self.new_items or self.trends or self.season)


SourceConfig = Annotated[LogSource | MovielensSource | GeneratorSource, Field(discriminator="kind")]


class CleaningConfig(Section):
    max_quarantine_share: float = Field(0.01, ge=0, le=1)  # of a file kind's rows; above it the job fails
    min_rows: int = Field(100, ge=0)  # fewer rejected rows of appended files count as a share of the whole log
    min_time: str = "1970-01-01"  # an event before it is impossible
    max_time: str | None = None  # None: a day after now
    # An event is a stray where this many years without any lie between it and the most events; None: none is.
    max_gap_years: float | None = Field(10, gt=0, le=1_000_000)


class KCoreConfig(Section):
    min_user: int = Field(5, ge=1)
    min_item: int = Field(5, ge=1)
    iterate: bool = True  # False: one pass over the raw degrees, the survey's way


class DomainConfig(Section):
    """An item belongs when its categories meet every condition given; a condition left empty holds for all items."""

    name: FileName
    any_of: tuple[str, ...] = ()
    all_of: tuple[str, ...] = ()
    none_of: tuple[str, ...] = ()
    attribute: str | None = None  # test this attribute's value instead of the categories


class TriplesConfig(Section):
    """A knowledge graph: each row says that its head (`id`) stands in a relation to a tail, which is an entity."""

    relation: str | int
    tail: str | int
    # With `link`: triples whose head is no item are kept too, and a tail that is an item is that item. Else triples
    # begin at items and end at entities.
    whole: bool = False


class LinkConfig(FileConfig):
    """A file that says which entity of a graph an item is."""

    item: str | int
    entity: str | int


class KnowledgeFileConfig(FileConfig):
    """Side information joined to items by id, or by normalised title and year."""

    name: str  # the `source` of its triples
    by: Literal["id", "title"]
    id: str | int | None = None
    title: str | int | None = None
    year: str | int | None = None
    relations: dict[str, tuple[str | int, ...]] = Field(default_factory=dict)  # relation -> columns in order of rank
    triples: TriplesConfig | None = None  # in the place of `relations`; a row's rank is its place in the file
    link: LinkConfig | None = None  # of triples: `id` is an entity, which this file turns into an item
    list_columns: bool = False  # the cells hold Python-style lists ("['A', 'B']") or single values
    underscores: bool = False  # names are spelled with underscores for spaces (DBpedia)
    max_rank: dict[str, int] = Field(default_factory=dict)  # e.g. actor: 3

    @model_validator(mode="after")
    def _is_one_shape(self) -> Self:
        if (self.triples is None) == (not self.relations):
            raise ValueError("relations, triples: expected one of both; leave the other out")
        if (self.triples is not None and self.by != "id") or (self.link is not None and self.triples is None):
            raise ValueError("triples: expected by: id, and link only beside triples; mend by or link")
        if self.triples is not None and self.triples.whole and self.link is None:
            raise ValueError("triples.whole: expected a link, which says what is an item, found none; add it")
        return self

    @field_validator("format")
    @classmethod
    def _is_no_table(cls, form: str) -> str:
        if form == "table":
            raise ValueError("expected files or a Delta table, found 'table'; write it to Parquet files first")
        return form


class KnowledgeConfig(Section):
    """Files in order of trust: a later one supplies only what the earlier ones lack for an item and relation."""

    root: Place = "."
    files: tuple[KnowledgeFileConfig, ...] = ()


class ColdItemsConfig(Section):
    """Items that a split holds out whole, by a hash of their raw ids (`etl.tables.cold_item_hash`)."""

    share: float = Field(0.15, gt=0, lt=0.5)  # of items, for test
    validation: float = Field(0.05, gt=0, lt=0.5)  # and of others, for validation
    domain: str | None = None  # only items of this one; None: of every domain
    seed: int = 0  # of the hash: another one holds out other items


class SplitConfig(Section):
    """Hold-out by position: the last `validation` + `test` items of a user and domain; of `cold_users`, all of them.
    With `train_until`, hold-out by time: of every user and domain, what comes after that date. With `random` or
    `user_folds`, hold-out by chance.
    """

    LATER: ClassVar = ("ties", "ties_seed")

    name: FileName = "last-5"
    validation: int = Field(2, ge=0)  # 0: trained on all but the test items, for a fixed number of epochs
    test: int = Field(3, ge=0)
    # The order of a user's events at one time. file: as in the log's files; item: by raw item id, numbers by value;
    # scrambled: by a hash of user, item, time and `ties_seed`.
    ties: Literal["file", "item", "scrambled"] = "file"
    ties_seed: int = 0
    min_train: int = Field(1, ge=1)  # a user with fewer training items left is not evaluated: trains only
    causal_target: str | None = None  # cut every other domain at the user's first held-out item of this domain
    # In the domain `all` the hold-out is that of this domain, moved to the end: a model of all domains has then seen
    # nothing that this one holds out.
    joint_target: str | None = None
    # Share of the users of `joint_target` whose whole history there is the test part, and as many again the validation
    # part. By a hash of the raw user id; only users with `min_train` events elsewhere before.
    cold_users: float | None = Field(None, gt=0, lt=0.5)
    # Items that nothing trains on, with all their events; beside them the last warm items are held out, by the counts.
    cold_items: ColdItemsConfig | None = None
    # A split by time, in the place of the counts above: events before this date are trained on. ISO 8601, in UTC unless
    # an offset is given.
    train_until: str | None = None
    validate_until: str | None = None  # events from train_until until before this date are the validation part
    test_until: str | None = None  # and those until before this date the test part; None: all that are left
    # Shares of each user's events that are the validation and the test part, chosen by a hash in the place of the
    # counts above, e.g. [0.1, 0.1]. What is trained on may then be later than what is held out.
    random: tuple[float, float] | None = None
    # Users in so many folds, by a hash of the raw id: of those in `fold` the whole history is the test part.
    user_folds: int | None = Field(None, ge=2, le=10_000)
    fold: int = Field(0, ge=0)

    @property
    def is_by_time(self) -> bool:
        return self.train_until is not None

    @property
    def is_by_chance(self) -> bool:
        return self.random is not None or self.user_folds is not None

    @property
    def has_validation(self) -> bool:
        """False where the last `test` items are held out, and none before them."""
        other = self.is_by_time or self.is_by_chance or self.cold_items is not None or self.cold_users is not None
        return other or self.validation > 0 or not self.test


class SequencesConfig(Section):
    """Of a user with more kept events than `max_events`, over all domains, the newest so many are kept (of events at
    the same time those that stand last in the log), in sequences and baskets. A task's memory depends on it: a million
    events are 12 MB of a row, and more than a person makes: one in half a minute, for a year.
    """

    max_events: int = Field(1_000_000, ge=1, le=100_000_000)


class BasketsConfig(Section):
    """What was taken together: the log's own column `basket`, or whatever a user did with no longer pause between."""

    gap_minutes: float | None = Field(
        None, gt=0, le=1_000_000_000
    )  # a longer one begins a new basket; None: the log's column


class NegativesConfig(Section):
    protocols: tuple[Literal["uniform-100", "popular-100", "top-100"], ...] = ("uniform-100", "popular-100")
    seed: int = 0


class EtlConfig(Section):
    """Everything `python -m etl` needs."""

    lake: Place = "lake"  # a local folder or an object-store URI
    source: SourceConfig
    cleaning: CleaningConfig = CleaningConfig()
    kcore: KCoreConfig = KCoreConfig()
    domains: tuple[DomainConfig, ...] = ()
    knowledge: KnowledgeConfig = KnowledgeConfig()
    splits: tuple[SplitConfig, ...] = (SplitConfig(),)
    sequences: SequencesConfig = SequencesConfig()
    baskets: BasketsConfig = BasketsConfig()
    negatives: NegativesConfig = NegativesConfig()
    spark: SparkConfig = SparkConfig()
    buckets: int = Field(4, ge=1, le=100_000)  # of users; fixed when the lake is made
    wait_seconds: float = Field(
        120, ge=0, le=MAX_SECONDS
    )  # for another process that writes to the lake; then exit code 5


def check_root(source: SourceConfig, setting: str = "source.root") -> None:
    """Raises ConfigError where a log's local `root` is no folder, before an engine starts, a lake is made or a run is
    recorded. `setting`: its name, as the user gives it."""
    if isinstance(source, GeneratorSource):
        return
    if isinstance(source, LogSource) and (source.events.format == "table" or source.events.path.startswith("/")):
        return  # the root is not read
    folder = unquote(source.root.removeprefix("file://")) if source.root.startswith("file://") else source.root
    if "://" not in folder and not Path(folder).expanduser().is_dir():
        raise ConfigError(f"{setting}: expected the folder of the log, found none at {source.root}; mend it")


def etl_command(lake: str, job: str = "all") -> str:
    """The command that writes a lake's tables, for hints in messages. It names the configuration in use, with the
    settings of the command line, since others would write another log into the lake."""
    given = [word for name, value in _etl_settings() if name != "lake" for word in setting_words(name, value)]
    words = [*program.words("etl", job), "--config", named(EtlConfig, "etl/YOURS"), *given, "--lake", lake]
    return f"`{shlex.join(words)}`"


def _etl_settings() -> list[tuple[str, Any]]:
    """Settings of the ETL that the command line gave, to it or to a recipe that has an ETL."""
    for kind, given in reversed(overridden.items()):
        if kind is EtlConfig or "etl" in kind.model_fields:
            before = "" if kind is EtlConfig else "etl."
            return [(name.removeprefix(before), value) for name, value in given if name.startswith(before)]
    return []
