"""What a server knows of items beside its model: which are in stock, and their categories. Read again and again."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.compute as pc

from etl.redaction import one_line
from etl.settings import GraftrecError
from trainer.config import ShelfConfig
from trainer.data.chosen_ids import IN_STOCK, read_columns, read_ids
from trainer.inference.allowed_items import AllowedItems
from trainer.inference.recommender import RequestError
from trainer.serving.metrics import Metrics

MAX_KEPT = 256  # combinations of categories whose items are kept


@dataclass(frozen=True)
class _Tables:
    """As they were read at one time. `kept`: combination of categories -> its items in stock."""

    stock: AllowedItems | None
    categories: dict[str, pa.Array] | None
    kept: dict[tuple[str, ...], AllowedItems] = field(default_factory=dict)


class Shelf:
    """Items that may be answers. Made, it has read its tables. Raises GraftrecError."""

    def __init__(self, config: ShelfConfig, metrics: Metrics, say: Callable[[str], None]) -> None:
        self._config, self._metrics, self._say = config, metrics, say
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._read_again, name="shelf", daemon=True)
        self._tables = self._read()

    def start(self) -> None:
        if self._config.stock is not None or self._config.items is not None:
            self._thread.start()

    def stop(self) -> None:
        self._ended.set()

    def allowed(self, only: Sequence[str]) -> AllowedItems | None:
        """The items that are in stock and have one of some categories; without any, of all. None: every item. Raises
        RequestError for a category that no item has, or where no categories are known."""
        tables = self._tables
        if not only:
            return tables.stock
        if tables.categories is None:
            raise RequestError("expected no `only`: this server knows no categories of items; set `shelf.items`")
        key = tuple(sorted(set(only)))
        if key not in tables.kept:
            if unknown := [name for name in key if name not in tables.categories]:
                raise RequestError(
                    f"only: expected categories that an item has, found {unknown[0][:80]!r}; leave it out"
                )
            found = pc.unique(pa.concat_arrays([tables.categories[name] for name in key]))
            if tables.stock is not None:
                found = found.filter(pc.is_in(found, value_set=tables.stock.raw_ids))
            while len(tables.kept) >= MAX_KEPT:
                tables.kept.pop(next(iter(tables.kept)))
            tables.kept[key] = AllowedItems(found)
        return tables.kept[key]

    def _read(self) -> _Tables:
        stock, items = self._config.stock, self._config.items
        found = _Tables(
            None if stock is None else AllowedItems(read_ids(stock, "item", flag=IN_STOCK)),
            None if items is None else _by_category(read_columns(items, ["item", "categories"])),
        )
        if found.stock is not None:
            self._metrics.stock.set(len(found.stock))
        return found

    def _read_again(self) -> None:
        failed = ""
        while not self._ended.wait(self._config.seconds):
            try:
                self._tables, failed = self._read(), ""
            except Exception as error:  # the tables at hand go on
                self._metrics.failures.inc()
                told = one_line(error) if isinstance(error, GraftrecError) else type(error).__name__
                if told != failed:
                    self._say(f"the shelf stays as it was: {told}")
                failed = told


def _by_category(rows: pa.Table) -> dict[str, pa.Array]:
    """Category -> its items."""
    rows = rows.combine_chunks()
    lists = pa.concat_arrays(rows["categories"].chunks)
    items = pa.concat_arrays(rows["item"].cast(pa.string()).chunks)
    pairs = pa.table({"category": lists.flatten(), "item": items.take(pc.list_parent_indices(lists))})
    found = pairs.group_by("category").aggregate([("item", "list")]).combine_chunks()
    of_each = pa.concat_arrays(found["item_list"].chunks)
    names = found["category"].to_pylist()
    return {name: of_each[place].values for place, name in enumerate(names) if name is not None}
