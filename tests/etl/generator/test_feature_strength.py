"""What the generated log's features tell of tastes: as much as they are set to, and nothing in its noise twin."""

import numpy as np
import pyarrow as pa
import pytest

from etl.config import GeneratorSource
from etl.generator.behaviour import COMMUNITY
from etl.generator.synthetic_catalogue import world
from etl.generator.synthetic_log import _items, _people, _users, edges, events

SIZES = {"users": 640, "items": 480}
EVERYONE, EVERYTHING = np.arange(640), np.arange(480)


def source(strength, **more):
    return GeneratorSource(**SIZES, feature_strength=strength, **more)


def genres(config):
    return [categories[1] for categories in _items(config, EVERYTHING)["categories"].to_pylist()]


def own_genre_share(config):
    topics = world(config).topic_V
    return np.mean([genre == f"genre-{topic}" for genre, topic in zip(genres(config), topics, strict=True)])


def near_friend_share(config):
    found = edges(config, EVERYONE)
    users, friends = (np.array([int(raw[1:]) for raw in found[name].to_pylist()]) for name in ("user", "friend"))
    return np.mean(users // COMMUNITY == friends // COMMUNITY)


def test_the_strength_of_features_changes_no_event():
    assert events(source(0.0), EVERYONE[:256]).equals(events(source(1.0), EVERYONE[:256]))


def test_the_twin_has_the_same_features_of_the_same_domains_on_other_items():
    own, twin = _items(source(1.0), EVERYTHING), _items(source(0.0), EVERYTHING)
    assert own["item"].equals(twin["item"])
    described = [
        pa.table([table["title"], table["year"], table["categories"]], ["t", "y", "c"]) for table in (own, twin)
    ]
    rows = [sorted(map(str, table.to_pylist())) for table in described]
    assert rows[0] == rows[1]
    domains = [[categories[0] for categories in table["categories"].to_pylist()] for table in (own, twin)]
    assert domains[0] == domains[1]
    assert np.mean(pa.compute.equal(own["title"], twin["title"]).to_numpy(zero_copy_only=False)) < 0.02


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_that_share_of_genres_friends_and_communities_is_true(strength):
    config = source(strength)
    by_chance = 1 / config.topics
    assert own_genre_share(config) == pytest.approx(strength + (1 - strength) * by_chance, abs=0.06)
    community = COMMUNITY / config.users
    near = 0.85 * strength + (1 - 0.85 * strength) * community
    assert near_friend_share(config) == pytest.approx(near, abs=0.05)
    said = [dict(attributes)["community"] for attributes in _users(config, EVERYONE)["attributes"].to_pylist()]
    true = np.mean([int(said) == user // COMMUNITY for user, said in enumerate(said)])
    assert true == pytest.approx(strength + (1 - strength) * community, abs=0.06)


def test_an_items_people_genre_and_title_stay_together():
    config = source(0.0)
    place = world(config)
    names = {item: set() for item in EVERYTHING.tolist()}
    for row in _people(config, EVERYTHING).to_pylist():
        names[int(row["item"][1:])].add(row["name"])
    known = _people(source(1.0), EVERYTHING).to_pylist()
    for item in EVERYTHING.tolist():
        shown = f"i{place.shown_V[item]}"
        assert names[item] == {row["name"] for row in known if row["item"] == shown}
