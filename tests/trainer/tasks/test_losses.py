"""gBCE and the sampled softmax over a shared pool: hand-computed values, numpy's own derivation, what is masked."""

import math

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from etl.section import config_hash
from etl.tables import FIRST_INDEX
from tests.fixtures.networks import NUM_ITEMS, batch_of, model_of
from trainer.config import Bert4RecConfig, LossConfig, NextItemConfig
from trainer.parallel.cores import use_threads
from trainer.tasks import NextItem, softmax
from trainer.tasks.loss import (
    binary_loss,
    generalised_binary_loss,
    positive_power,
    sampled_softmax,
    summed_loss,
)

SMALL = Bert4RecConfig(blocks=1, width=16, heads=2, max_length=12, dropout=0.0, user_width=0, knowledge={})
COSINE = SMALL.model_copy(update={"score": "cosine"})


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


class Given:
    """In a model's place: scores that are given, of the rows FIRST_INDEX, FIRST_INDEX + 1, … for every hidden state."""

    def __init__(self, scores):
        self.table = torch.cat([torch.zeros(FIRST_INDEX, dtype=scores.dtype), scores])[:, None]

    multiplies = True

    def head(self, hidden_ND):
        return hidden_ND

    def item_vectors(self, rows):
        return self.table[rows]

    def as_scored(self, vectors):
        return vectors

    def bias(self, rows):
        return torch.zeros(len(rows), dtype=self.table.dtype)

    def matched(self, query_NQ, vectors_NQ):
        return (query_NQ * vectors_NQ).sum(-1)

    def crossed(self, query_NQ, vectors_CQ, bias_C):
        return query_NQ @ vectors_CQ.T + bias_C


def rows_of(*places):
    return FIRST_INDEX + torch.tensor(places)


# --- gBCE -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("negatives", "items", "calibration", "power"),
    [
        (256, 3_417, 0.0, 1.0),  # t 0: BCE as it is
        (256, 3_417, 1.0, 256 / 3_416),  # t 1: alpha, calibrated
        (1, 3, 0.5, 0.75),  # alpha 1/2: 1/2 (1/2 (1 - 2) + 2)
        (2, 9, 0.75, 7 / 16),  # alpha 1/4: 1/4 (3/4 (1 - 4) + 4)
        (8, 9, 0.6, 1.0),  # all negatives: there is nothing to make up for
    ],
)
def test_power_of_the_positive_is_the_papers_beta(negatives, items, calibration, power):
    assert positive_power(negatives, items, calibration) == pytest.approx(power, rel=1e-14)


def test_gbce_of_two_negatives_by_hand():
    """sigma(ln 3) = 3/4, sigma(0) = 1/2, sigma(-ln 3) = 1/4, beta 7/16: (7/16 ln 4/3 + ln 2 + ln 4/3) / 3."""
    model = Given(torch.tensor([math.log(3), 0.0, -math.log(3)], dtype=torch.float64))
    found = generalised_binary_loss(model, torch.ones(1, 1, dtype=torch.float64), rows_of(0), rows_of(1, 2), 7 / 16)
    assert found.item() == pytest.approx((7 / 16 * math.log(4 / 3) + math.log(2) + math.log(4 / 3)) / 3, rel=1e-14)


@pytest.mark.parametrize("config", [SMALL, COSINE])
def test_gbce_of_a_model_and_its_slopes_are_numpys(config):
    """By the paper's two steps, the positive's logit transformed, then BCE, in float64; negatives drawn twice count
    twice, those that are the target not at all."""
    model = model_of(config, slots=0)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(5, 16, dtype=torch.float64, generator=generator, requires_grad=True)
    targets, negatives = rows_of(0, 3, 3, 7, 9), rows_of(3, 3, 4, 9, 11, 12)
    power = positive_power(6, 30, 0.75)
    found = generalised_binary_loss(model, hidden, targets, negatives, power)
    scores = model.scores(hidden).detach().numpy()
    expected = 0.0
    for row, target in enumerate(targets.tolist()):
        logit = -np.log(sigmoid(scores[row, target]) ** -power - 1)
        terms = [math.log(sigmoid(logit))]
        terms += [math.log(1 - sigmoid(scores[row, other])) for other in negatives.tolist() if other != target]
        expected -= sum(terms) / 7
    assert found.item() == pytest.approx(expected, rel=1e-12)

    def loss(hidden):
        return generalised_binary_loss(model, hidden, targets, negatives, power)

    assert torch.autograd.gradcheck(loss, (hidden,))


def test_gbce_is_right_in_float32_where_the_papers_logit_is_not():
    """Of scores up to 60 and the power of a million items: what float32 loses in 1 / (s^-power - 1) isn't formed."""
    power = positive_power(256, 1_000_000, 0.99)
    scores = torch.tensor([-60.0, -20.0, -1.0, 0.0, 5.0, 12.0, 18.0, 40.0, 60.0])
    for place, score in enumerate(scores.tolist()):
        model = Given(torch.cat([scores, torch.tensor([-200.0])]))  # a negative that is sure to be none
        found = generalised_binary_loss(model, torch.ones(1, 1), rows_of(place), rows_of(len(scores)), power)
        assert found.dtype == torch.float32
        assert found.item() == pytest.approx(power * np.logaddexp(0, -np.float64(score)) / 2, rel=1e-6)
    naive = 1 / (torch.sigmoid(torch.tensor(18.0)) ** -power - 1)
    assert not torch.isfinite(naive)  # what is avoided


def test_gbce_with_t_0_is_binary_cross_entropy_weighed_by_its_negatives():
    """The same terms; `bce` takes the mean of its negatives, gBCE the sum of all, over their number and one."""
    model = model_of(SMALL, slots=0)
    hidden = torch.randn(1, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    target, negatives = rows_of(1), rows_of(5)
    power = positive_power(1, 30, 0.0)
    given = (model, hidden, target, negatives)
    assert generalised_binary_loss(*given, power).item() == pytest.approx(binary_loss(*given).item() / 2, rel=1e-14)


def test_calibrated_gbce_finds_the_probabilities_and_bce_does_not():
    """The paper's theorem: where t is 1, the score of an item goes to its probability; of BCE it is too high."""
    random, probability, num, K = np.random.default_rng(0), np.array([0.5, 0.3, 0.15, 0.05]), 4, 1
    targets = torch.from_numpy(random.choice(num, 4_000, p=probability)) + FIRST_INDEX
    found = {}
    for t in (0.0, 1.0):
        scores = torch.zeros(num, dtype=torch.float64, requires_grad=True)
        # every negative in turn, with the weight that sampling K of the others gives it
        optimizer = torch.optim.LBFGS([scores], max_iter=100)

        def closure(t=t, scores=scores, optimizer=optimizer):
            optimizer.zero_grad()
            hidden, total = torch.ones(len(targets), 1, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
            for negative in range(num):
                power = positive_power(K, num, t)
                others = targets != FIRST_INDEX + negative  # drawn among the others: one of three
                total = total + generalised_binary_loss(
                    Given(scores), hidden[others], targets[others], rows_of(negative), power
                )
            (total / len(targets)).backward()
            return total / len(targets)

        optimizer.step(closure)
        found[t] = sigmoid(scores.detach().numpy())
    shares = np.bincount(targets.numpy() - FIRST_INDEX) / len(targets)
    np.testing.assert_allclose(found[1.0], shares, atol=1e-3)
    assert (found[0.0] > 1.2 * shares).all()


# --- a pool that all positions share ----------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [SMALL, COSINE])
@pytest.mark.parametrize("num_negatives", [7, 3_000])
def test_sampled_softmax_is_numpys_over_the_pool_without_its_target(config, num_negatives):
    model = model_of(config, slots=0)
    hidden = torch.randn(6, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    targets = rows_of(0, 5, 5, 9, 20, 29)
    found = summed_loss(
        model, hidden, targets, LossConfig(kind="sampled", num_negatives=num_negatives), draw=(1, 2, 3), table_VD=None
    )
    negatives = FIRST_INDEX + np.random.default_rng([1, 2, 3, 4]).integers(0, 30, num_negatives)
    scores = model.scores(hidden).detach().numpy()
    expected = 0.0
    for row, target in enumerate(targets.tolist()):
        others = scores[row, negatives[negatives != target]] - math.log(num_negatives / 30)
        own = scores[row, target]
        expected += math.log(math.exp(own) + np.exp(others).sum()) - own
    assert found.item() == pytest.approx(expected, rel=1e-12)


def test_a_large_pool_gives_the_loss_of_the_whole_catalogue():
    """300 draws of each of 30 items: the sampled partition function is the full one, up to noise of 1 / sqrt(300)."""
    model = model_of(COSINE, slots=0)
    hidden = torch.randn(50, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    targets = FIRST_INDEX + torch.arange(50) % 30
    full = summed_loss(model, hidden, targets, LossConfig(), draw=(0,), table_VD=None)
    pool = LossConfig(kind="sampled", num_negatives=9_000)
    sampled = summed_loss(model, hidden, targets, pool, draw=(0, 0, 0), table_VD=None)
    assert sampled.item() == pytest.approx(full.item(), rel=0.02)
    assert sampled.item() != full.item()


@pytest.mark.parametrize("kind", ["sampled", "bce", "gbce"])
def test_slopes_are_right_and_the_same_bits_whatever_the_blocks_and_threads(kind, monkeypatch):
    """Of queries, items, biases and scores of targets, by differences; and of blocks of 2 positions, on 1 to 3 threads,
    the same bits."""
    model, generator = model_of(SMALL, slots=0), torch.Generator().manual_seed(3)
    hidden = torch.randn(9, 16, dtype=torch.float64, generator=generator, requires_grad=True)
    targets, negatives = rows_of(0, 1, 1, 7, 7, 2, 3, 4, 5), rows_of(1, 1, 7, 8, 20)
    losses = {
        "sampled": lambda: sampled_softmax(model, hidden, targets, negatives, 0.1),
        "bce": lambda: binary_loss(model, hidden, targets, negatives),
        "gbce": lambda: generalised_binary_loss(model, hidden, targets, negatives, 0.5),
    }
    trained = [hidden, model.item_embedding.weight, model.output_bias, *model.head.parameters()]
    expected = losses[kind]()
    slopes = torch.autograd.grad(expected * 0.3, trained)
    for tensor, slope in zip(trained[:3], slopes, strict=False):
        direction = torch.randn(tensor.shape, dtype=torch.float64, generator=generator)
        found = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                tensor += step * direction
                found.append(losses[kind]().item())
                tensor -= step * direction
        by_difference = 0.3 * (found[0] - found[1]) / 2e-5
        assert (slope * direction).sum().item() == pytest.approx(by_difference, rel=1e-6, abs=1e-8)
    monkeypatch.setattr(softmax, "BLOCK_ROWS", 2)
    monkeypatch.setattr(softmax, "BLOCK_SCORES", 0)
    bits = []
    for threads in (3, 2, 1, 1):
        use_threads(threads)
        loss = losses[kind]()
        bits.append([loss, *torch.autograd.grad(loss * 0.3, trained)])
    torch.testing.assert_close(bits[0], [expected, *slopes])
    assert all(torch.equal(*pair) for again in bits[1:] for pair in zip(bits[0], again, strict=True))


@pytest.mark.parametrize("kind", ["sampled", "bce", "gbce"])
def test_what_hits_the_target_changes_nothing(kind):
    """Nor does it push the target down: the pool with and without it."""
    model = model_of(SMALL, slots=0)
    hidden = torch.randn(1, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    target = rows_of(4)
    with_hit, without = rows_of(1, 4, 8, 4), rows_of(1, 8)
    losses = {
        "sampled": lambda pool: sampled_softmax(model, hidden, target, pool, 0.1),
        "bce": lambda pool: binary_loss(model, hidden, target, pool),
        "gbce": lambda pool: generalised_binary_loss(model, hidden, target, pool, 0.5) * (len(pool) + 1),
    }
    torch.testing.assert_close(losses[kind](with_hit), losses[kind](without))
    only_hits = losses[kind](rows_of(4, 4, 4))
    assert torch.isfinite(only_hits)


@pytest.mark.parametrize("kind", ["sampled", "bce", "gbce"])
@pytest.mark.parametrize("config", [SMALL, COSINE])
def test_a_step_reads_the_rows_of_the_pool_alone_in_bf16_too(config, kind):
    model, batch = model_of(config, slots=0).float(), batch_of([7, 4])
    task = NextItem(NextItemConfig(loss=LossConfig(kind=kind, num_negatives=3)))
    exact, _ = task.loss(model, batch)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = task.loss(model, batch)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=0.03)
    exact.backward()
    moved = model.item_embedding.weight.grad.abs().sum(1) > 0
    drawn = np.random.default_rng([0, 0, 0, 4]).integers(0, NUM_ITEMS - FIRST_INDEX, 3) + FIRST_INDEX
    read = {*batch.items[batch.mask_BT].tolist(), *drawn.tolist()}
    assert set(moved.nonzero()[:, 0].tolist()) - set(range(FIRST_INDEX)) <= read


# --- settings ---------------------------------------------------------------------------------------------------------


def test_a_setting_that_came_later_leaves_hashes_as_they_were():
    """Those of 4304a78."""
    assert config_hash(LossConfig()) == "2b7319abb94fcf76"
    assert config_hash(LossConfig(kind="bce")) == "c0a5387929e0cfbf"
    assert config_hash(LossConfig(kind="gbce")) != config_hash(LossConfig(kind="gbce", calibration=0.5))


@pytest.mark.parametrize(
    ("kind", "given", "message"),
    [
        (LossConfig, {"kind": "gbce", "calibration": 1.5}, "less than or equal to 1"),
        (LossConfig, {"kind": "gbce", "label_smoothing": 0.1}, "whole catalogue's softmax"),
        (Bert4RecConfig, {"temperature": 0.1}, "expected score cosine, which it divides, found dot"),
        (Bert4RecConfig, {"score": "cosine", "temperature": 0}, "greater than 0"),
        (Bert4RecConfig, {"block": "gated"}, "plain"),
    ],
)
def test_settings_that_do_not_fit_are_refused(kind, given, message):
    with pytest.raises(ValidationError, match=message):
        kind.model_validate(given)
