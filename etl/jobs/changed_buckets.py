"""A table made of users' histories: all of it, or of a table that is there only the buckets that new rows touch.

A bucket is what can be replaced. Where the table's rows are whole histories, those of its users whom nothing new
concerns are copied (`etl.histories.incremental`); otherwise the bucket is made anew.
"""

from collections.abc import Mapping, Sequence

from pyspark.sql import DataFrame

from etl.histories import bucket_writer
from etl.histories.incremental import previous_state
from etl.histories.reader import Inputs, Rows, inputs, item_bits
from etl.jobs.domains import names_of
from etl.jobs.job import Outcome, Run
from etl.lake import spark_io
from etl.lake.datafile import DataFile
from etl.tables import INTERACTIONS, USERS


def write(
    run: Run,
    rows: Rows,
    *,
    columns: tuple[str, ...],
    needs: bool = False,
    whole: Sequence[str] = (),
    properties: Mapping[str, str],
) -> Outcome:
    """Write and commit the table of `run`.

    `rows`, `columns`: see `bucket_writer.BucketWork` and `histories.reader.inputs`.

    `needs`: without any of `columns` in the log there are no rows. `whole`: the splits
    whose rows of the domain `all` hold all that `rows` is given, in that order.
    """
    buckets = int(spark_io.last_commit(run.lake, INTERACTIONS)["buckets"])
    read = inputs_of(run, run.inputs, columns)
    if needs and not read.columns:
        return run.commit_files([], properties=properties)
    appended = run.appended_files(INTERACTIONS)
    touched = None if appended is None else _touched(run, read, appended, buckets)
    users = run.read(USERS)
    before = None
    if appended is not None and touched is not None:
        before = previous_state(run.lake, run.base, appended, whole) if whole else None
        run.notes.append(f"{len(touched)} of {buckets} buckets {'written' if before else 'made'} anew")
        if len(touched) < buckets:
            users = users.where(spark_io.bucket_of(buckets).isin(touched))
    files: list[DataFile] = []
    if touched is None or touched:
        work = bucket_writer.BucketWork(rows, run.lake, run.table, read, before)
        files = bucket_writer.write(users, work, buckets=buckets, tasks=run.config.spark.shuffle_partitions)
    if touched is None or len(touched) == buckets:
        return run.commit_files(files, properties=properties)
    return run.commit_files(files, mode="partitions", partition_scope={"bucket": touched}, properties=properties)


def inputs_of(run: Run, versions: Mapping[str, int], columns: tuple[str, ...]) -> Inputs:
    """What the tasks of a job read, as of `versions`."""
    config = run.config
    names = names_of(config.domains)
    return inputs(run.lake, versions, names=names, columns=columns, max_events=config.sequences.max_events)


def _touched(run: Run, read: Inputs, appended: Sequence[DataFile], buckets: int) -> list[int] | None:
    """The buckets whose rows may differ from those of the table's last commit. None: all, for items that were there
    before are in other domains or kept anew, and any bucket may have events of them.
    """
    assert run.before is not None
    try:
        bits, bits_before = item_bits(read), item_bits(inputs_of(run, run.before, ()))
    except spark_io.LakeError:  # maintenance has removed a version
        return None
    if len(bits) < len(bits_before) or (bits[: len(bits_before)] != bits_before).any():
        return None
    touched = {int(file.partition["bucket"] or 0) for file in appended}
    if len(touched) < buckets:
        now, before = (
            frame.where("kept").select("user", "index") for frame in (run.read(USERS), run.read_before(USERS))
        )
        for differing in (_less(now, before), _less(before, now)):
            rows = differing.select(spark_io.bucket_of(buckets).alias("bucket")).distinct().collect()
            touched |= {row["bucket"] for row in rows}
    return sorted(touched)


def _less(rows: DataFrame, others: DataFrame) -> DataFrame:
    return rows.join(others, rows.columns, "left_anti")
