"""Settings that came later leave the hashes of older configurations as they were: finished runs stay finished."""

import pytest

from etl.config import SplitConfig
from etl.section import config_hash
from trainer import config as configs

HASHES = {  # of defaults, at 4304a78
    SplitConfig: "ffae4930b2946c6b",
    configs.Bert4RecConfig: "4bcecbedf268deb4",
    configs.PeterRecConfig: "1dc8faee0e444f23",
    configs.CaserConfig: "9bdee07033110a29",
    configs.DupnConfig: "e839d373d87a153a",
    configs.MlpConfig: "f6d08e6ceb29c8d7",
    configs.PretrainConfig: "f03b0184c174e9a3",
    configs.FinetuneConfig: "516e9f0aaf4b916e",
    configs.RecommendConfig: "035ad51014ea6379",
    configs.EvaluateConfig: "edd4053d3e007e45",
    configs.PromoteConfig: "89f812658720b1c2",
    configs.FriendsConfig: "62134bd747f25b4a",
}


@pytest.mark.parametrize("kind", HASHES, ids=lambda kind: kind.__name__)
def test_defaults_have_the_hash_that_they_had(kind):
    assert config_hash(kind()) == HASHES[kind]


@pytest.mark.parametrize(
    "later",
    [
        configs.Bert4RecConfig(time={"bias": True}),
        configs.CaserConfig(time={"intervals": True}),
        configs.PromoteConfig(across=("request_time",)),
        configs.RecommendConfig(time="2024-05-01T12:00"),
        SplitConfig(ties="scrambled", ties_seed=1),
    ],
    ids=lambda one: type(one).__name__,
)
def test_what_came_later_counts_where_it_is_set(later):
    assert config_hash(later) != HASHES[type(later)]
