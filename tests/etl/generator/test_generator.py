"""The generated world: the same whatever the blocks and partitions, and with the order that its docstrings promise."""

import itertools
from collections import defaultdict

import numpy as np
import pyarrow as pa
import pytest

from etl.config import GeneratorSource
from etl.generator.behaviour import draw_tastes
from etl.generator.synthetic_catalogue import ACTORS, world
from etl.generator.synthetic_log import BLOCK, events

SMALL = {"users": 600, "items": 240, "mean_events": 40}


def made(**settings):
    """All events of a log."""
    config = GeneratorSource(**{**SMALL, **settings})
    blocks = [np.arange(start, min(start + BLOCK, config.users)) for start in range(0, config.users, BLOCK)]
    return config, pa.concat_tables([events(config, block) for block in blocks])


def histories(config, table):
    """(user, domain) -> positions on the shelf, in order; and the same in sessions."""
    place = world(config)
    where = {}
    for domain, shelf in enumerate(place.shelves):
        where |= {f"i{item}": (domain, position) for position, item in enumerate(shelf.items.tolist())}
    flat, sessions = defaultdict(list), defaultdict(lambda: defaultdict(list))
    for row in table.select(["user", "item", "basket"]).to_pylist():
        domain, position = where[row["item"]]
        flat[row["user"], domain].append(position)
        sessions[row["user"], domain][row["basket"]].append(position)
    return flat, {key: list(by_basket.values()) for key, by_basket in sessions.items()}


def topic_of(shelf, items):
    """The most frequent topic of a session."""
    return int(np.bincount(shelf.topic_V[items]).argmax())


def test_a_users_events_do_not_depend_on_the_block():
    config, whole = made()
    alone = events(config, np.array([300]))
    mask = pa.compute.equal(whole["user"], "u300")
    assert alone.equals(whole.filter(mask).combine_chunks())


def test_other_seeds_make_other_logs():
    assert not made()[1].equals(made(seed=1)[1])
    assert made()[1].equals(made()[1])


@pytest.mark.parametrize("settings", [{}, {"source_teaches": False}, {"items": 9_000, "people": 400}])
def test_no_item_is_taken_twice_and_time_goes_on(settings):
    config, table = made(**settings)
    flat, _ = histories(config, table)
    assert all(len(set(items)) == len(items) for items in flat.values())
    frame = table.select(["user", "time"]).to_pandas()
    assert (frame.groupby("user")["time"].diff().dropna() >= 0).all()


def test_sizes_follow_the_settings():
    config, table = made(users=2_000)
    flat, _ = histories(config, table)
    target = sum(len(items) for (_, domain), items in flat.items() if domain == 1)
    assert table.num_rows / config.users == pytest.approx(config.mean_events, rel=0.1)
    assert target / table.num_rows == pytest.approx(config.target_event_share, rel=0.1)


def test_a_series_shares_its_people_and_goes_on_in_order():
    config, table = made()
    place = world(config)
    later = np.flatnonzero(place.part_V)
    assert len(later) > 20
    assert (place.director_V[later] == place.director_V[place.first_V[later]]).all()
    assert (place.actors_VA[later] == place.actors_VA[place.first_V[later]]).all()
    flat, _ = histories(config, table)
    gaps = []
    for (_, domain), items in flat.items():
        shelf = place.shelves[domain]
        at = {item: step for step, item in enumerate(items)}
        for item, sequel in enumerate(shelf.sequel_V.tolist()):
            if sequel in at:
                assert item in at, "no part without the one before"
                gaps.append(at[sequel] - at[item])
    assert min(gaps) >= 4
    assert np.mean(np.array(gaps) > 8) > 0.2, "many lie further apart than counts of neighbours reach"


def test_the_people_of_an_item_work_in_its_topic():
    place = world(GeneratorSource(topics=6, people=120))
    assert (place.topic_V == place.director_V % 6).all()
    assert ((place.actors_VA - 30) % 6 == place.topic_V[:, None]).all()
    assert all(len(set(row)) == ACTORS for row in place.actors_VA.tolist())


def test_sessions_have_topics_that_follow_the_users_step_in_both_domains():
    config, table = made(topical=1.0, rhythm=1.0, sequels=0.0)
    place = world(config)
    steps = draw_tastes(config, place, np.arange(config.users)).step_DB
    assert (steps[0] == steps[1]).all()
    _, sessions = histories(config, table)
    for domain, shelf in enumerate(place.shelves):
        followed, persisted = [], []
        for user in range(config.users):
            topics = [topic_of(shelf, items) for items in sessions.get((f"u{user}", domain), [])]
            persisted += [len(set(shelf.topic_V[s].tolist())) == 1 for s in sessions.get((f"u{user}", domain), [])]
            followed += [
                (b - a) % config.topics == steps[domain][user] % config.topics for a, b in itertools.pairwise(topics)
            ]
        assert np.mean(followed) > 0.9
        assert np.mean(persisted) > 0.9, "until a topic has nothing left"


def test_counts_of_neighbours_do_not_see_the_step():
    """Over all users every step is as frequent as its opposite."""
    config = GeneratorSource(users=4_000)
    steps = draw_tastes(config, world(config), np.arange(config.users)).step_DB[0]
    shares = np.bincount(steps + 3, minlength=7) / config.users
    assert shares[[0, 1, 2, 4, 5, 6]] == pytest.approx(1 / 6, abs=0.03)
    assert shares[3] == 0


def test_tastes_drift_unless_told_not_to():
    users = np.arange(300)
    place = world(GeneratorSource())
    for drift, least, most in ((0.0, 1 - 1e-6, 1 + 1e-6), (0.5, 0.5, 0.9), (1.0, -0.2, 0.2)):
        tastes = draw_tastes(GeneratorSource(drift=drift), place, users)
        assert least <= float((tastes.early_DBK * tastes.late_DBK).sum(-1).mean()) <= most


def test_tastes_are_shared_unless_told_not_to():
    users = np.arange(2_000)
    for share in (True, False):
        config = GeneratorSource(share_tastes=share)
        tastes = draw_tastes(config, world(config), users)
        alike = float((tastes.early_DBK[0] * tastes.early_DBK[1]).sum(-1).mean())
        assert (alike == pytest.approx(1, abs=1e-5)) if share else abs(alike) < 0.15


def test_a_source_that_teaches_nothing_differs_in_the_source_only():
    config, table = made(source_teaches=False)
    taught, other = made()
    flat, sessions = histories(config, table)
    as_taught, _ = histories(taught, other)
    for user in range(config.users):
        assert flat.get((f"u{user}", 1)) == as_taught.get((f"u{user}", 1)), "the target is the very same"
    shelf = world(config).shelves[0]
    sizes = np.bincount(shelf.topic_V[[item for key, items in flat.items() if key[1] == 0 for item in items]])
    chance = float(np.square(sizes / sizes.sum()).sum())
    pairs = [
        shelf.topic_V[a] == shelf.topic_V[b]
        for (_, domain), parts in sessions.items()
        if domain == 0
        for items in parts
        for a, b in itertools.pairwise(items)
    ]
    assert np.mean(pairs) == pytest.approx(chance, abs=0.02), "a session has no topic"
    first = [items[: len(items) // 2] for (_, domain), items in flat.items() if domain == 0]
    last = [items[len(items) // 2 :] for (_, domain), items in flat.items() if domain == 0]
    ranks = [np.mean([item for items in half for item in items]) for half in (first, last)]
    assert ranks[0] == pytest.approx(ranks[1], rel=0.03), "no order either"


def test_popularity_is_skewed_as_the_exponent_says():
    config, table = made(taste_strength=0.0, topical=0.0, sequels=0.0, series_share=0.0, users=2_000)
    flat, _ = histories(config, table)
    counts = np.bincount([item for (_, domain), items in flat.items() if domain == 1 for item in items])
    assert np.corrcoef(np.log(np.arange(1, len(counts) + 1)), np.log(counts))[0, 1] < -0.9


def test_users_who_come_late_have_most_of_their_source_events_before():
    def late(share):
        """Share of users with half of their source events before the first in the target."""
        first, times = {}, defaultdict(list)
        for row in made(late_share=share)[1].select(["user", "time", "basket"]).to_pylist():
            if "t" in row["basket"]:
                first[row["user"]] = min(row["time"], first.get(row["user"], row["time"]))
            else:
                times[row["user"]].append(row["time"])
        long = {user: np.array(own) for user, own in times.items() if len(own) >= 20}
        return np.mean([np.mean(own < first[user]) > 0.47 for user, own in long.items()])

    assert late(1) == 1
    by_chance = late(0)
    assert by_chance < 0.25
    assert late(0.3) == pytest.approx(0.3 + 0.7 * by_chance, abs=0.08)


# --- with a calendar --------------------------------------------------------------------------------------------------

DAY = 86_400_000_000
CALENDAR = {"returns": 1.5, "new_items": 0.4, "trends": 0.8, "season": 0.6}


def test_a_calendar_changes_neither_items_nor_tastes():
    plain, dated = world(GeneratorSource(**SMALL)), world(GeneratorSource(**SMALL, **CALENDAR))
    for name in ("domain_V", "director_V", "actors_VA", "taste_VK", "topic_V", "part_V", "year_V", "word_VW"):
        assert (getattr(plain, name) == getattr(dated, name)).all()
    for one, other in zip(plain.shelves, dated.shelves, strict=True):
        assert (one.items == other.items).all()
        assert (one.released_V == one.released_V[0]).all()


@pytest.mark.parametrize(
    "more", [{}, {"source_teaches": False}, {"late_share": 0.5}, {"items": 9_000, "people": 400, "users": 60}]
)
def test_no_item_is_taken_before_it_comes_out(more):
    config, table = made(**{**CALENDAR, **more})
    place = world(config)
    released = np.zeros(config.items, np.int64)
    for shelf in place.shelves:
        released[shelf.items] = shelf.released_V
    new = released > released.min()
    assert new.mean() == pytest.approx(0.4, abs=0.15)
    later = np.flatnonzero(place.part_V)
    for item in later[:200].tolist():
        before = np.flatnonzero((place.first_V == place.first_V[item]) & (place.part_V == place.part_V[item] - 1))
        assert released[before] <= released[item], "no part before the one before it"
    frame = table.select(["user", "item", "time"]).to_pandas()
    number = frame["item"].str[1:].astype(int).to_numpy()
    assert (frame["time"].to_numpy() >= released[number] * 1_000_000).all()
    assert new[number].mean() > 0.1
    assert (frame.groupby("user")["time"].diff().dropna() >= 0).all()
    assert not frame.duplicated(["user", "item"]).any()


def test_a_users_events_do_not_depend_on_the_block_with_a_calendar():
    config, whole = made(**CALENDAR)
    mask = pa.compute.equal(whole["user"], "u300")
    assert events(config, np.array([300])).equals(whole.filter(mask).combine_chunks())


def test_users_come_back_after_breaks():
    def breaks(returns):
        """Mean of a user."""
        frame = made(returns=returns, season=0.1, mean_events=120)[1].select(["user", "basket", "time"]).to_pandas()
        inside = frame.groupby("basket")["time"].agg(["min", "max"])
        assert (inside["max"] - inside["min"]).max() < DAY, "a break parts no session"
        return (frame.groupby("user")["time"].diff() >= 30 * DAY).sum() / 600

    assert 1.3 < breaks(2.0) - breaks(0.0) < 2, "some meet, and some begin after the last event"


def test_evenings_and_weekends_are_busier():
    def shares(season):
        time = made(season=season, returns=0.1)[1]["time"].to_numpy()
        hour, weekday = time // 3_600_000_000 % 24, (time // DAY + 3) % 7
        return np.mean((hour >= 17) & (hour < 23)), np.mean(weekday >= 5)

    assert shares(0.0) == pytest.approx((6 / 24, 2 / 7), abs=0.02)
    evening, weekend = shares(1.0)
    assert evening > 0.4
    assert weekend > 0.4


def test_popularity_follows_the_year():
    def likeness(trends):
        """Correlation of items' events in a season and half a year later."""
        frame = made(trends=trends, returns=0.1, items=120)[1].select(["item", "time"]).to_pandas()
        half = frame["time"] // DAY % 365 < 183
        number = frame["item"].str[1:].astype(int)
        return np.corrcoef(*(np.log1p(np.bincount(number[part], minlength=120)) for part in (half, ~half)))[0, 1]

    assert likeness(0.0) > 0.85
    assert likeness(1.5) < likeness(0.0) - 0.1
