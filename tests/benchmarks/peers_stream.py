"""Streaming sequences from Parquet beside RePlay's loader: the files of one Delta table, shuffled, padded batches.

RePlay reads the list of files, pads every batch to the full length and gives int32 items with a mask; ours goes through
the table's log, cuts the held-out items off, groups like lengths and gives int64 rows of the catalogue.
"""

from importlib.metadata import version

import torch

from tests.benchmarks.__main__ import Options
from tests.benchmarks.environments import PEERS, NotInstalled, python_of
from tests.benchmarks.harness import Case, Report, alternate, median
from tests.benchmarks.stream import BATCH, EPOCHS, LENGTH, SPLIT, USERS, make_lake
from trainer.data.release import pin
from trainer.data.sequences import SequenceDataset

PARTITION_ROWS = 1 << 17  # the fastest of 2^14, 2^16, 2^17 and 2^20, which is its default
BAR = 1.5


def measure(report: Report, options: Options) -> None:
    what = f"rows/s of Loader over {PEERS['replay']}'s ParquetDataset"
    try:
        python = python_of("replay", options.work)
    except NotInstalled as error:
        report.skip(what, str(error))
        return
    table = make_lake(options.work / "stream", USERS)
    files = [str(file) for file in SequenceDataset(pin(table, None), SPLIT, "all").files]
    settings = {
        "files": files,
        "batch_size": BATCH,
        "length": LENGTH,
        "partition_rows": PARTITION_ROWS,
        "epochs": EPOCHS,
    }
    cases = [
        Case("graftrec", "tests.benchmarks.stream:loader", {"lake": table}),
        Case("replay", "tests/benchmarks/peers/replay_stream.py", settings, python),
    ]
    found = alternate(cases, timeout=300)
    here = {"version": version("graftrec"), "torch": torch.__version__}
    speed = {name: median(rounds, "rows") for name, rounds in found.items()}
    report.table(
        f"{USERS:,} sequences in padded batches of {BATCH} × {LENGTH}, one torch thread",
        ["library", "version", "torch", "rows/s", "items/s", "graftrec is faster by", "peak GB"],
        [
            [
                name,
                (here | rounds[0])["version"],
                (here | rounds[0])["torch"],
                speed[name],
                median(rounds, "items"),
                speed["graftrec"] / speed[name],
                median(rounds, "peak_bytes") / 2**30,
            ]
            for name, rounds in found.items()
        ],
    )
    report.bar(what, speed["graftrec"] / speed["replay"], at_least=BAR)
