"""Event times as input: buckets and bias beside hand-computed ones, no change at first, and who may know which time."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from etl.settings import ConfigError, replaced
from tests.fixtures.networks import batch_of, model_of
from trainer.config import (
    Bert4RecConfig,
    CaserConfig,
    DupnConfig,
    LossConfig,
    MaskedItemConfig,
    MlpConfig,
    NextItemConfig,
    PeterRecConfig,
    PretrainConfig,
    TargetItemConfig,
)
from trainer.models import group_of
from trainer.models.cpu.bucket_values import bucket_values
from trainer.models.time import NUM_BUCKETS, EventTimes, Pairs, RelativeBias, time_buckets
from trainer.tasks import MaskedItem, NextItem
from trainer.tasks.times import times_before_mask, times_behind_cls, times_of_masked

BASE = {"width": 16, "max_length": 24, "dropout": 0.0, "user_width": 0, "knowledge": {}}
NETWORKS = {
    "bias": Bert4RecConfig(**BASE, time={"bias": True}),
    "transformer": Bert4RecConfig(**BASE, time={"intervals": True}),
    "caser": CaserConfig(**BASE, horizontal=4, vertical=2, time={"intervals": True}),
    "dupn": DupnConfig(**BASE, time={"intervals": True}),
    "peterrec": PeterRecConfig(**BASE, dilations=(1, 2), time={"intervals": True}),
}
TASKS = {"next": NextItem(NextItemConfig()), "masked": MaskedItem(MaskedItemConfig())}
PAIRS = [(name, task) for name in NETWORKS for task in TASKS if (name, task) != ("dupn", "masked")]


def unknown(config):
    """The same network, without the request's time."""
    return replaced(config, time=replaced(config.time, request_time="last_event"))


def timed_batch(lengths, *, seed=0, asked=None):
    """Events apart by anything from no second to years, padded with times of nobody."""
    batch, random = batch_of(lengths, seed=seed), np.random.default_rng(seed + 1)
    apart = np.floor(np.exp(random.uniform(-1, 18, batch.items.shape))).astype(np.int64)
    batch.times = torch.from_numpy(900_000_000 + apart.cumsum(1)) * 1_000_000 + 999_999
    batch.request_times = None if asked is None else torch.tensor(asked) * 1_000_000
    return batch


def drawn(model, seed=5):
    """With times of some effect: weights as after training."""
    random = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.startswith("time."):
            nn.init.normal_(parameter, generator=random)
    return model


# --- buckets ---------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "bucket"),
    [(0, 0), (1, 1), (2, 3), (3, 4), (4, 5), (5, 5), (6, 6), (7, 6), (8, 7), (3_600, 24), (86_400, 33), (-86_400, 33)],
)
def test_a_bucket_is_a_half_of_a_doubling(seconds, bucket):
    assert time_buckets(torch.tensor(seconds, dtype=torch.int32)).item() == bucket


def test_buckets_ascend_and_end_at_the_last_one():
    seconds = np.unique(np.floor(np.exp(np.linspace(0, np.log(2**31 - 1), 3_000))).astype(np.int64))
    found = time_buckets(torch.from_numpy(seconds).int()).numpy()
    halves = np.floor(2 * np.log2(seconds))  # another spacing: half powers of two, beside halves of doublings
    assert (np.diff(found) >= 0).all()
    assert np.abs(found - 1 - halves).max() <= 1
    assert time_buckets(torch.tensor(2**31 - 1, dtype=torch.int32)).item() == NUM_BUCKETS - 1


def test_times_too_far_apart_count_as_the_last_bucket():
    century = 100 * 366 * 86_400
    times = EventTimes.of(torch.tensor([[-century, 0, century]]), torch.tensor([[-century, 0, century]]))
    assert time_buckets(times.own_BT[:, 1:] - times.own_BT[:, :1]).tolist() == [[NUM_BUCKETS - 1] * 2]


@pytest.mark.parametrize("shape", [(1,), (3, 5), (2, 17, 29)])
def test_values_of_buckets_and_their_gradient_are_those_of_an_index(shape):
    table = torch.randn(3, 11, dtype=torch.float64, requires_grad=True)
    buckets = torch.randint(11, shape, dtype=torch.int32)
    slopes = torch.randn(3, *shape, dtype=torch.float64)
    (found,) = torch.autograd.grad(bucket_values(table, buckets), table, slopes)
    (expected,) = torch.autograd.grad(table[:, buckets.long()], table, slopes)
    torch.testing.assert_close(found, expected)
    assert torch.equal(bucket_values(table, buckets), table[:, buckets.long()])


# --- the bias of attention ---------------------------------------------


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("asking", [None, [[6, 2], [0, 4], [1, 5]]])
def test_a_bias_is_that_of_each_pair_alone(causal, asking):
    """Entry by entry, as the paper has it: that of the time from a key's event to the query's request, and of how many
    places lie between."""
    lengths, T = torch.tensor([7, 5, 2]), 7
    batch = timed_batch([7, 5, 2])
    own = batch.times // 1_000_000
    asked = own + 77
    bias = RelativeBias(2, 9).double()
    for parameter in bias.parameters():
        nn.init.normal_(parameter)
    pairs = Pairs.of(EventTimes.of(own, asked), lengths, T, causal=causal)
    places = torch.arange(T).expand(3, T) if asking is None else torch.tensor(asking)
    found = bias(pairs if asking is None else pairs.of_places(places))
    for b in range(3):
        for q, i in enumerate(places[b].tolist()):
            for j in range(T):
                hidden = j > i if causal else j >= lengths[b]
                apart = abs(int(asked[b, i] - own[b, j]))
                whole = int(math.log2(apart))
                bucket = 1 + 2 * whole + (apart >= 1.5 * 2**whole)
                expected = bias.time_embedding[:, bucket] + bias.position_embedding[:, 8 + i - j]
                expected = torch.full_like(expected, -math.inf) if hidden else expected
                torch.testing.assert_close(found[b, :, q, j], expected)


@pytest.mark.parametrize("task", TASKS)
def test_gradients_of_a_bias_are_numeric_ones(task):
    model = drawn(model_of(NETWORKS["bias"], slots=0)).train()
    batch = timed_batch([6, 9, 3])

    def loss():
        return TASKS[task].loss(model, batch)[0]

    for place in range(2):
        for name in ("time_embedding", "position_embedding"):
            table = getattr(model.time["bias"][place], name)
            (slope,) = torch.autograd.grad(loss(), table)
            largest = int(slope.abs().argmax())
            with torch.no_grad():
                table.view(-1)[largest] += 1e-5
                above = loss()
                table.view(-1)[largest] -= 2e-5
                numeric = (above - loss()) / 2e-5
                table.view(-1)[largest] += 1e-5
            torch.testing.assert_close(slope.view(-1)[largest], numeric, rtol=1e-4, atol=1e-7)


def test_attention_with_a_trained_mask_is_torchs():
    query, key, value = (torch.randn(2, 2, 5, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    mask = torch.randn(2, 2, 5, 5, dtype=torch.float64, requires_grad=True)
    from trainer.models.cpu.attention import attended

    slopes = torch.randn(2, 2, 5, 8, dtype=torch.float64)
    given = [query, key, value, mask]
    ours = attended(*given, causal=False)
    theirs = F.scaled_dot_product_attention(*given)
    torch.testing.assert_close(ours, theirs)
    for left, right in zip(
        torch.autograd.grad(ours, given, slopes), torch.autograd.grad(theirs, given, slopes), strict=True
    ):
        torch.testing.assert_close(left, right)


# --- no change at first ---------------------------------------------


@pytest.mark.parametrize(("name", "task"), PAIRS)
def test_untrained_times_change_nothing(name, task):
    config = NETWORKS[name]
    without = replaced(config, time=type(config.time)())
    batch = timed_batch([6, 9, 3], asked=[2_000_000_000] * 3)
    model, plain = model_of(config, slots=0), model_of(without, slots=0)
    with torch.no_grad():
        assert torch.equal(TASKS[task].query(model, batch), TASKS[task].query(plain, batch))
    names = dict(plain.named_parameters())
    added = {name for name, _ in model.named_parameters()} - names.keys()
    assert added
    assert {group for name, group in group_of(model, config).items() if name in added} == {"time"}
    assert all(torch.equal(parameter, names[name]) for name, parameter in model.named_parameters() if name in names)


@pytest.mark.parametrize(("name", "task"), PAIRS)
def test_what_is_new_is_trained(name, task):
    model = model_of(NETWORKS[name], slots=0).train()
    TASKS[task].loss(model, timed_batch([6, 9, 3]))[0].backward()
    lacking = [name for name, p in model.named_parameters() if name.startswith("time.") and not p.grad.any()]
    assert lacking == (["time.intervals.until_embedding"] if task == "masked" and name != "bias" else []) or not lacking


# --- who knows which time ---------------------------------------------


def test_a_position_is_of_places_the_next_event():
    model, batch = model_of(NETWORKS["bias"], slots=0), timed_batch([3, 1], asked=[1_800_000_000, 1_900_000_000])
    seconds = batch.times // 1_000_000
    seconds[:] = torch.tensor([[10, 20, 50], [7, 0, 0]])
    batch.times = seconds * 1_000_000 + 5
    batch.request_times = torch.tensor([90, 70]) * 1_000_000
    known = times_behind_cls(model, batch)
    assert known.own_BT.tolist() == [[0, 0, 10, 40], [0, 0, 0, 0]]  # since the first event; pads count as none
    assert known.query_BT[0].tolist() == [0, 10, 40, 80]
    assert known.query_BT[1, :2].tolist() == [0, 63]
    last = times_behind_cls(model_of(unknown(NETWORKS["bias"]), slots=0), batch)
    assert torch.equal(last.query_BT, last.own_BT)
    before = times_before_mask(model, batch)
    assert before.own_BT[0].tolist() == [0, 10, 40, 80]
    without = times_before_mask(model_of(unknown(NETWORKS["bias"]), slots=0), batch)
    assert without.own_BT[0].tolist() == [0, 10, 40, 40]


def test_a_masked_events_time_is_known_only_where_requests_are():
    batch = timed_batch([5, 2])
    batch.times = torch.tensor([[10, 20, 30, 40, 50], [5, 6, 1, 1, 1]]) * 1_000_000
    chosen = torch.tensor([[1, 0, 1, 1, 0], [0, 1, 0, 0, 0]]).bool()
    known = times_of_masked(model_of(NETWORKS["bias"], slots=0), batch, chosen)
    assert known.own_BT[0].tolist() == [0, 10, 20, 30, 40]
    hidden = times_of_masked(model_of(unknown(NETWORKS["bias"]), slots=0), batch, chosen)
    assert hidden.own_BT[0].tolist() == [0, 0, 0, 0, 30]  # 20, 20, 20, 20, 50
    assert hidden.own_BT[1, :2].tolist() == [0, 0]


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("known", [True, False])
def test_a_causal_position_reads_no_later_time(name, known):
    """Position 4 predicts event 4, whose time it knows only with the request's time, and never event 5's."""
    config = NETWORKS[name] if known else unknown(NETWORKS[name])
    model, batch = drawn(model_of(config, slots=0)), timed_batch([9, 9])
    wanted = torch.zeros(2, 9, dtype=torch.bool)
    wanted[:, 4] = True

    def hidden():
        from trainer.tasks.next_item import begun

        items, events = begun(model, batch)
        with torch.no_grad():
            return model(items, batch.lengths, batch.users, wanted, causal=True, events=events)

    before, times = hidden(), batch.times.clone()
    changes = {}
    for place in range(9):
        batch.times = times.clone()
        batch.times[:, place:] += 3_000_000_000_000  # a month
        changes[place] = not torch.equal(hidden(), before)
    assert [place for place in range(5, 9) if changes[place]] == []
    assert changes[4] == known
    assert changes[3] or name == "caser"


@pytest.mark.parametrize("name", ["bias", "transformer", "caser", "peterrec"])
def test_a_mask_without_the_requests_time_reads_none_of_its_own(name):
    model, batch = drawn(model_of(unknown(NETWORKS[name]), slots=0)), timed_batch([9, 9])
    task, chosen = TASKS["masked"], torch.zeros(2, 9, dtype=torch.bool)
    chosen[:, 6] = True

    def hidden():
        from trainer.models.time import EventInputs

        events = EventInputs(times=times_of_masked(model, batch, chosen))
        with torch.no_grad():
            return model(batch.items, batch.lengths, batch.users, chosen, causal=False, events=events)

    before = hidden()
    batch.times[:, 6] += 1_000_000
    assert torch.equal(hidden(), before)
    batch.times[:, 5] -= 1
    batch.times[:, :5] -= 3_000_000_000_000
    assert not torch.equal(hidden(), before)
    assert task.loss(model, batch)[0].isfinite()


@pytest.mark.parametrize(("name", "task"), PAIRS)
def test_the_requests_time_is_read_where_it_is_known(name, task):
    batch = timed_batch([6, 9, 3], asked=[2_000_000_000] * 3)
    later = timed_batch([6, 9, 3], asked=[2_100_000_000, 2_000_000_000, 2_000_000_000])
    for config, reads in ((NETWORKS[name], True), (unknown(NETWORKS[name]), False)):
        model = drawn(model_of(config, slots=0))
        assert config.reads_times
        assert config.reads_request_time == reads
        with torch.no_grad():
            both = TASKS[task].query(model, batch), TASKS[task].query(model, later)
        assert torch.equal(both[0][0], both[1][0]) != reads
        assert torch.equal(both[0][1:], both[1][1:])


@pytest.mark.parametrize(("name", "task"), PAIRS)
def test_only_differences_of_times_matter_and_no_padding(name, task):
    model = drawn(model_of(NETWORKS[name], slots=0))
    batch = timed_batch([6, 9, 3], asked=[2_000_000_000] * 3)
    with torch.no_grad():
        whole = TASKS[task].query(model, batch)
        batch.times, batch.request_times = batch.times - 10**15, batch.request_times - 10**15
        torch.testing.assert_close(TASKS[task].query(model, batch), whole, rtol=0, atol=0)
        batch.times[~batch.mask_BT] = -(2**62)
        assert torch.equal(TASKS[task].query(model, batch), whole)


# --- settings ---------------------------------------------


def test_models_read_no_times_by_default():
    for config in (Bert4RecConfig(), CaserConfig(), DupnConfig(), PeterRecConfig(), MlpConfig()):
        assert not config.reads_times
        assert not config.reads_request_time
    assert not PretrainConfig().reads_request_time


@pytest.mark.parametrize(
    ("model", "task", "message"),
    [
        (NETWORKS["bias"], TargetItemConfig(loss=LossConfig()), "expected task next_item, masked_item or multi"),
        ({"kind": "mlp", "time": {"intervals": True}}, NextItemConfig(), "found mlp, which reads none"),
        ({"kind": "caser", "time": {"bias": True}}, NextItemConfig(), "time.*bias"),
        ({"kind": "dupn", "time": {"request_time": "guessed"}}, NextItemConfig(), "request_time"),
    ],
)
def test_settings_that_can_not_work_are_refused(model, task, message):
    data = {"domain": "all", "predicted": "target"}
    with pytest.raises((ConfigError, ValueError), match=message):
        PretrainConfig.model_validate({"model": model, "task": task, "data": data})
