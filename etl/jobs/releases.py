"""One row per complete run: the versions of all tables, consistent with each other. Trainers pin a release."""

import json
import time
from collections.abc import Mapping

from pyspark.sql import DataFrame, SparkSession

from etl import delta
from etl.config import EtlConfig, config_hash
from etl.delta import spark_schema
from etl.jobs.job import Engine, Outcome
from etl.redaction import without_secrets
from etl.tables import RELEASES


def transform(
    spark: SparkSession, release: int, versions: Mapping[str, int], config: EtlConfig, *, code: str, created: int
) -> DataFrame:
    """RELEASES: one row."""
    tables = [(name, version) for name, version in sorted(versions.items())]
    settings = without_secrets(config.model_dump(mode="json"))
    text = json.dumps(settings, separators=(",", ":"), ensure_ascii=False)
    row = (release, created, tables, text, config_hash(config), code)
    return spark.createDataFrame([row], spark_schema(RELEASES))


def release(engine: Engine, versions: Mapping[str, int], *, code: str) -> tuple[int, Outcome]:
    """The number of the release that holds `versions`: the last one, or, where they differ from its, a new one."""
    lake = engine.config.lake
    last = delta.last_commit(lake, RELEASES)
    named = json.dumps(versions, sort_keys=True)
    number = int(last["release"]) if last else 0
    if last and last["versions"] == named:
        return number, Outcome(int(last["version"]), 1, False)
    number += 1
    frame = transform(engine.spark, number, versions, engine.config, code=code, created=time.time_ns() // 1_000)
    written = delta.write(
        engine.spark,
        frame,
        lake,
        RELEASES,
        mode="append",
        app="job/releases",
        app_version=number,
        metadata={"job": "releases", "release": str(number), "versions": named},
    )
    if not written.committed and delta.last_commit(lake, RELEASES)["versions"] != named:
        raise delta.CommitConflict("releases: another run released other versions meanwhile; run again")
    return number, Outcome(written.version, written.rows, written.committed)
