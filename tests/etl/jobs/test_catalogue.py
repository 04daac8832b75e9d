"""Domains, entities, knowledge and social edges."""

from pathlib import Path

import pydantic
import pytest
import yaml
from pyspark.sql import SparkSession

from etl.config import DomainConfig, KnowledgeConfig
from etl.jobs import domains, entities, knowledge, social
from etl.settings import ConfigError
from etl.sources.metadata import knowledge as knowledge_of
from etl.sources.metadata import knowledge_fingerprint
from etl.tables import DOMAINS, ENTITIES, KNOWLEDGE, SOCIAL
from tests.fixtures.frames import frame
from tests.fixtures.places import ROOT

TOLD = "item string, relation string, rank int, name string, key string, source string"


def test_domains_follow_their_rules(spark: SparkSession) -> None:
    rows = [
        ("a", 5, ["Action", "War"], {}),
        ("b", 6, ["Comedy"], {"market": "de"}),
        ("c", 7, [], {"market": "fr"}),
    ]
    schema = "item string, index int, categories array<string>, attributes map<string, string>"
    items = frame(spark, rows, schema)
    rules = [
        DomainConfig(name="war", all_of=("Action", "War")),
        DomainConfig(name="any", any_of=("Action", "Comedy")),
        DomainConfig(name="not", none_of=("Action",), any_of=("Comedy",)),
        DomainConfig(name="rest", none_of=("Action", "Comedy")),
        DomainConfig(name="fr", attribute="market", any_of=("fr", "es")),
    ]
    found = domains.transform(items, rules)
    assert found.columns == DOMAINS.schema.names
    members: dict[str, list[tuple[str, int]]] = {}
    for row in sorted(found.collect(), key=lambda row: row["index"]):
        members.setdefault(row["domain"], []).append((row["item"], row["index"]))
    assert members == {
        "all": [("a", 5), ("b", 6), ("c", 7)],
        "war": [("a", 5)],
        "any": [("a", 5), ("b", 6)],
        "not": [("b", 6)],
        "rest": [("c", 7)],
        "fr": [("c", 7)],
    }
    assert {row["rule"] for row in found.where("domain = 'not'").collect()} == {"any of Comedy; none of Action"}
    assert domains.rule(rules[4]) == "market: any of fr, es"


def test_what_items_have_is_named_beside_a_rule_that_none_meets(spark: SparkSession) -> None:
    rows = [
        ("a", ["War"], {"market": "de", "year": "1"}),
        ("b", ["War", "Action"], {"market": "fr"}),
        ("c", [], {"market": "fr"}),
    ]
    items = frame(spark, rows, "item string, categories array<string>, attributes map<string, string>")
    told = {
        attribute: domains.advice(items, DomainConfig(name="x", any_of=("x",), attribute=attribute))
        for attribute in (None, "market", "Market")
    }
    assert told == {
        None: "the commonest categories are War, Action",
        "market": "the commonest values of market are fr, de",
        "Market": "the items' attributes are market, year",
    }


@pytest.mark.parametrize("names", [["all"], ["a", "a"], [" "], [f"d{n}" for n in range(62)]])
def test_domain_names_that_cannot_stand_are_refused(names: list[str]) -> None:
    with pytest.raises((ConfigError, pydantic.ValidationError)):
        domains.check([DomainConfig(name=name) for name in names])


def test_entities_are_people_or_things_and_keep_their_index(spark: SparkSession) -> None:
    told = [
        ("i", "director", 1, "James Cameron", "james cameron", "x"),
        ("j", "actor", 2, "JAMES CAMERON", "james cameron", "x"),
        ("j", "keyword", 1, "ship", "ship", "x"),
    ]
    first = entities.transform(frame(spark, told, TOLD), None)
    assert first.columns == ENTITIES.schema.names
    rows = {row["entity"]: tuple(row)[1:] for row in first.collect()}
    assert rows == {
        "keyword:ship": (5, "keyword", "ship"),
        "person:james cameron": (6, "person", "JAMES CAMERON"),
    }
    second = entities.transform(frame(spark, [("k", "actor", 1, "Ann", "ann", "x")], TOLD), first)
    assert {row["entity"]: row["index"] for row in second.collect()} == {
        "keyword:ship": 5,
        "person:james cameron": 6,
        "person:ann": 7,
    }


def test_knowledge_joins_both_ends_and_counts_a_name_once(spark: SparkSession) -> None:
    told = [
        ("i", "actor", 3, "Ann", "ann", "b"),
        ("i", "actor", 1, "Ann", "ann", "a"),
        ("i", "director", 1, "Ann", "ann", "a"),
        ("nowhere", "actor", 1, "Ann", "ann", "a"),
    ]
    items = frame(spark, [("i", 9)], "item string, index int")
    known = frame(spark, [("person:ann", 5)], "entity string, index int")
    found = knowledge.transform(frame(spark, told, TOLD), items, known)
    assert found.columns == KNOWLEDGE.schema.names
    assert sorted(tuple(row) for row in found.collect()) == [
        ("i", "actor", "person:ann", 1, "a", 9, 5, "item", "entity"),
        ("i", "director", "person:ann", 1, "a", 9, 5, "item", "entity"),
    ]


def test_social_keeps_edges_between_users_of_the_log(spark: SparkSession) -> None:
    rows = [
        ("u", "v", 1.0, None),
        ("u", "v", 2.5, None),
        ("v", "u", 1.0, None),
        ("u", "stranger", 1.0, None),
        ("v", "v", 1.0, None),
        (None, None, None, "user is missing"),
    ]
    edges = frame(spark, rows, "user string, friend string, weight float, reason string")
    found = social.transform(edges, frame(spark, [("u", 5), ("v", 6)], "user string, index int"))
    assert found.columns == SOCIAL.schema.names
    assert sorted(tuple(row) for row in found.collect()) == [("u", "v", 2.5, 5, 6), ("v", "u", 1.0, 6, 5)]


def test_a_graph_is_linked_to_items(spark: SparkSession, tmp_path: Path) -> None:
    (tmp_path / "ml-100k.link").write_text("item_id:token\tentity_id:token\n7\tm.a\n8\tm.b\n9\tm.c\n")
    triples = [
        "m.a\tgenre\tm.x",
        "m.a\tgenre\tm.y",
        "m.b\tmood\tm.x",
        "m.x\tgenre\tm.y",
        "m.c\tgenre\tm.x",
        "m.a\t\tm.z",
    ]
    (tmp_path / "ml-100k.kg").write_text("\n".join(["head_id:token\trelation_id:token\ttail_id:token", *triples]))
    described = yaml.safe_load((ROOT / "conf" / "knowledge" / "recbole.yaml").read_text())
    config = KnowledgeConfig.model_validate(described | {"root": str(tmp_path)})
    items = frame(spark, [("7", "A", 1999), ("8", "B", None)], "item string, title string, year int")
    facts = knowledge_of(spark, config, items)
    rows = facts.select("item", "relation", "rank", "name", entities.entity().alias("entity"), "source").collect()
    assert sorted(map(tuple, rows)) == [
        ("7", "genre", 1, "m.x", "entity:m.x", "freebase"),
        ("7", "genre", 2, "m.y", "entity:m.y", "freebase"),
        ("8", "mood", 1, "m.x", "entity:m.x", "freebase"),
    ]
    before = knowledge_fingerprint(config)
    (tmp_path / "ml-100k.link").write_text("item_id:token\tentity_id:token\n7\tm.b\n")
    assert knowledge_fingerprint(config) != before


def test_a_whole_graph_has_triples_between_entities_and_between_items(spark: SparkSession, tmp_path: Path) -> None:
    """No inverse of any is stored, a triple that is there twice counts once, and an unknown item is an entity."""
    (tmp_path / "ml-100k.link").write_text("item_id:token\tentity_id:token\n7\tm.a\n8\tm.b\n9\tm.c\n")
    triples = ["m.a\tgenre\tm.x", "m.x\tpart\tm.y", "m.a\tsequel\tm.b", "m.y\tabout\tm.b", "m.c\tgenre\tm.x"]
    (tmp_path / "ml-100k.kg").write_text(
        "\n".join(["head_id:token\trelation_id:token\ttail_id:token", *triples, triples[1]])
    )
    described = yaml.safe_load((ROOT / "conf" / "knowledge" / "recbole.yaml").read_text())
    described["files"][0]["triples"]["whole"] = True
    config = KnowledgeConfig.model_validate(described | {"root": str(tmp_path)})
    items = frame(spark, [("7", "A", 1999), ("8", "B", None)], "item string, title string, year int")
    facts = knowledge_of(spark, config, items)
    vocabulary = entities.transform(facts, None)
    assert vocabulary.columns == ENTITIES.schema.names
    named = {row["entity"]: (row["index"], row["kind"], row["name"]) for row in vocabulary.collect()}
    assert {entity: found[1:] for entity, found in named.items()} == {
        f"entity:m.{letter}": ("entity", f"m.{letter}") for letter in "cxy"
    }
    indexed = frame(spark, [("7", 5), ("8", 6)], "item string, index int")
    found = knowledge.transform(facts, indexed, vocabulary)
    assert found.columns == KNOWLEDGE.schema.names
    rows = [
        tuple(row[name] for name in ("head_kind", "head", "relation", "tail_kind", "tail")) for row in found.collect()
    ]
    assert sorted(rows) == [
        ("entity", "entity:m.c", "genre", "entity", "entity:m.x"),
        ("entity", "entity:m.x", "part", "entity", "entity:m.y"),
        ("entity", "entity:m.y", "about", "item", "8"),
        ("item", "7", "genre", "entity", "entity:m.x"),
        ("item", "7", "sequel", "item", "8"),
    ]
    index = {"7": 5, "8": 6} | {entity: place for entity, (place, _, _) in named.items()}
    for row in found.collect():
        assert (row["head_index"], row["tail_index"]) == (index[row["head"]], index[row["tail"]])
    described["files"][0].pop("link")
    with pytest.raises(pydantic.ValidationError, match=r"triples\.whole: expected a link"):
        KnowledgeConfig.model_validate(described)
