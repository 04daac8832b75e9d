"""MovieLens-1M as GroupLens ships it (Harper & Konstan 2015): a log described in code.

``ratings.dat`` gives times in seconds; many ratings of a user share one, and keep the file's order. Where it is absent,
``order.parquet`` (user_id, movie_id, position) stands in for it: then a time is an order only.
"""

from etl.config import CleaningConfig, LogSource, MovielensSource
from etl.file_config import ColumnsConfig, EventsFileConfig, ItemsFileConfig, UsersFileConfig
from etl.settings import GraftrecError
from etl.sources.files import find_files
from etl.sources.log import FileLog

_DAT = {"separator": "::", "header": False, "quote": None, "encoding": "latin-1"}


def movielens(config: MovielensSource, cleaning: CleaningConfig) -> FileLog:
    """The source for a folder of GroupLens' files. Raises GraftrecError where neither file of ratings is there."""
    return FileLog(described(config.root), cleaning)


def described(root: str) -> LogSource:
    """The description that ML-1M's files answer to."""
    items = {"id": 0, "title": 1, "year": "title", "categories": 2}
    users = {"id": 0, "attributes": {"gender": 1, "age": 2, "occupation": 3, "zip": 4}}
    return LogSource(
        root=root,
        events=_events(root),
        items=ItemsFileConfig.model_validate({"path": "movies.dat"} | _DAT | items),
        users=UsersFileConfig.model_validate({"path": "users.dat"} | _DAT | users),
    )


def _events(root: str) -> EventsFileConfig:
    ratings = {"path": "ratings.dat", "columns": ColumnsConfig(user=0, item=1, value=2, time=3)}
    order = ColumnsConfig(user="user_id", item="movie_id", time="position")
    if _has(root, "ratings.dat") or not _has(root, "order.parquet"):
        return EventsFileConfig.model_validate(ratings | _DAT)
    return EventsFileConfig(path="order.parquet", format="parquet", columns=order, time_unit="ordinal")


def _has(root: str, name: str) -> bool:
    try:
        return bool(find_files(root, name, what="source.root"))
    except GraftrecError:
        return False
