"""What the server counts, for Prometheus: requests, seconds, batches, which version answered, and the registry."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

CONTENT_TYPE = CONTENT_TYPE_LATEST
_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
_RECORDS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """The metrics of one server. Labels name versions, never users or items."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        mine = self.registry
        self.requests = Counter("graftrec_requests", "Requests for recommendations by status", ["code"], registry=mine)
        self.seconds = Histogram(
            "graftrec_request_seconds", "From a request's first byte to its answer", buckets=_SECONDS, registry=mine
        )
        self.answers = Counter(
            "graftrec_answers",
            "Lists given, by version and by what they are based on",
            ["version", "basis"],
            registry=mine,
        )
        self.batch = Histogram("graftrec_batch_records", "Records answered at once", buckets=_RECORDS, registry=mine)
        self.batch_seconds = Histogram(
            "graftrec_batch_seconds", "Seconds that a batch took", buckets=_SECONDS, registry=mine
        )
        self.waiting = Gauge("graftrec_waiting_records", "Records that wait for an answer", registry=mine)
        self.version = Gauge("graftrec_model_info", "1 for a version that answers", ["version", "arm"], registry=mine)
        self.changes = Counter("graftrec_version_changes", "Times that another version took over", registry=mine)
        self.failures = Counter(
            "graftrec_follow_failures",
            "Looks at registry or shelf, or loads of a version, that failed",
            registry=mine,
        )
        self.stock = Gauge("graftrec_stock_items", "Items in stock, as last read", registry=mine)
        self.lists = Counter("graftrec_served_rows", "Lists in the served log", ["outcome"], registry=mine)
        self.followed = Gauge(
            "graftrec_followed_timestamp_seconds", "When the registry last answered, since 1970", registry=mine
        )

    def serves(self, label: str, before: str | None, arm: str) -> None:
        """Note the version that answers from now on, in place of the one `before`."""
        if before is not None and before != label:
            self.version.remove(before, arm)
        self.version.labels(label, arm).set(1)

    def text(self) -> bytes:
        return generate_latest(self.registry)
