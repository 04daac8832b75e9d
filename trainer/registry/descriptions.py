"""Descriptions of runs and model versions, as the Markdown that MLflow's page shows.

The page cuts a run's description after about five lines ("Show more"), and lists of runs and versions show its first
line as plain text: so the result comes first, in plain words.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from etl import text_table
from etl.redaction import redact
from trainer.config import FinetuneConfig, FriendsConfig, PretrainConfig, patch_of
from trainer.evaluation.class_metrics import signed
from trainer.evaluation.gate import Decision
from trainer.evaluation.significance import gain_text, p_text
from trainer.inference.model_folder import TrainedModel
from trainer.tracking import model_link

SHOWN_METRICS = ("NDCG@10", "Recall@10", "MRR")  # of a model, where it has them
_MARKS = {"passed": "passed", "refused": "**refused**", "not judged": "not judged"}


def paragraphs(*parts: str) -> str:
    """Those parts that are not empty."""
    return "\n\n".join(filter(None, parts))


def items(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first column is text, the others are numbers."""
    plain = [[cell.replace("|", "/") for cell in line] for line in (header, *rows)]
    head, *spaced = [[line[0], *(f"&ensp;{cell}" for cell in line[1:])] for line in plain]
    return "\n".join(text_table.markdown(head, spaced))


def training(config: PretrainConfig, *, parent: str | None, counts: Mapping[str, int], data: str) -> str:
    """What a training run does, before it has a result. `data`: its snapshot and size, in words."""
    predicted = config.data.answered
    reads = f"reads domain `{config.data.domain}`"
    if predicted != config.data.domain:
        reads += f" to predict `{predicted}`"
    facts = [f"transfer `{_transfer(config)}` of {model_link('the pre-trained model', parent)}"] if parent else []
    facts.append(f"data: {data}")
    added = f", {counts['added']:,} added" if counts["added"] else ""
    facts.append(f"{counts['total']:,} parameters, {counts['trained']:,} of them trained{added}")
    return paragraphs(f"{_verb(config)} {config.model.kind} by the task {config.task.kind}; it {reads}.", items(facts))


def _verb(config: PretrainConfig) -> str:
    if not isinstance(config, FinetuneConfig):
        return "Pre-trains"
    return "Trains from scratch" if config.transfer == "none" else "Fine-tunes"


def _transfer(config: PretrainConfig) -> str:
    return config.transfer if isinstance(config, FinetuneConfig) else "none"


def outcome(metrics: Mapping[str, float], score: str) -> str:
    """The first line of a finished training run."""
    best, of, seconds = metrics.get(f"validation/{score}"), metrics["epochs"], metrics["seconds"]
    if best is None:
        return f"No validation part: {of:.0f} epochs, {seconds:,.0f} s."
    return f"Validation {score} {best:.4f} in epoch {metrics['best_epoch']:.0f} of {of:.0f}, {seconds:,.0f} s."


def results(rows: Sequence[Mapping[str, Any]], *, heading: str = "", notes: str = "", picture: str = "") -> str:
    """The rows of a comparison (`EvaluationReport.rows`), their first protocol as a table, models before baselines;
    gain and p-value in the first metric. `picture`: its path among the run's artifacts."""
    shown = [row for row in rows if row["protocol"] == rows[0]["protocol"]]
    metrics = list(dict.fromkeys(row["metric"] for row in shown))
    compared = any(row["gain"] for row in shown)
    header = ["model", metrics[0], *(["gain", "p"] if compared else []), *metrics[1:]]
    labels = dict.fromkeys(row["label"] for row in sorted(shown, key=lambda row: not row["is_model"]))
    cells = {(row["label"], row["metric"]): row for row in shown}
    lines = []
    for label in labels:
        own = [cells[label, metric] for metric in metrics]
        first, others = own[0], [f"{row['mean']:.4f}" for row in own[1:]]
        gain = gain_text(first["gain"]["gain"], first["gain"]["relative_gain"]) if first["gain"] else ""
        tested = [gain, p_text(first["p_value"])] if compared else []
        lines.append([_label(first), f"{first['mean']:.4f}", *tested, *others])
    image = f"![gains over from-scratch](artifact:{picture})" if picture else ""
    return paragraphs(heading, _headline(shown, metrics[0]), table(header, lines), notes, image)


def _headline(rows: Sequence[Mapping[str, Any]], metric: str) -> str:
    """The best model beside the best baseline."""
    mine = [row for row in rows if row["metric"] == metric]
    best = {
        flag: max((r for r in mine if r["is_model"] is flag), key=lambda r: signed(r["mean"], metric), default=None)
        for flag in (True, False)
    }
    if (model := best[True]) is None:
        return ""
    text = f"Best model: {_label(model)}, {metric} {model['mean']:.4f}"
    if model["gain"]:
        text += f", {gain_text(model['gain']['gain'], model['gain']['relative_gain'])} over from scratch"
    baseline = best[False]
    return text + (f"; best simple baseline: {baseline['label']}, {baseline['mean']:.4f}." if baseline else ".")


def _label(row: Mapping[str, Any]) -> str:
    """Baselines look unlike models; from-scratch is called so."""
    if not row["is_model"]:
        return f"*{row['label']}*"
    return "none (from scratch)" if row["label"] == "none" else str(row["label"])


def result_metrics(rows: Sequence[Mapping[str, Any]], part: str) -> dict[str, float]:
    """The rows of a comparison as metrics of a run, "<part>/<protocol>/<metric>/<label>"; and of each model, in the
    first metric, ".../gain/<label>" and ".../p/<label>", as in the table."""
    found: dict[str, float] = {}
    for row in rows:
        name = "/".join([part, *([row["protocol"]] * (row["protocol"] != "users")), row["metric"]])
        found[f"{name}/{row['label']}"] = row["mean"]
        first = (row["protocol"], row["metric"]) == (rows[0]["protocol"], rows[0]["metric"])
        if first and row["is_model"] and row["gain"] and row["p_value"] is not None:
            found |= {f"{name}/gain/{row['label']}": row["gain"]["gain"], f"{name}/p/{row['label']}": row["p_value"]}
    return found


# --- model versions ---------------------------------------------

GATE = "### Gate"  # heading of the part that a promotion writes


def registered_model(name: str, domain: str) -> str:
    return (
        f"Recommends items of domain {domain}. The version with the alias champion is served "
        f"(`models:/{name}@champion`); candidate waits for the gate, previous was champion before."
    )


def version(artifact: TrainedModel) -> str:
    """What a registered version is."""
    config, metrics = artifact.config, artifact.metrics
    scores = {name: metrics[f"validation/{name}"] for name in SHOWN_METRICS if f"validation/{name}" in metrics}
    first = f"{config.model.kind}, transfer {_transfer(config)}, predicts {config.data.answered}"
    first += "".join(f", {name} {value:.4f}" for name, value in list(scores.items())[:1])
    facts = [
        f"task {config.task.kind}, seed {config.train.seed}, split {config.data.split}, domain {config.data.domain}",
        f"trained on release {artifact.release} of `{redact(artifact.lake)}`",
        model_link("the logged model", artifact.hash) + ", its metrics on each dataset, and the run that trained it",
    ]
    if artifact.parent:
        what = "a patch for" if patch_of(config) is not None else "fine-tuned from"
        facts.append(f"{what} {model_link('the pre-trained model', artifact.parent)}")
    if scores:
        facts.append("validation: " + ", ".join(f"{name} {value:.4f}" for name, value in scores.items()))
    return paragraphs(f"{first}.", items(facts))


def friends_version(config: FriendsConfig, described: Mapping[str, Any]) -> str:
    """What a registered attention over friends is."""
    facts = [
        f"reads the training part of split {described['split']}, domain {config.domain}, seed {config.model.seed}",
        f"trained on release {described['release']} of `{redact(config.lake)}`",
    ]
    return paragraphs("Attention over friends: ranks items for users without a history.", items(facts))


def scores(part: str, means: Mapping[str, Mapping[str, float]]) -> str:
    """Metrics by protocol or task, a line each."""
    return items(
        f"{part}, {name}: " + ", ".join(f"{metric} {value:.4f}" for metric, value in numbers.items())
        for name, numbers in means.items()
    )


def gate(decision: Decision, examples: str) -> str:
    """The gate's decision. `examples`: release, users and domain, in words."""
    verdict = "Passed" if decision.passed else "**Refused**"
    checks = items(f"{check.name}: {_MARKS[check.verdict]}. {check.text}" for check in decision.checks)
    return paragraphs(f"{verdict}{f' on {examples}' if examples else ''}.", checks)


def promotion(label: str, digest: str, decision: Decision, examples: str) -> str:
    """The gate's run on a version."""
    verdict = "Promoted" if decision.passed else "Refused"
    return paragraphs(f"{verdict} {model_link(label, digest)}.", gate(decision, examples))
