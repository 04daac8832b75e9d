"""What an experiment found, as the data of results.json: everything is scored on one pinned release, by one pass."""

import hashlib
import json
import math
import os
import platform
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import psutil
import torch

from etl.config import GeneratorSource, LogSource, MovielensSource
from etl.redaction import redact
from etl.settings import GraftrecError
from etl.tables import DOMAIN_ALL, FIRST_INDEX, UNK
from trainer.code_hash import code_hash
from trainer.config import PretrainConfig
from trainer.data.catalogue import read_catalogue, read_knowledge
from trainer.data.release import Release
from trainer.data.sequences import SequenceDataset
from trainer.evaluation.item_ranking import SINGLE, metrics_of, ranks
from trainer.evaluation.ranking_metrics import FloatArray
from trainer.evaluation.scorers import (
    EvaluationSet,
    Scorer,
    baseline_scorers,
    model_scorer,
    read_evaluation_set,
)
from trainer.experiment import patch_sizes
from trainer.inference.model_folder import load_model, model_hash
from trainer.parallel.distributed import join
from trainer.recipes.run_folder import DONE
from trainer.report import hypotheses
from trainer.tracking import provenance

if TYPE_CHECKING:
    from trainer.experiment.plan import ExperimentConfig, Row
    from trainer.recipes.training_jobs import TrainingJob

SCORE = "NDCG@10"  # of the validation part
CONVENTIONS = ("list", "single")
METRICS = ("NDCG@1", "NDCG@5", "NDCG@10", "Recall@1", "Recall@5", "Recall@10", "MRR")
Scores = dict[tuple[str, str], FloatArray]  # protocol, metric (with the prefix of its convention) -> [U]


# --- the data, and rows that make no sense on them ---------------------------------------------------------------


@dataclass(frozen=True)
class DataFacts:
    """Table 1, and what decides which rows make sense."""

    domains: list[dict[str, Any]]
    shared_users: int  # of source and target

    def with_knowledge(self, domain: str) -> int:
        return int(next(row["items_with_knowledge"] for row in self.domains if row["domain"] == domain))


def data_facts(release: Release, config: "ExperimentConfig") -> DataFacts:
    """Raises DataError for a domain or split that is not there."""
    trained: list[PretrainConfig] = [plan.finetune for plan in config.plans.values()]
    trained += [row.trained for row in config.more_rows.values()]
    slots: dict[str, int] = next((section.model.knowledge for section in trained if section.model.knowledge), {})
    users, domains = {}, []
    for domain in dict.fromkeys((DOMAIN_ALL, config.source, config.target)):
        catalogue = read_catalogue(release, domain)
        sequences = SequenceDataset(release, config.split, domain).read_all()
        users[domain] = sequences.users
        known = (read_knowledge(release, catalogue, slots)[FIRST_INDEX:] != UNK).any(1).sum() if slots else 0
        domains.append(
            {
                "domain": domain,
                "users": len(sequences),
                "items": len(catalogue) - FIRST_INDEX,
                "items_with_knowledge": int(known),
                "interactions": len(sequences.items),
                "average_length": len(sequences.items) / max(len(sequences), 1),
            }
        )
    return DataFacts(domains, len(np.intersect1d(users[config.source], users[config.target])))


def why_not(row: "Row", facts: DataFacts, config: "ExperimentConfig") -> str:
    """Why a row would repeat another one under a wrong name; "" where it makes sense."""
    wanted = [config.target] if row.transfer == "none" or row.kind == "custom" else [config.target, config.source]
    for domain in wanted:
        if row.knowledge and not facts.with_knowledge(domain):
            return f"no item of domain {domain!r} has metadata, so a model with metadata is one without"
    if row.transfer == "shallow" and not row.knowledge and not facts.shared_users:
        return f"{config.source!r} and {config.target!r} share no user, so shallow transfer of users is empty"
    return ""


# --- scores -----------------------------------------------------------------------------------------------------------


class Scored:
    """Per-user metrics of every row and seed. Ranks are kept in a folder, by what they depend on: a second run scores
    only models that are new."""

    def __init__(self, examples: EvaluationSet, config: "ExperimentConfig") -> None:
        self.examples, self.config = examples, config
        self.rows: dict[str, list[Scores]] = {}
        self.reads: dict[str, str] = {}
        self._folder = config.folder / "ranks"
        self._folder.mkdir(exist_ok=True)

    def add_model(self, row: "Row", seed: int, training: "TrainingJob") -> None:
        """Raises GraftrecError where the model can't be scored here."""

        def scorer() -> Scorer:
            device = str(join(training.config.runtime).device)
            artifact = load_model(training.folder / "model", device=device)
            return model_scorer(artifact, self.examples, label=row.id, seed=seed, device=device)

        kept = self._folder / f"{self._key(model_hash(training.folder / 'model'))}.npz"
        if kept.is_file():
            with np.load(kept) as found:
                given = {name: found[name] for name in found.files}
            reads = str(given.pop("reads"))
        else:
            scored = scorer()
            given, reads = self._ranks(scored), scored.reads
            unfinished = kept.with_suffix(".new.npz")
            np.savez(unfinished, **{**given, "reads": np.array(reads)})  # type: ignore[arg-type]
            unfinished.replace(kept)
        self._add(row.id, given, reads)

    def add(self, scorer: Scorer) -> None:
        self._add(scorer.label, self._ranks(scorer), scorer.reads)

    def matrix(self, name: str, protocol: str, convention: str, metric: str) -> FloatArray:
        """[S, U]"""
        prefix = SINGLE if convention == "single" else ""
        return np.stack([scores[protocol, prefix + metric] for scores in self.rows[name]])

    def metrics(self, name: str) -> dict[str, dict[str, dict[str, dict[str, Any]]]]:
        """protocol -> convention -> metric -> mean, and that of each seed."""
        return {
            protocol: {
                convention: {metric: self._means(name, protocol, convention, metric) for metric in METRICS}
                for convention in CONVENTIONS
            }
            for protocol in self.config.evaluation.protocols
        }

    def _means(self, name: str, protocol: str, convention: str, metric: str) -> dict[str, Any]:
        seeds = np.nanmean(self.matrix(name, protocol, convention, metric), axis=1)
        return {"mean": float(seeds.mean()), "seeds": seeds.tolist()}

    def _ranks(self, scorer: Scorer) -> dict[str, npt.NDArray[np.int64]]:
        return ranks(scorer.score, self.examples.held_out, batch_size=self.config.evaluation.batch_size)

    def _add(self, name: str, given: dict[str, npt.NDArray[np.int64]], reads: str) -> None:
        scores = {(p, metric): values for p, r in given.items() for metric, values in metrics_of(r).items()}
        self.rows.setdefault(name, []).append(scores)
        self.reads[name] = reads

    def _key(self, model: str) -> str:
        examples, code = self.examples, code_hash("trainer.evaluation.scorers")
        parts = [
            model,
            examples.release.lake,
            examples.release.versions,
            examples.split,
            examples.domain,
            examples.part,
            code,
            self.config.evaluation.model_dump(mode="json", exclude={"batch_size"}),
        ]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


# --- results ----------------------------------------------------------------------------------------------------------


def collect(
    config: "ExperimentConfig", release: Release, rows: Sequence["Row"], facts: DataFacts, *, started: str
) -> dict[str, Any]:
    """Scores all models and the simple baselines, tests their differences, and gives results.json. A model that can't
    be scored leaves its run missing. Raises GraftrecError where nothing can be scored at all."""
    examples = read_evaluation_set(release, config.split, config.target, config.part, config.evaluation)
    scored = Scored(examples, config)
    written = [_row(row, scored) for row in rows]
    for scorer in baseline_scorers(examples, config.baselines) if config.baselines.enabled else []:
        scored.add(scorer)
        written.append(_baseline(scorer, scored))
    tested = hypotheses.judge(
        written,
        scored.matrix,
        examples.held_out.histories.lengths,
        protocols=config.evaluation.protocols,
        conventions=CONVENTIONS,
        metric=config.metric,
    )
    commit = provenance.code_version()
    found = {
        "experiment": config.name,
        "preset": config.preset,
        "code": {
            "commit": commit.get("commit", f"none, sources {commit['sources']}").rstrip("+"),
            "dirty": commit.get("commit", "").endswith("+"),
        },
        "machine": machine(),
        "started": started,
        "finished": time.strftime("%Y-%m-%d %H:%M"),
        "data": {
            "dataset": dataset_name(config),
            "held_out": int(examples.held_out.targets.shape[1]),
            "lake": redact(release.lake),
            "release": release.number,
            "versions": release.versions,
            "split": config.split,
            "part": config.part,
            "source_domain": config.source,
            "target_domain": config.target,
            "evaluated_users": len(examples.users),
            "domains": facts.domains,
        },
        "protocols": list(config.evaluation.protocols),
        "conventions": list(CONVENTIONS),
        "metrics": list(METRICS),
        "seeds": list(config.seeds),
        "rows": written,
        "patches": patch_sizes.beside_copies(rows),
    }
    plain: dict[str, Any] = _finite(found | tested)
    return plain


def _row(row: "Row", scored: Scored) -> dict[str, Any]:
    seeds, lost = [], []
    for seed, training in row.trainings.items():
        if not training.failure:
            try:
                scored.add_model(row, seed, training)
                seeds.append(_seed(seed, training))
            except GraftrecError as error:
                training.failure = str(error)
        if training.failure:
            lost.append(f"seed {seed}: {training.failure}")
    return {
        "id": row.id,
        "kind": row.kind,
        "against": row.against,
        "model": row.model,
        "transfer": row.transfer,
        "pretrain_task": row.pretrain_task,
        "task": row.task,
        "knowledge": row.knowledge,
        "label": row.label,
        "reads": scored.reads.get(row.id, ""),
        "status": "done" if seeds else "missing",
        "reason": row.reason or "; ".join(dict.fromkeys(lost)),
        "metrics": scored.metrics(row.id) if seeds else {},
        "seeds": seeds,
    }


def _baseline(scorer: Scorer, scored: Scored) -> dict[str, Any]:
    return {
        "id": scorer.label,
        "kind": "baseline",
        "against": None,
        "model": None,
        "transfer": None,
        "pretrain_task": None,
        "task": None,
        "knowledge": False,
        "label": scorer.label,
        "reads": scorer.reads,
        "status": "done",
        "reason": "",
        "metrics": scored.metrics(scorer.label),
        "seeds": [],
    }


def _seed(seed: int, training: "TrainingJob") -> dict[str, Any]:
    """One training run, read from its folder."""
    done, history, account = (
        json.loads((training.folder / name).read_text()) for name in (DONE, "history.json", "transfer.json")
    )
    trained = sum(epoch["seconds"] for epoch in history)
    items = sum(epoch["items_per_second"] * epoch["seconds"] for epoch in history)
    return {
        "seed": seed,
        "run": done["mlflow_run"],
        "folder": str(training.folder),
        "model_hash": done["hash"],
        "parent_hash": model_hash(training.parent.folder / "model") if training.parent else None,
        "parameters": sum(math.prod(tensor["shape"]) for tensor in account["tensors"]),
        "trained": account["parameters"]["trained"],
        "peak_gb": done["metrics"].get("peak_gb"),
        "epochs": int(done["metrics"]["epochs"]),
        "best_epoch": int(done["metrics"]["best_epoch"]),
        "seconds": done["metrics"]["seconds"],
        "pretrain_seconds": done["metrics"]["pretrain_seconds"] or None,
        "items_per_second": items / trained if trained else None,
        "validation": done["metrics"][f"validation/{SCORE}"],
        "curve": [
            {"epoch": epoch["epoch"], "loss": epoch["loss"], "validation": epoch["metrics"][SCORE]} for epoch in history
        ],
    }


def dataset_name(config: "ExperimentConfig") -> str:
    """Name of the log, for people."""
    match config.etl.source if config.etl else None:
        case MovielensSource():
            return "MovieLens-1M"
        case GeneratorSource() as source:
            return f"A generated log of {source.users:,} users"
        case LogSource() as source:
            return f"The log in {redact(source.root)}"
    return f"The lake {redact(config.lake or '')}"


def machine() -> str:
    """The machine class of the costs, without the machine's name."""
    parts = f"{os.cpu_count()} {platform.machine()} cores, {psutil.virtual_memory().total / 2**30:.0f} GB"
    return parts + (f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else "")


def _finite(value: Any) -> Any:
    """Plain JSON: NaN and infinity become null."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def flat_metrics(found: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """(name, mean) of every row, protocol and convention, in the metrics that a table shows, for MLflow."""
    for row in found["rows"]:
        for protocol, by_convention in row["metrics"].items():
            for convention, metrics in by_convention.items():
                for metric in ("NDCG@10", "Recall@10"):
                    yield f"{row['id']}/{protocol}/{convention}/{metric}".replace(",", ""), metrics[metric]["mean"]


def text_table(found: dict[str, Any], metric: str) -> str:
    """Every row under every protocol and convention, in one metric."""
    places = [(p, c) for p in found["protocols"] for c in found["conventions"]]
    width = max(len(row["id"]) for row in found["rows"]) + 2
    lines = [f"{metric:<{width}}" + "".join(f"{f'{p}, {c}':>22}" for p, c in places)]
    for row in sorted(found["rows"], key=lambda row: row["status"] != "done"):
        trainings = (
            [f"{row['metrics'][p][c][metric]['mean']:>22.4f}" for p, c in places] if row["metrics"] else ["  missing"]
        )
        lines.append(f"{row['id']:<{width}}" + "".join(trainings))
    return "\n".join(lines)
