"""RePlay's Parquet loader over sequences: padded, shuffled batches. argv[1]: JSON; the last line printed is JSON."""

import json
import statistics
import sys
import time
import warnings
from importlib.metadata import version

import torch
from replay.data.nn.parquet.parquet_dataset import ParquetDataset


def main():
    arguments = json.loads(sys.argv[1])
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)  # RePlay's advice
    batches = ParquetDataset(
        arguments["files"],
        metadata={"user": {}, "items": {"shape": arguments["length"], "padding": 0}},
        partition_size=arguments["partition_rows"],
        batch_size=arguments["batch_size"],
        generator=torch.Generator().manual_seed(0),
    )
    rows = items = 0
    for batch in batches:  # not timed: fills the page cache
        rows, items = rows + len(batch["items"]), items + int(batch["items_mask"].sum())
    seconds = []
    for _ in range(arguments["epochs"]):
        begun, found = time.perf_counter(), 0
        for batch in batches:
            found += len(batch["items"])
        seconds.append(time.perf_counter() - begun)
        assert found == rows
    spent = statistics.median(seconds)
    measured = {"rows": rows / spent, "items": items / spent, "dtype": str(batch["items"].dtype)}
    print(json.dumps({**measured, "version": version("replay-rec"), "torch": torch.__version__}))


if __name__ == "__main__":
    main()
