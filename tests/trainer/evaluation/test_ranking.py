"""Held-out users against a literal reading of the tables, and their ranks against ranx and hand-made fractions."""

import math

import deltalake
import numpy as np
import pytest
import torch
from ranx import Qrels, Run, evaluate

from etl.tables import FIRST_INDEX
from tests.fixtures.dense import dense, rank_targets, ranks_by_listing
from tests.fixtures.folders import popularity_of
from tests.fixtures.lake_rows import literal, rows_of
from tests.fixtures.lakes import PROTOCOLS, build_tiny_lake
from trainer.data.catalogue import read_catalogue
from trainer.data.held_out import ReadOptions, num_evaluated, read_held_out
from trainer.data.release import DataError, pin
from trainer.evaluation.item_ranking import rank, ranks
from trainer.evaluation.ranking_metrics import means
from trainer.inference import scorer

PARTS = ("validation", "test")
EVERY = ("full", *PROTOCOLS)


def examples(lake, part="test", protocols=("full",), domain="target", **options):
    release = pin(lake, None)
    catalogue = read_catalogue(release, domain)
    return catalogue, read_held_out(release, "last-5", domain, catalogue, part, ReadOptions(protocols, **options))


def random_score(num_rows, seed=0):
    """A random but fixed score of each user and row, ties included."""
    table = torch.from_numpy(np.random.default_rng(seed).integers(0, 40, (200, num_rows)).astype(np.float32))
    return dense(lambda histories: table[torch.from_numpy(histories.users)])


# --- what is asked ---------------------------------------------


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("domain", ["source", "target", "all"])
def test_read_held_out_is_what_the_tables_say(tiny_lake, part, domain):
    catalogue, held_out = examples(tiny_lake, part, EVERY, domain, times=True)
    expected = literal(tiny_lake, "last-5", domain, part)
    assert held_out.users.tolist() == sorted(expected)
    assert num_evaluated(pin(tiny_lake, None), "last-5", domain, part) == len(held_out)
    assert min(len(held_out.histories.items), held_out.targets.size) > 0
    times = {row["user"]: row["times"] for row in rows_of(tiny_lake, "sequences", split="last-5", domain=domain)}
    for n, user in enumerate(held_out.users.tolist()):
        given, wanted, _ = expected[user]
        own = held_out.histories.take(np.array([n]))
        assert catalogue.global_index[own.items].tolist() == given
        assert catalogue.global_index[held_out.targets[n]].tolist() == wanted
        assert held_out.first_time[n] == times[user][len(given)]
        assert held_out.training_items[n] == len(given) - (2 if part == "test" else 0)
    for protocol in PROTOCOLS:
        rows = rows_of(tiny_lake, "negatives", split="last-5", domain=domain, protocol=protocol, part=part)
        drawn = {row["user"]: row["items"] for row in rows}
        for user, negatives in zip(held_out.users.tolist(), held_out.negatives[protocol], strict=True):
            assert catalogue.global_index[negatives[negatives >= 0]].tolist() == drawn[user]


def test_read_held_out_leaves_out_users_without_a_hold_out(tiny_lake):
    _, held_out = examples(tiny_lake)
    assert len(held_out) == 54
    assert held_out.users.min() == FIRST_INDEX + 6, "user 0 has no target item, users 1 to 5 too few"


def test_read_held_out_of_some_users_is_part_of_all(tiny_lake):
    _, every = examples(tiny_lake, protocols=EVERY)
    _, some = examples(tiny_lake, protocols=EVERY, max_users=25)
    _, again = examples(tiny_lake, "validation", protocols=EVERY, max_users=25)
    assert 10 < len(some) < 40
    assert some.users.tolist() == again.users.tolist(), "the same users at validation and test"
    place = np.searchsorted(every.users, some.users)
    assert (every.users[place] == some.users).all()
    assert (every.targets[place] == some.targets).all()
    assert (every.negatives["uniform-100"][place] == some.negatives["uniform-100"]).all()


def test_read_held_out_without_negatives_says_what_to_do(tiny_lake, tmp_path):
    lake = build_tiny_lake(tmp_path / "lake", num_users=12)
    deltalake.DeltaTable(f"{lake}/negatives").delete("protocol = 'uniform-100'")
    release = pin(lake, None)
    release.versions["negatives"] += 1
    catalogue = read_catalogue(release, "target")
    with pytest.raises(DataError, match=r"'uniform-100' for 6 users.*found none for 6.*negatives\.protocols") as caught:
        read_held_out(release, "last-5", "target", catalogue, "test", ReadOptions(("full", "uniform-100")))
    assert "\n" not in str(caught.value)
    assert len(read_held_out(release, "last-5", "target", catalogue, "test", ReadOptions(("full", "popular-100")))) == 6


def test_read_held_out_with_another_domains_catalogue_is_refused(tiny_lake):
    release = pin(tiny_lake, None)
    with pytest.raises(DataError, match="lacks 162 of 162 held-out items"):
        read_held_out(release, "last-5", "target", read_catalogue(release, "source"), "test")


def test_read_held_out_of_an_unknown_split_names_the_known(tiny_lake):
    release = pin(tiny_lake, None)
    with pytest.raises(DataError, match="last-5/target"):
        read_held_out(release, "last-9", "target", read_catalogue(release, "target"), "test")


# --- how it is ranked ---------------------------------------------


@pytest.mark.parametrize("protocol", EVERY)
@pytest.mark.parametrize("part", PARTS)
def test_rank_agrees_with_ranx(tiny_lake, protocol, part):
    catalogue, held_out = examples(tiny_lake, part, (protocol,), "all")
    scores = torch.from_numpy(np.random.default_rng(3).normal(size=(200, len(catalogue))))
    ours = means(rank(dense(lambda h: scores[torch.from_numpy(h.users)]), held_out, batch_size=7)[protocol])
    expected = literal(tiny_lake, "last-5", "all", part)
    kept = set(catalogue.global_index[FIRST_INDEX:].tolist())
    negatives = {
        row["user"]: set(row["items"])
        for row in rows_of(tiny_lake, "negatives", split="last-5", domain="all", protocol=protocol, part=part)
    }
    qrels, run = {}, {}
    for user, (given, wanted, _) in expected.items():
        candidates = kept - set(given) if protocol == "full" else negatives[user] | set(wanted)
        qrels[str(user)] = {str(item): 1 for item in wanted}
        run[str(user)] = {str(i): float(scores[user, catalogue.rows(np.array([i]))[0]]) for i in candidates}
    named = {"NDCG@1": "ndcg@1", "NDCG@5": "ndcg@5", "NDCG@10": "ndcg@10", "Recall@10": "recall@10", "MRR": "mrr"}
    theirs = evaluate(Qrels(qrels), Run(run), list(named.values()))
    assert {name: pytest.approx(theirs[other], abs=1e-9) for name, other in named.items()} == {
        name: ours[name] for name in named
    }


def test_rank_of_a_known_order_is_the_fraction_made_by_hand(tiny_lake):
    """Held-out items score 3, 2, 1 below exactly one competitor each: ranks 2, 4, 6 of the list."""
    catalogue, held_out = examples(tiny_lake)
    one = held_out.take(np.array([0]))
    wanted = one.targets[0]
    seen = set(one.histories.items.tolist()) | set(wanted.tolist())
    others = [row for row in range(FIRST_INDEX, len(catalogue)) if row not in seen]
    scores = torch.full((1, len(catalogue)), -1.0)
    for place, target in enumerate(wanted):
        scores[0, target] = 9 - 2 * place
        scores[0, others[place]] = 10 - 2 * place
    scores[0, :FIRST_INDEX] = 100  # reserved rows are no candidates
    scores[0, one.histories.items] = 100  # nor is what was read
    metrics = rank(dense(lambda histories: scores), one)["full"]
    ideal = 1 + 1 / math.log2(3) + 0.5
    assert metrics["NDCG@10"][0] == pytest.approx((1 / math.log2(3) + 1 / math.log2(5) + 1 / math.log2(7)) / ideal)
    assert metrics["Recall@5"][0] == pytest.approx(2 / 3)
    assert metrics["MRR"][0] == 1 / 2
    alone = (1 / math.log2(3) + 1 / math.log2(4) + 1 / math.log2(5)) / 3  # ranks 2, 3, 4 without each other
    assert metrics["single/NDCG@10"][0] == pytest.approx(alone)


def test_rank_is_the_same_in_batches_of_any_size(tiny_lake):
    catalogue, held_out = examples(tiny_lake, protocols=EVERY)
    score = random_score(len(catalogue))
    whole = ranks(score, held_out, batch_size=1_000)
    for batch_size in (1, 5, 54):
        parts = ranks(score, held_out, batch_size=batch_size)
        assert all((parts[protocol] == whole[protocol]).all() for protocol in EVERY)
    share = np.arange(10, 30)
    taken = ranks(score, held_out.take(share))
    assert all((taken[protocol] == whole[protocol][share]).all() for protocol in EVERY)


def test_rank_scores_each_user_once_with_its_own_history(tiny_lake):
    catalogue, held_out = examples(tiny_lake, protocols=EVERY)
    expected = literal(tiny_lake, "last-5", "target", "test")
    met = []

    def score(histories):
        for n, user in enumerate(histories.users.tolist()):
            own = histories.items[histories.offsets[n] : histories.offsets[n + 1]]
            assert catalogue.global_index[own].tolist() == expected[user][0]
            met.append(user)
        return torch.zeros(len(histories), len(catalogue))

    rank(dense(score), held_out, batch_size=8)
    assert sorted(met) == held_out.users.tolist()


@pytest.mark.parametrize("value", [0.0, float("nan"), float("-inf")])
def test_rank_of_a_scorer_that_says_nothing_finds_nothing(tiny_lake, value):
    catalogue, held_out = examples(tiny_lake, protocols=EVERY)
    ranked = rank(dense(lambda h: torch.full((len(h), len(catalogue)), value)), held_out)
    assert all(means(metrics)["NDCG@1"] == 0 for metrics in ranked.values())


def test_rank_misses_a_held_out_item_that_was_read(tiny_lake):
    """A repeat is no candidate of `full` ranking: not found at any rank, though it scores highest."""
    catalogue, held_out = examples(tiny_lake)
    one = held_out.take(np.array([0]))
    one.targets[0, 0] = one.histories.items[-1]
    scores = torch.zeros(1, len(catalogue))
    scores[0, one.targets[0, 0]] = 9
    assert ranks(dense(lambda h: scores), one)["full"][0, 0] == 0


def test_rank_by_popularity_is_the_baseline_counted_by_hand(tiny_lake):
    catalogue, held_out = examples(tiny_lake)
    counts = popularity_of(tiny_lake)
    ranked = ranks(dense(lambda h: torch.from_numpy(counts).float().expand(len(h), -1)), held_out)["full"]
    for user, (given, wanted, _) in literal(tiny_lake, "last-5", "target", "test").items():
        n = int(np.searchsorted(held_out.users, user))
        read, targets = catalogue.rows(np.array(given)).tolist(), catalogue.rows(np.array(wanted)).tolist()
        for target, found in zip(targets, ranked[n], strict=True):
            rivals = [r for r in range(FIRST_INDEX, len(catalogue)) if r not in read and r not in targets]
            above = sum(counts[rival] >= counts[target] for rival in rivals)
            tied = sum(counts[other] == counts[target] for other in targets[: targets.index(target)])
            assert found == 1 + above + tied + sum(counts[other] > counts[target] for other in targets)


@pytest.mark.parametrize("width", [1, 2, 7, 59, 60, 61])
@pytest.mark.parametrize("kind", ["distinct", "tied", "broken"])
def test_ranks_are_places_in_a_list_however_the_catalogue_is_cut(monkeypatch, kind, width):
    """V around the borders of blocks, ties across them, repeats in the input, held-out items that were read, NaN."""
    random = np.random.default_rng(width)
    B, V, R = 30, 60, 4
    scores = random.integers(0, 5 if kind == "tied" else 10_000, (B, V)).astype(np.float32)
    if kind == "broken":
        scores[random.random((B, V)) < 0.2] = np.nan
        scores[random.random((B, V)) < 0.1] = -np.inf
        scores[random.random((B, V)) < 0.1] = np.inf
    targets = torch.from_numpy(random.integers(-1, V, (B, R)))
    candidates = torch.from_numpy(random.random((B, V)) < 0.8)
    monkeypatch.setattr(scorer, "SCORES_PER_BLOCK", width * B)
    found = rank_targets(torch.from_numpy(scores), targets, candidates)
    assert torch.equal(found, ranks_by_listing(scores, targets, candidates))


def test_ranks_hold_no_more_scores_than_a_block(tiny_lake, monkeypatch):
    catalogue, held_out = examples(tiny_lake, protocols=EVERY)
    whole = ranks(random_score(len(catalogue)), held_out)
    monkeypatch.setattr(scorer, "SCORES_PER_BLOCK", 16 * 5)
    widths = set()

    def narrow(histories):
        scores = random_score(len(catalogue))(histories)

        def columns(start, stop):
            widths.add(stop - start)
            return scores.columns(start, stop)

        return scorer.Scores(scores.num_users, scores.num_rows, columns)

    found = ranks(narrow, held_out, batch_size=16)
    assert all((found[protocol] == whole[protocol]).all() for protocol in EVERY)
    assert max(widths) * 16 <= scorer.SCORES_PER_BLOCK * 3, "the last batch is smaller, its blocks wider"
