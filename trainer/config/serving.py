"""Settings of the HTTP server (`trainer/serving`)."""

from typing import Annotated

from pydantic import Field

from etl.settings import FileName, Place, Section


class ServingLimitsConfig(Section):
    """What the server takes at once. More is refused: a body by 413, records by 400, a full queue by 503."""

    body_bytes: int = Field(1 << 20, ge=1)
    records: int = Field(256, ge=1)  # of one request
    queue: int = Field(1024, ge=1)  # records that wait for an answer
    batch: int = Field(64, ge=1)  # records answered at once
    gather_seconds: float = Field(0.005, ge=0)  # that a batch may wait for as many requests as the one before it had
    body_seconds: float = Field(10, gt=0)  # for a request's body to arrive; then 408
    answer_seconds: float = Field(10, gt=0)  # in the queue and until the answer; then 503
    idle_seconds: int = Field(75, ge=1)  # an open connection without a request


class ShelfConfig(Section):
    """What is known of items beside the model. Tables: *.parquet, *.csv, or Delta."""

    items: Place | None = None  # with `item` and `categories`, as <lake>/items: requests may ask for `only` some
    # With `item`, and perhaps `in_stock` (true, or a number above 0): other items are no answers. *.txt: an id a line.
    stock: Place | None = None
    seconds: float = Field(60, gt=0)  # between two readings


class SplitConfig(Section):
    """A second version that answers a share of the users, by a hash of the user."""

    model: str | None = None  # an alias, which is followed, the number of a version, or a model folder; null: none
    share: float = Field(0.1, ge=0, le=1)  # of the users; requests without a user get the first version
    salt: str = ""  # another one splits users otherwise


class ServedLogConfig(Section):
    """A record of each list that is given: the Delta table `served`, to be joined with what happens later."""

    lake: Place | None = None  # where the table lies, best a lake of its own; null: none is kept
    seconds: float = Field(60, gt=0)  # between two commits; what is not committed is lost with a killed process
    rows: int = Field(100_000, ge=1)  # that wait, where the lake can't be written to; then the oldest are dropped
    users: bool = True  # whether raw user ids are kept, without which nothing can be joined: personal data


class ServedConfig(Section):
    """Hit rates of the versions in a served log, by the events that came after their lists."""

    served: Place = "lake-served"  # lake of the table `served`
    lake: Place = "lake"  # of the table `interactions`
    hours: float = Field(24, gt=0)  # after a list, in which its items can be taken
    ks: tuple[Annotated[int, Field(ge=1)], ...] = (1, 5, 10)
    taken: tuple[str, ...] = ()  # event types that count as taken; none: every event
    impressions: Place | None = None  # *.parquet to be written: items shown and not taken, as a log. Personal data
    event_type: str = "impression"  # of the events in it


class ServeConfig(Section):
    """Answer requests over HTTP by a registered model's champion, which is followed when it moves."""

    registered_model: FileName = "graftrec"
    model: str = "champion"  # an alias, which is followed, the number of a version, or a model folder
    host: str = "127.0.0.1"  # 0.0.0.0: every network; whoever reaches the port may ask
    port: int = Field(8000, ge=0, le=65_535)  # 0: any free one
    follow_seconds: float = Field(2, gt=0)  # between two looks at the registry
    threads: int = Field(1, ge=1)  # of one answer's large operations
    drain_seconds: float = Field(0, ge=0)  # after SIGTERM: how long requests are still taken, while /ready says no
    shutdown_seconds: int = Field(30, ge=0)  # then: how long answers under way may take
    split: SplitConfig = SplitConfig()
    shelf: ShelfConfig = ShelfConfig()
    log: ServedLogConfig = ServedLogConfig()
    limits: ServingLimitsConfig = ServingLimitsConfig()
