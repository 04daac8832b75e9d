"""The report of an embedding: filtered ranks by relation and side, and which things have a vector."""

from collections.abc import Mapping, Sequence

import numpy as np

from etl import tables, text_table
from etl.tables import DOMAIN_ALL
from trainer.arrays import IntArray
from trainer.data.release import Release
from trainer.knowledge_graph.ranking import Ranks, summary

_SHOWN = ("MRR", "Hits@1", "Hits@3", "Hits@10", "mean rank")
_FEW = 10  # triples: of fewer, a relation's figures say little


def ranking_text(ranks: Ranks, relations: Sequence[str]) -> str:
    """Both sides together, then each relation with its sides, as a Markdown table."""
    lines = [["all", "both", str(len(ranks.triples)), *_cells(ranks.metrics())]]
    for side in ("head", "tail"):
        lines.append(["all", side, str(len(ranks.triples)), *_cells(summary(ranks.realistic(side)))])
    for relation, side, metrics in ranks.by_relation():
        count = int(metrics["triples"])
        name = relations[relation] + (" (few)" if count < _FEW else "")
        lines.append([name, side, str(count), *_cells(metrics)])
    return "\n".join(text_table.markdown(["relation", "predicted", "triples", *_SHOWN], lines))


def _cells(metrics: Mapping[str, float]) -> list[str]:
    return [f"{metrics[name]:.1f}" if name == "mean rank" else f"{metrics[name]:.3f}" for name in _SHOWN]


def item_coverage(release: Release, items: IntArray) -> dict[str, float]:
    """Domain -> share of its items that k-core keeps which are among `items` (indices); of DOMAIN_ALL too."""
    kept = release.read(tables.ITEMS, ["index", "kept"])
    kept_items = kept["index"].to_numpy()[kept["kept"].to_numpy(zero_copy_only=False)]
    domains = sorted({str(part["domain"]) for part in release.partitions(tables.DOMAINS)} - {DOMAIN_ALL})
    found = {DOMAIN_ALL: _share(kept_items, items)}
    for domain in domains:
        of_it = release.read(tables.DOMAINS, ["index"], {"domain": domain})["index"].to_numpy()
        found[domain] = _share(np.intersect1d(of_it, kept_items), items)
    return found


def _share(of: IntArray, those: IntArray) -> float:
    return float(np.isin(of, those).mean()) if len(of) else float("nan")


def coverage_text(coverage: Mapping[str, float]) -> str:
    lines = [[domain, f"{share:.3f}"] for domain, share in coverage.items()]
    return "\n".join(text_table.markdown(["domain", "items with a vector"], lines))
