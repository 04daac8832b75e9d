"""The companion: a version that reads all domains, for users of whom the champion knows no item. Batch and served."""

import shutil
from types import SimpleNamespace

import pytest

from etl.settings import GraftrecError
from tests.fixtures.folders import write_model
from tests.fixtures.processes import recommended_on_sail
from tests.fixtures.recommendations import config, histories_of, rows_of
from tests.fixtures.stores import enter_store
from trainer.inference.model_folder import load_model
from trainer.inference.recommender import Recommender, Request
from trainer.recipes import recommend
from trainer.registry import CHAMPION, COMPANION, Registry


@pytest.fixture(scope="module")
def done(spark, tiny_lake, tmp_path_factory):
    """A champion that reads the target, the companion that reads all, and what they recommend together."""
    with pytest.MonkeyPatch.context() as patch:
        root = tmp_path_factory.mktemp("companion")
        enter_store(root / "store", patch)
        lake = str(root / "lake")
        shutil.copytree(tiny_lake, lake)
        champion = write_model(root / "champion", lake, seed=5)
        both = write_model(root / "both", lake, domain="all", predicted="target", split="joint-5", seed=6)
        registry = Registry()
        registry.register(champion, alias=CHAMPION)
        registry.register(both, alias=COMPANION)
        result = recommend.run(config(lake))
        yield SimpleNamespace(lake=lake, champion=champion, both=both, result=result, root=root)


def together(done):
    """As the two are served."""
    beside = Recommender(load_model(done.both), "graftrec/2")
    return Recommender(load_model(done.champion), "graftrec/1", companion=lambda: beside)


def test_each_user_gets_what_is_answered_for_all_that_the_user_did(done):
    found, histories = rows_of(done.lake), histories_of(done.lake, "all")
    assert found.keys() == histories.keys()
    answers = together(done).answer([Request(items, user) for user, items in histories.items()], k=4)
    for user, answer in zip(histories, answers, strict=True):
        assert [row["item"] for row in found[user]] == answer.items
        assert [row["score"] for row in found[user]] == pytest.approx(answer.scores, rel=1e-5, abs=1e-6)
        assert {row["model_version"] for row in found[user]} == {answer.version}
        assert answer.basis == "model"
    new = histories.keys() - histories_of(done.lake, "target").keys()
    assert {user for user, rows in found.items() if rows[0]["model_version"] == "graftrec/2"} == new == {"u000"}
    assert done.result.by_model == {"graftrec/1": 59, "graftrec/2": 1}


def test_known_users_rows_are_the_champions_own(done):
    lake = str(done.root / "alone")
    shutil.copytree(done.lake, lake)
    shutil.rmtree(f"{lake}/recommendations")
    recommend.run(config(lake, model=done.champion))
    alone = rows_of(lake)
    for user, rows in rows_of(done.lake).items():
        if user != "u000":
            assert [row["item"] for row in rows] == [row["item"] for row in alone[user]]
    trained_model = load_model(done.champion)
    popular = Recommender(trained_model, "x").answer([Request([])], k=4)[0].items
    assert [row["item"] for row in alone["u000"]] == popular  # without a companion


def test_a_rerun_knows_both_models(done):
    assert not recommend.run(config(done.lake)).committed
    other = write_model(done.root / "other", done.lake, domain="all", predicted="target", split="joint-5", seed=7)
    lake = str(done.root / "rerun")
    shutil.copytree(done.lake, lake)
    again = recommend.run(config(lake, companion=other))
    assert again.committed
    assert again.by_model == {"graftrec/1": 59, f"unregistered/{load_model(other).hash[:12]}": 1}


def test_rows_are_the_same_on_sail(done):
    lake = str(done.root / "sailed")
    shutil.copytree(done.lake, lake)
    shutil.rmtree(f"{lake}/recommendations")
    recommended_on_sail(config(lake))

    def without_scores(rows):
        return {user: [row | {"score": None} for row in own] for user, own in rows.items()}

    assert without_scores(rows_of(lake)) == without_scores(rows_of(done.lake))


def test_a_champion_that_reads_all_domains_needs_none(done):
    """It reads in time order, though rows of the split joint-5 have what the target holds out last."""
    lake = str(done.root / "wide")
    shutil.copytree(done.lake, lake)
    result = recommend.run(config(lake, model="2"))
    assert result.by_model == {"graftrec/2": 60}
    histories = histories_of(lake, "all")
    answers = Recommender(load_model(done.both), "graftrec/2").answer([Request(i, u) for u, i in histories.items()], 4)
    found = rows_of(lake)
    for user, answer in zip(histories, answers, strict=True):
        assert [row["item"] for row in found[user]] == answer.items


def test_a_companion_that_can_be_none_is_refused(done):
    with pytest.raises(GraftrecError, match="expected a companion that reads domain 'all' and predicts 'target'"):
        recommend.run(config(done.lake, companion=done.champion))


def test_a_companion_is_found_where_it_predicts_the_same_domain(done, tmp_path):
    registry = Registry("other")
    champion = registry.register(done.champion, alias=CHAMPION)
    assert registry.companion(champion) is None
    books = write_model(tmp_path / "books", done.lake, domain="all", predicted="source", split="joint-5")
    registry.register(books, alias=COMPANION)
    assert registry.companion(champion) is None
    registry.set_alias(COMPANION, champion.number)
    assert registry.companion(registry.version("1")) is None
    registry.register(done.both, alias=COMPANION)
    assert registry.companion(champion).label == "other/3"


# --- served ---------------------------------------------


@pytest.fixture(scope="module")
def served(done):
    from trainer.registry import pyfunc  # as MLflow runs it

    registry = Registry()
    return pyfunc.load(registry.stored(registry.version(CHAMPION)), "graftrec/1")


def ids_of(done, domain):
    return sorted({item for items in histories_of(done.lake, domain).values() for item in items})


def test_a_history_of_other_domains_is_answered_by_the_companion(done, served):
    elsewhere, here = ids_of(done, "source")[:3], ids_of(done, "target")[:2]
    alone = Recommender(load_model(done.both), "graftrec/2").answer([Request(elsewhere)], k=4)[0]
    known = Recommender(load_model(done.champion), "graftrec/1").answer([Request(here)], k=4)[0]
    answers = served.answer([Request(elsewhere), Request(here), Request([*elsewhere, *here])], k=4)
    assert answers[0] == alone
    assert (alone.basis, alone.version, alone.unknown) == ("model", "graftrec/2", [])
    assert answers[1].items == answers[2].items == known.items
    assert (answers[2].version, answers[2].unknown) == ("graftrec/1", elsewhere)


def test_what_neither_knows_is_answered_by_what_is_popular(done, served):
    for items in ([], ["nothing"]):
        answer = served.answer([Request(items)], k=4)[0]
        assert (answer.basis, answer.version, answer.unknown) == ("popular", "graftrec/1", items)


def test_a_companion_that_cannot_be_read_is_passed_over(done, monkeypatch, capsys):
    from trainer.registry import pyfunc

    registry = Registry()
    recommender = pyfunc.load(registry.stored(registry.version(CHAMPION)), "graftrec/1")
    monkeypatch.setattr(
        "trainer.registry.loading.load_model", lambda folder: (_ for _ in ()).throw(GraftrecError("torn"))
    )
    answer = recommender.answer([Request(ids_of(done, "source")[:3])], k=4)[0]
    assert (answer.basis, answer.version) == ("popular", "graftrec/1")
    assert "no companion of graftrec/1" in capsys.readouterr().err
