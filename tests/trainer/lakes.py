"""A tiny lake, written straight to Delta by the table contract: read by tests instead of an ETL run's."""

import numpy as np
import pyarrow as pa
from deltalake import DeltaTable, write_deltalake

from etl import tables
from etl.tables import FIRST_INDEX, TABLES, bucket_of, cold_user_hash

NUM_USERS, NUM_SOURCE, NUM_TARGET, NUM_TASTES = 60, 24, 16, 4
NUM_DROPPED = 2  # items that k-core drops: in the vocabulary and in their domain, never in a sequence
BUCKETS = 2
DOMAINS = ("source", "target", "all")
PROTOCOLS = ("uniform-100", "popular-100", "top-100")


def build_tiny_lake(folder, *, seed=0, share_tastes=True, num_users=NUM_USERS, described=False):
    """Two domains, users with a taste in both (or, unshared, one in each), items with people of their taste.

    Every user has a source sequence, and the attributes `taste` (of four, that of the sequences where it is shared) and
    `born` (1991 for two of 60); user 0 has no target item and users 1 to 5 too few for a hold-out. Items are
    distinct within a user; times are distinct, the two domains meet in time. Splits `last-5`, `causal`, and `joint-5`,
    in which the domain `all` holds out what the target does; `cold-users` holds out the whole target history of two
    fifths of the users, half of them for test. Release 1. `described`: an item's first category is its
    taste, and events have values: 5 where that is the user's, else 2, none for each seventh item; and kinds: "buy" for
    two in three of the items of the user's taste, "look" for others, none for each eleventh, or for user 9.
    """
    random = np.random.default_rng(seed)
    num_items = NUM_SOURCE + NUM_TARGET
    index = FIRST_INDEX + random.permutation(num_items)  # domains interleave in the vocabulary
    items = [
        {
            "raw": f"i{int(i):02d}",
            "index": int(i),
            "domain": "source" if n < NUM_SOURCE else "target",
            "taste": n % NUM_TASTES,
            "kept": n not in (0, num_items - 1),
        }
        for n, i in enumerate(index)
    ]
    logs = [_log(random, user, items, share_tastes) for user in range(num_users)]
    users = [{"raw": f"u{user:03d}", "index": FIRST_INDEX + user} for user in range(num_users)]

    write = _Writer(str(folder))
    write(
        "items",
        [
            {
                "item": i["raw"],
                "index": i["index"],
                "kept": i["kept"],
                "degree": sum(i["index"] in log[0] for log in logs),
                "title": f"Title {i['raw']}",
                "year": 1990 + i["taste"],
                "attributes": [],
                "categories": [f"kind {i['taste']}", i["domain"]] if described else [i["domain"]],
            }
            for i in sorted(items, key=lambda i: i["index"])
        ],
    )
    write(
        "users",
        [
            {
                "user": u["raw"],
                "index": u["index"],
                "kept": True,
                "degree": len(log[0]),
                "attributes": [
                    ("taste", f"t{(u['index'] - FIRST_INDEX) % NUM_TASTES}"),
                    ("born", str(1990 + (u["index"] - FIRST_INDEX) // 58)),
                ],
            }
            for u, log in zip(users, logs, strict=True)
        ],
    )
    people = [f"person:p{n}" for n in range(3 * NUM_TASTES)]
    write(
        "entities",
        [
            {"entity": p, "index": FIRST_INDEX + n, "kind": "person", "name": p.removeprefix("person:")}
            for n, p in enumerate(people)
        ],
    )
    write(
        "domains",
        [
            {"domain": domain, "item": i["raw"], "index": i["index"], "rule": "tiny"}
            for domain in DOMAINS
            for i in items
            if domain in (i["domain"], "all")
        ],
    )
    write(
        "knowledge",
        [
            {
                "head": i["raw"],
                "relation": relation,
                "tail": people[person],
                "rank": rank,
                "source": "tiny",
                "head_index": i["index"],
                "tail_index": FIRST_INDEX + person,
            }
            for i in items
            for relation, rank, person in (
                ("director", 1, i["taste"]),
                ("actor", 1, NUM_TASTES + i["taste"]),
                ("actor", 2, 2 * NUM_TASTES + i["taste"]),
            )
            if i["index"] % 7  # some items without metadata
        ],
    )
    sequences, negatives = [], []
    for split in ("last-5", "causal", "joint-5", "cold-users"):
        for user, log in zip(users, logs, strict=True):
            rows = _sequences(split, user, log, items)
            if described:
                _add_values_and_kinds(rows, user, items)
            sequences += rows
            negatives += [row for sequence in rows for row in _negatives(random, sequence, log, items)]
    write("sequences", sequences)
    write(
        "baskets",
        [
            row
            for user, log in zip(users, logs, strict=True)
            for domain in DOMAINS
            for row in _baskets(user, domain, log, items)
        ],
    )
    write("negatives", negatives)
    write(
        "releases",
        [
            {
                "release": 1,
                "created": 0,
                "config": "{}",
                "config_hash": "tiny",
                "code_version": "tiny",
                "tables": [{"table": name, "version": version} for name, version in write.written.items()],
            }
        ],
    )
    return str(folder)


class _Writer:
    def __init__(self, lake):
        self.lake, self.written = lake, {}

    def __call__(self, name, rows):
        table = TABLES[name]
        data = pa.Table.from_pylist(rows, schema=table.schema)
        properties = {tables.PROPERTY_BUCKETS: str(BUCKETS), **table.properties}
        place = f"{self.lake}/{name}"
        DeltaTable.create(
            place,
            table.stored,
            partition_by=list(table.partition_by) or None,
            configuration=properties,
            raise_if_key_not_exists=False,  # the properties are ours, not Delta's
        )
        write_deltalake(place, data.cast(table.stored), mode="append")
        self.written[name] = DeltaTable(place).version()


def _log(random, user, items, share_tastes):
    """(items, times) of one user, in time order."""
    tastes = [user % NUM_TASTES] * 2 if share_tastes else random.integers(NUM_TASTES, size=2)
    counts = (int(random.integers(8, 15)), 0 if user == 0 else 3 if user <= 5 else int(random.integers(6, 12)))
    chosen = []
    for domain, taste, count in zip(("source", "target"), tastes, counts, strict=True):
        own = [i for i in items if i["domain"] == domain and i["kept"]]
        weights = np.array([6.0 if i["taste"] == taste else 1.0 for i in own]) / np.arange(1, len(own) + 1) ** 0.5
        picked = random.choice(len(own), size=count, replace=False, p=weights / weights.sum())
        chosen += [own[p]["index"] for p in picked]
    random.shuffle(chosen)
    start = 1_000_000_000_000_000 + 1_000_000 * user
    return chosen, [start + 60_000_000 * n for n in range(len(chosen))]


def _sequences(split, user, log, items):
    domain_of = {i["index"]: i["domain"] for i in items}
    rows = []
    target = [(i, t) for i, t in zip(*log, strict=True) if domain_of[i] == "target"]
    first_held_out = target[-5][1] if len(target) > 5 else None
    if split == "cold-users":
        return _cold_sequences(user, list(zip(*log, strict=True)), target, domain_of)
    for domain in DOMAINS:
        own = [(i, t) for i, t in zip(*log, strict=True) if domain in (domain_of[i], "all")]
        if split == "causal" and domain != "target" and first_held_out is not None:
            own = [(i, t) for i, t in own if t < first_held_out]
        if split == "joint-5" and domain == "all":
            late = target[-5:] if first_held_out is not None else []
            own = [event for event in own if event not in late] + late
        if not own:
            continue
        held_out = first_held_out is not None if (split, domain) == ("joint-5", "all") else len(own) > 5
        end = len(own)
        rows.append(
            {
                "split": split,
                "domain": domain,
                "bucket": bucket_of(user["raw"], BUCKETS),
                "user": user["index"],
                "items": [i for i, _ in own],
                "times": [t for _, t in own],
                "event_types": None,
                "values": None,
                "valid_start": end - 5 if held_out else end,
                "test_start": end - 3 if held_out else end,
                "end": end,
            }
        )
    return rows


def _cold_sequences(user, log, target, domain_of):
    draw = cold_user_hash(user["raw"], "target")
    cold = draw < 0.4 and len(target) > 0 and target[0] != log[0]
    before = [event for event in log if not cold or event[1] < target[0][1]]
    rows = []
    for domain in DOMAINS:
        own = [event for event in before if domain in (domain_of[event[0]], "all")]
        held = target if cold and domain != "source" else []
        end = len(own) + len(held)
        if not end:
            continue
        valid_start = end - 5 if domain == "source" and end > 5 else len(own)
        test_start = end - 3 if domain == "source" and end > 5 else len(own) if draw < 0.2 else end
        rows.append(
            {
                "split": "cold-users",
                "domain": domain,
                "bucket": bucket_of(user["raw"], BUCKETS),
                "user": user["index"],
                "items": [i for i, _ in own + held],
                "times": [t for _, t in own + held],
                "event_types": None,
                "values": None,
                "valid_start": valid_start,
                "test_start": test_start,
                "end": end,
            }
        )
    return rows


def _add_values_and_kinds(rows, user, items):
    taste_of = {i["index"]: i["taste"] for i in items}
    own = (user["index"] - FIRST_INDEX) % NUM_TASTES
    for row in rows:
        row["values"] = [None if i % 7 == 0 else 5.0 if taste_of[i] == own else 2.0 for i in row["items"]]
        if user["index"] != FIRST_INDEX + 9:
            row["event_types"] = [
                None if i % 11 == 0 else "buy" if taste_of[i] == own and i % 3 else "look" for i in row["items"]
            ]


def _baskets(user, domain, log, items):
    """Of one, two and three items in turn; the last of three or more is for test, the one before for validation."""
    domain_of = {i["index"]: i["domain"] for i in items}
    own = [(i, t) for i, t in zip(*log, strict=True) if domain in (domain_of[i], "all")]
    lists = []
    while own:
        size = len(lists) % 3 + 1
        lists.append(own[:size])
        own = own[size:]
    parts = ["train"] * len(lists) if len(lists) < 3 else [*["train"] * (len(lists) - 2), "validation", "test"]
    return [
        {
            "split": "last-5",
            "domain": domain,
            "bucket": bucket_of(user["raw"], BUCKETS),
            "user": user["index"],
            "basket": number,
            "time": events[0][1],
            "part": part,
            "items": [i for i, _ in events],
        }
        for number, (events, part) in enumerate(zip(lists, parts, strict=True))
    ]


def _negatives(random, sequence, log, items):
    if sequence["valid_start"] == sequence["end"]:
        return []
    unseen = [
        i["index"]
        for i in items
        if i["kept"] and sequence["domain"] in (i["domain"], "all") and i["index"] not in log[0]
    ]
    return [
        {key: sequence[key] for key in ("split", "domain", "bucket", "user")}
        | {"protocol": protocol, "part": part, "items": random.permutation(unseen)[:100].tolist()}
        for protocol in PROTOCOLS
        for part in ("validation", "test")
    ]
