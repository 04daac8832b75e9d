"""LightGCN against the paper's equations in dense numpy, and what it learns of planted circles."""

import numpy as np
import scipy.sparse as sp
import torch

from trainer.config import LightGcnConfig
from trainer.social.lightgcn import _loss, adjacency, as_tensor, propagate, train

TAKEN = np.array([[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0]], np.float32)  # 3 users, 4 items


def test_the_graph_is_normalised_by_both_degrees() -> None:
    found = adjacency(sp.csr_array(TAKEN)).toarray()
    expected = np.zeros((7, 7))
    for user, item in zip(*np.nonzero(TAKEN), strict=True):
        expected[user, 3 + item] = expected[3 + item, user] = 1 / np.sqrt(TAKEN[user].sum() * TAKEN[:, item].sum())
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_friends_enter_the_graph_by_weight_relative_to_their_mean() -> None:
    friends = np.array([[0, 1, 0], [1, 0, 3], [0, 3, 0]], np.float32)
    found = adjacency(sp.csr_array(TAKEN), sp.csr_array(friends), weight=0.5).toarray()
    whole = np.zeros((7, 7))
    whole[:3, 3:], whole[3:, :3] = TAKEN, TAKEN.T
    whole[:3, :3] = 0.5 * friends / 2
    degree = np.maximum(whole.sum(1), 1e-9)
    np.testing.assert_allclose(found, whole / np.sqrt(degree[:, None] * degree[None]), rtol=1e-5)


def test_propagation_is_the_mean_over_layers_with_its_gradient() -> None:
    graph = adjacency(sp.csr_array(TAKEN))
    own = torch.randn(7, 5, generator=torch.Generator().manual_seed(0), requires_grad=True)
    dense = torch.from_numpy(graph.toarray())
    expected = sum(torch.linalg.matrix_power(dense, layer) @ own for layer in range(4)) / 4
    found = propagate(own, as_tensor(graph), 3)
    torch.testing.assert_close(found, expected)
    weights = torch.arange(35.0).view(7, 5)
    torch.testing.assert_close(
        *(torch.autograd.grad((value * weights).sum(), own)[0] for value in (found, expected)), rtol=1e-5, atol=1e-5
    )


def test_bpr_is_the_equation_of_the_paper() -> None:
    config = LightGcnConfig(loss="bpr", width=5, layers=0, penalty=0.1)
    own = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    users, items = torch.tensor([0, 1, 1]), torch.tensor([0, 1, 2])
    found = _loss(own, as_tensor(adjacency(sp.csr_array(TAKEN))), (users, items), 3, config, torch.manual_seed(7))
    negatives = torch.randint(4, (3,), generator=torch.manual_seed(7)).tolist()
    expected = 0.0
    for user, item, other in zip(users.tolist(), items.tolist(), negatives, strict=True):
        u, i, j = own[user].numpy(), own[3 + item].numpy(), own[3 + other].numpy()
        expected += np.log(1 + np.exp(-(u @ i - u @ j))) + 0.1 * (u @ u + i @ i + j @ j)
    np.testing.assert_allclose(float(found), expected / 3, rtol=1e-5)


def planted() -> np.ndarray:
    """40 users and 40 items in two circles; each user has half of the circle's items."""
    random = np.random.default_rng(0)
    circle = np.arange(40) % 2
    return (circle[:, None] == circle[None]) & (random.random((40, 40)) < 0.5)


def test_it_ranks_the_items_of_a_users_circle_first_with_either_loss() -> None:
    taken = planted()
    circle = np.arange(40) % 2
    for loss in ("bpr", "softmax"):
        config = LightGcnConfig(width=8, loss=loss, epochs=20, batch_size=64, negatives=64, learning_rate=0.02)
        found = train(sp.csr_array(taken.astype(np.float32)), config)
        scores = (found.users @ found.items.T).numpy()
        unseen = ~taken
        same = circle[:, None] == circle[None]
        assert scores[unseen & same].mean() > scores[unseen & ~same].mean()
        right = [scores[user][unseen[user]].argmax() for user in range(40)]
        own = [same[user][unseen[user]][best] for user, best in enumerate(right)]
        assert np.mean(own) > 0.9
        again = train(sp.csr_array(taken.astype(np.float32)), config)
        assert torch.equal(found.users, again.users)


def test_validation_decides_only_where_it_is_asked_to() -> None:
    taken = sp.csr_array(planted().astype(np.float32))
    falling = iter(range(100, 0, -1))
    config = LightGcnConfig(width=4, epochs=12, batch_size=512, validate_every=2, patience=2)
    watched = train(taken, config, validate=lambda users, items: float(next(falling)))
    assert (watched.epoch, len(watched.history)) == (12, 12)
    assert torch.equal(watched.users, train(taken, config).users)
    chosen = train(
        taken,
        LightGcnConfig(**{**config.model_dump(), "best_epoch": True}),
        validate=lambda users, items: float(next(falling)),
    )
    assert (chosen.epoch, len(chosen.history)) == (2, 6)


def test_who_has_no_edge_has_no_vector() -> None:
    found = train(sp.csr_array(TAKEN), LightGcnConfig(width=4, epochs=1))
    assert [bool(row.any()) for row in found.users] == [True, True, False]
    assert [bool(row.any()) for row in found.items] == [True, True, True, False]
