"""Knowledge slots of items: triples between items, or of entities, fill none."""

import numpy as np
from deltalake import DeltaTable, write_deltalake

from etl.tables import FIRST_INDEX, KNOWLEDGE, UNK
from tests.fixtures.lakes import build_tiny_lake
from trainer.config.graph import GraphDataConfig
from trainer.data.catalogue import read_catalogue, read_knowledge
from trainer.data.release import Release, pin
from trainer.knowledge_graph.graph import KINDS, read_graph
from trainer.knowledge_graph.triples import HEAD, TAIL


def test_only_triples_from_items_to_entities_fill_slots(tmp_path):
    lake = build_tiny_lake(tmp_path / "lake")
    release = pin(lake, None)
    catalogue = read_catalogue(release, "all")
    before = read_knowledge(release, catalogue, {"director": 1, "actor": 2})
    assert (before[FIRST_INDEX:] != UNK).any()
    table = DeltaTable(f"{lake}/knowledge")
    rows = table.to_pyarrow_table().to_pylist()
    bare = next(index for index in catalogue.global_index.tolist() if index % 7 == 0)
    common = {"relation": "director", "rank": 1, "source": "x", "tail_index": FIRST_INDEX}
    others = [
        common | {"head": "x", "tail": "y", "head_index": bare, "head_kind": "entity", "tail_kind": "entity"},
        common | {"head": "x", "tail": "z", "head_index": bare, "head_kind": "item", "tail_kind": "item"},
    ]
    kinds = [row | {"head_kind": "item", "tail_kind": "entity"} for row in rows[::2]]
    write_deltalake(
        table,
        KNOWLEDGE.schema.empty_table().from_pylist(kinds + rows[1::2] + others, KNOWLEDGE.schema),
        mode="overwrite",
    )
    newer = Release(lake, 1, release.versions | {"knowledge": DeltaTable(f"{lake}/knowledge").version()})
    np.testing.assert_array_equal(read_knowledge(newer, catalogue, {"director": 1, "actor": 2}), before)
    graph = read_graph(newer, GraphDataConfig(lake=lake))
    ends = {
        tuple((list(KINDS)[graph.kinds[node]], int(graph.indices[node])) for node in triple)
        for triple in graph.triples[:, [HEAD, TAIL]]
    }
    assert {(("entity", bare), ("entity", FIRST_INDEX)), (("item", bare), ("item", FIRST_INDEX))} <= ends
    usual = {(("item", row["head_index"]), ("entity", row["tail_index"])) for row in rows}
    assert usual == {pair for pair in ends if (pair[0][0], pair[1][0]) == ("item", "entity")}
