"""What an experiment found, as the data of results.json: everything is scored on one pinned release, by one pass."""

import hashlib
import json
import math
import os
import platform
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
import torch

from etl.config import GeneratorSource, LogSource, MovielensSource
from etl.redaction import redact
from etl.settings import GraftrecError
from etl.tables import DOMAIN_ALL, FIRST_INDEX, UNK
from trainer.code_hash import code_hash
from trainer.config import EvaluateConfig, PretrainConfig, event_types_read
from trainer.data.catalogue import read_catalogue, read_knowledge
from trainer.data.release import Release
from trainer.data.sequences import SequenceDataset
from trainer.evaluation.card import ProtocolCard, check_cards, lines
from trainer.evaluation.comparison import Key, Results
from trainer.evaluation.evaluator import Evaluator, Output, Question
from trainer.evaluation.evaluators import evaluator_of, monitor
from trainer.evaluation.ranking_metrics import FloatArray
from trainer.evaluation.scorers import Scorer
from trainer.experiment import patch_sizes
from trainer.inference.model_folder import TrainedModel, load_model, model_hash
from trainer.parallel.distributed import join
from trainer.recipes.run_folder import DONE
from trainer.report import hypotheses
from trainer.tracking import provenance

if TYPE_CHECKING:
    from trainer.experiment.plan import ExperimentConfig, Row
    from trainer.recipes.training_jobs import TrainingJob

READS = "reads"  # of a scorer, beside its outputs


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
    """What models and baselines give, by each evaluator that leads their task. It is kept in a folder, by what it
    depends on: a second run scores only models that are new. Raises GraftrecError where no model can be loaded."""

    def __init__(self, config: "ExperimentConfig", release: Release, trainings: Sequence["TrainingJob"]) -> None:
        self.config, self.release = config, release
        first = _first_model(trainings)
        settings = EvaluateConfig(
            split=config.split,
            domain=config.target,
            part=config.part,
            evaluation=config.evaluation,
            baselines=config.baselines,
            runtime=first.config.runtime,
        )
        kinds = dict.fromkeys(kind for training in trainings for kind in event_types_read(training.config))
        self.task = first.config.task
        self.evaluators = evaluator_of(self.task).read(Question(settings, [first], release, list(kinds)))
        self._scorers: dict[Key, Scorer] = {}
        self._cards: dict[str, ProtocolCard] = {}  # of models, by label
        self._outputs: list[dict[Key, Output]] = [{} for _ in self.evaluators]
        self._folder = config.folder / "outputs"
        self._folder.mkdir(exist_ok=True)

    @property
    def results(self) -> list[Results]:
        """By each evaluator."""
        both = zip(self.evaluators, self._outputs, strict=True)
        return [evaluator.results(self._scorers, outputs) for evaluator, outputs in both]

    @property
    def cards(self) -> list[dict[str, Any]]:
        """The protocol cards of all rows, as they are stored."""
        both = zip(self.evaluators, self.results, strict=True)
        entries = [entry for evaluator, results in both for entry in evaluator.cards(self._cards, results)]
        return list({entry["hash"]: entry for entry in entries}.values())

    def add_model(self, row: "Row", seed: int, training: "TrainingJob") -> None:
        """Raises GraftrecError where the model can't be scored here."""
        model, found = model_hash(training.model), []
        config = training.config
        card = self.evaluators[0].card_of_model(config, self.release.lake, config.data.release or self.release.number)
        check_cards([*self._cards.items(), (row.id, card)], allowed=self.config.across)
        for evaluator in self.evaluators:
            kept = self._folder / f"{self._key(evaluator, model)}.npz"
            if not kept.is_file():
                scorer = evaluator.scorer(_load(training), label=row.id, seed=seed)
                output: dict[str, Any] = {**evaluator.output(scorer), READS: np.array(scorer.reads)}
                unfinished = kept.with_suffix(".new.npz")
                np.savez(unfinished, **output)
                unfinished.replace(kept)
            with np.load(kept) as opened:
                found.append({name: opened[name] for name in opened.files})
        reads = [str(output.pop(READS)) for output in found]
        self._cards[row.id] = card
        self._add(Scorer(row.id, seed, lambda: found, reads[0], is_model=True), found)

    def add_baselines(self) -> list[Scorer]:
        """Those of the first evaluator, for every one has the same ones."""
        simple = [evaluator.baselines(self.config.baselines) for evaluator in self.evaluators]
        for same in zip(*simple, strict=True):
            self._add(same[0], [one.output(scorer) for one, scorer in zip(self.evaluators, same, strict=True)])
        return list(simple[0])

    def _add(self, scorer: Scorer, outputs: Sequence[Output]) -> None:
        key = (scorer.label, scorer.seed)
        self._scorers[key] = scorer
        for own, output in zip(self._outputs, outputs, strict=True):
            own[key] = output

    def _key(self, evaluator: Evaluator, model: str) -> str:
        parts = [
            model,
            self.release.lake,
            self.release.versions,
            evaluator.split,
            evaluator.domain,
            evaluator.part,
            evaluator.name,
            code_hash(type(evaluator).__module__),
            self.config.evaluation.model_dump(mode="json", exclude={"batch_size"}),
        ]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _first_model(trainings: Sequence["TrainingJob"]) -> TrainedModel:
    """The first one that can be loaded: its task is that of all rows. Raises GraftrecError."""
    lost = "no run is requested"
    for training in trainings:
        try:
            return _load(training)
        except GraftrecError as error:
            lost = str(error)
    raise GraftrecError(f"expected a trained model, found none: {lost}; see {trainings[0].folder if trainings else ''}")


def _load(training: "TrainingJob") -> TrainedModel:
    return load_model(training.model, device=str(join(training.config.runtime).device))


# --- results ----------------------------------------------------------------------------------------------------------


def collect(
    config: "ExperimentConfig", release: Release, rows: Sequence["Row"], facts: DataFacts, *, started: str
) -> dict[str, Any]:
    """Scores all models and the simple baselines, tests their differences, and gives results.json. A model that can't
    be scored leaves its run missing. Raises GraftrecError where nothing can be scored at all."""
    scored = Scored(config, release, trained(rows))
    seeds = {row.id: list(_scored_seeds(row, scored)) for row in rows}
    baselines = scored.add_baselines() if config.baselines.enabled else []
    results = scored.results
    metrics = _in_order(
        bare(name) for name in results[0].averages(next(iter(results[0].scorers)), results[0].protocols[0])
    )
    written = [_row(row, seeds[row.id], results, metrics) for row in rows]
    written += [_baseline(scorer, results, metrics) for scorer in baselines]
    tested: dict[str, list[Any]] = {}
    for one in results:

        def matrix(name: str, protocol: str, convention: str, metric: str, one: Results = one) -> FloatArray:
            return one.matrix(name, protocol, one.conventions[convention] + metric)

        given = hypotheses.judge(
            written,
            matrix,
            one.items_read,
            protocols=one.protocols,
            conventions=list(one.conventions),
            metric=config.tested_metric,
        )
        tested = {name: [*tested.get(name, []), *entries] for name, entries in given.items()}
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
            **results[0].about(),
            "lake": redact(release.lake),
            "release": release.number,
            "versions": release.versions,
            "split": config.split,
            "part": config.part,
            "source_domain": config.source,
            "target_domain": config.target,
            "evaluated_users": results[0].num_users,
            "domains": facts.domains,
        },
        "cards": scored.cards,
        "across": list(config.across),
        "protocols": [protocol for one in results for protocol in one.protocols],
        "conventions": list(results[0].conventions),
        "metrics": metrics,
        "metric": config.tested_metric,
        "monitor": monitor(scored.task),
        "seeds": list(config.seeds),
        "rows": written,
        "patches": patch_sizes.beside_copies(rows),
    }
    plain: dict[str, Any] = finite(found | tested)
    return plain


def trained(rows: Sequence["Row"]) -> list["TrainingJob"]:
    """The runs of all rows that ended well."""
    return [training for row in rows for training in row.trainings.values() if not training.failure]


def _scored_seeds(row: "Row", scored: Scored) -> Iterator[dict[str, Any]]:
    """The row's runs that can be scored; the others get the reason why not."""
    for seed, training in row.trainings.items():
        if training.failure:
            continue
        try:
            scored.add_model(row, seed, training)
            yield _seed(seed, training)
        except GraftrecError as error:
            training.failure = str(error)


def bare(metric: str) -> str:
    """A metric's name without what is before it: a convention, or what is predicted."""
    return metric.rpartition("/")[2]


def _in_order(names: Iterable[str]) -> list[str]:
    """Each once, those of one kind (NDCG@1, NDCG@5…) together."""
    found = list(dict.fromkeys(names))
    kinds = [name.partition("@")[0] for name in found]
    return sorted(found, key=lambda name: kinds.index(name.partition("@")[0]))


def _metrics(label: str, results: Sequence[Results], metrics: Sequence[str]) -> dict[str, Any]:
    """protocol -> convention -> metric -> mean, and that of each seed."""
    found: dict[str, Any] = {}
    for one in results:
        for protocol in one.protocols:
            seeds = [one.averages((label, seed), protocol) for seed in one.seeds(label)]
            found[protocol] = {
                convention: {
                    metric: {"mean": float(np.mean(values)), "seeds": values}
                    for metric in metrics
                    if (values := [of_seed[prefix + metric] for of_seed in seeds if prefix + metric in of_seed])
                }
                for convention, prefix in one.conventions.items()
            }
    return found


def _row(row: "Row", seeds: list[Any], results: Sequence[Results], metrics: Sequence[str]) -> dict[str, Any]:
    lost = [f"seed {seed}: {training.failure}" for seed, training in row.trainings.items() if training.failure]
    reads = {scorer.label: scorer.reads for scorer in results[0].scorers.values()}
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
        "reads": reads.get(row.id, ""),
        "status": "done" if seeds else "missing",
        "reason": row.reason or "; ".join(dict.fromkeys(lost)),
        "metrics": _metrics(row.id, results, metrics) if seeds else {},
        "seeds": seeds,
    }


def _baseline(scorer: Scorer, results: Sequence[Results], metrics: Sequence[str]) -> dict[str, Any]:
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
        "metrics": _metrics(scorer.label, results, metrics),
        "seeds": [],
    }


def _seed(seed: int, training: "TrainingJob") -> dict[str, Any]:
    """One training run, read from its folder."""
    done, history, account = (
        json.loads((training.folder / name).read_text()) for name in (DONE, "history.json", "transfer.json")
    )
    trained, score = sum(epoch["seconds"] for epoch in history), monitor(training.config.task)
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
        "validation": done["metrics"].get(f"validation/{score}"),  # None: the split has no validation part
        "curve": [
            {"epoch": epoch["epoch"], "loss": epoch["loss"], "validation": epoch["metrics"].get(score)}
            for epoch in history
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


def finite(value: Any) -> Any:
    """Plain JSON: NaN and infinity become null."""
    if isinstance(value, dict):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [finite(entry) for entry in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def flat_metrics(found: dict[str, Any], metrics: Sequence[str]) -> Iterator[tuple[str, float]]:
    """(name, mean) of every row, protocol and convention, in some metrics, for MLflow."""
    for row in found["rows"]:
        for protocol, by_convention in row["metrics"].items():
            for convention, values in by_convention.items():
                for metric in [metric for metric in metrics if metric in values]:
                    name = "/".join(filter(None, (row["id"], protocol, convention, metric)))
                    yield name.replace(",", ""), values[metric]["mean"]


def text_table(found: dict[str, Any], metric: str) -> str:
    """Every row under every protocol and convention, in one metric."""
    places = [(p, c) for p in found["protocols"] for c in found["conventions"]]
    width = max(len(row["id"]) for row in found["rows"]) + 2
    table = [f"{metric:<{width}}" + "".join(f"{', '.join(filter(None, (p, c))):>22}" for p, c in places)]
    for row in sorted(found["rows"], key=lambda row: row["status"] != "done"):
        trainings = (
            [f"{row['metrics'][p][c][metric]['mean']:>22.4f}" for p, c in places] if row["metrics"] else ["  missing"]
        )
        table.append(f"{row['id']:<{width}}" + "".join(trainings))
    return "\n".join([*table, *lines(found["cards"])])
