"""What it costs to store, load and query many targets on one backbone (survey 3.3)."""

from collections.abc import Sequence

from trainer.report.document import Block, Cell, Heading, Table, Text
from trainer.report.results import Results


def patches(results: Results) -> list[Block]:
    measured = results.patches
    rows: list[Sequence[Cell | str] | str] = []
    for one in measured:
        labels = [results.name(row) for row in one["rows"]]
        small = [f"{one[key]:,.2f} MB" for key in ("patches_mb", "items_mb")]
        ways = {"whole copies": (one["whole"], ["", ""]), "a backbone and patches": (one["patched"], small)}
        rows.append(f"{', '.join(labels)}, seed {one['seed']}")
        rows += [
            [name, f"{cost['mb']:,.2f} MB", *own, f"{cost['seconds']:.2f} s", f"{cost['ms']:.1f} ms"]
            for name, (cost, own) in ways.items()
        ]
    if not rows:
        return []
    text = (
        "The patched models of one pre-trained model, kept as whole copies, and as patches that stand on it: bytes "
        "on disk, of them the patches and, of these, rows of items, which any fine-tuned model of a target has; "
        "seconds until all can answer; the median time to answer one request of 50 items, the models in turns."
    )
    head = ["patched on one model", "on disk", "patches", "rows of items", "to load all", "a request"]
    return [Heading("Patches beside whole copies"), Text(text), Table(head, rows)]
