"""Which runs each number came from, and which runs have no result."""

from trainer.report.document import Block, Heading, Points, Table, Text, fold
from trainer.report.labels import count, name_of, percent
from trainer.report.results import Results


def all_runs(results: Results) -> list[Block]:
    head = ["row", "run", "folder", "seed", "epochs", f"validation {results.monitor}", "model", "pre-trained model"]
    rows = [
        [
            name_of(row),
            str(run["run"] or ""),
            str(run["folder"] or ""),
            str(run["seed"]),
            str(run["epochs"]),
            percent(run["validation"]),
            _short(run["model_hash"]),
            _short(run["parent_hash"]),
        ]
        for row in results.done
        for run in row["seeds"]
        if row["kind"] != "baseline"
    ]
    code = Text(f"Code: commit {results.code['commit']}.", "faint")
    read = [f"{row['label']} reads {row['reads']}" for row in results.rows if row.get("reads")]
    blocks: list[Block] = [Table(head, rows, texts=3)] if rows else []
    return [
        Heading("Each run"),
        code,
        *fold("Runs, seeds and hashes of models", blocks),
        *fold("What each row reads", [Points(read)] if read else []),
    ]


def missing_runs(results: Results) -> list[Block]:
    """Runs without a result, rows that lack one for the same reason together."""
    rows_of: dict[str, list[str]] = {}
    for row in results.rows:
        lost = [seed for seed in results.seeds if seed not in [run["seed"] for run in row["seeds"]]]
        if row["status"] != "done":
            reason = row.get("reason") or "no reason given"
        elif row["kind"] != "baseline" and lost:
            reason = row.get("reason") or f"no seed {', '.join(map(str, lost))}"
        else:
            continue
        rows_of.setdefault(reason, []).append(name_of(row))
    if not rows_of:
        return []
    finding = [
        f"{why[0].upper()}{why[1:]} ({count(len(rows), 'row')}): {'; '.join(rows)}" for why, rows in rows_of.items()
    ]
    return [Heading("Missing runs"), Text("No number in this report stands for them."), Points(finding)]


def _short(digest: str | None) -> str:
    return (digest or "")[:12]
