"""What a job's commit records, carried over to a commit that changes rows of its table without running the job."""

import json
from collections.abc import Mapping
from typing import Any

# What a commit of a job has besides that which its job recorded.
_OF_COMMITS = {"app", "app_version", "rows", "commit", "snapshot", "sealed", "seal"}
_OF_DELTA = {
    "version",
    "timestamp",
    "operation",
    "operationParameters",
    "operationMetrics",
    "clientVersion",
    "engineInfo",
}


def job_record(recorded: Mapping[str, Any]) -> dict[str, str]:
    """The metadata that a job gave its commit, of the commit's custom metadata."""
    names = str(recorded["sealed"]).split(",") if "sealed" in recorded else recorded.keys() - _OF_DELTA
    return {name: str(recorded[name]) for name in sorted(set(names) - _OF_COMMITS) if name in recorded}


def renewed_record(
    recorded: Mapping[str, Any], newest: Mapping[str, int], last_job: Mapping[str, int]
) -> dict[str, str]:
    """job_record, with the `newest` versions of those inputs that no job has written since they were read.

    `last_job`: the version of the last commit of each table's job.
    """
    kept = job_record(recorded)
    if "inputs" in kept:
        inputs = json.loads(kept["inputs"])
        inputs |= {
            name: newest[name]
            for name, read in inputs.items()
            if name in newest and read >= last_job.get(name, read + 1)
        }
        kept["inputs"] = json.dumps(inputs, sort_keys=True)
    return kept
