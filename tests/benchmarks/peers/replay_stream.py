"""RePlay's Parquet loader over sequences: padded, shuffled batches. argv[1]: JSON; the last line printed is JSON."""

import json
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
    for _ in zip(range(20), batches, strict=False):
        pass
    rows = items = 0
    begun = time.perf_counter()
    while time.perf_counter() - begun < arguments["seconds"]:
        for batch in batches:
            rows += len(batch["items"])
    spent = time.perf_counter() - begun
    for batch in batches:  # apart: counting isn't loading
        items += int(batch["items_mask"].sum())
    told = {"rows_per_second": rows / spent, "items": items, "dtype": str(batch["items"].dtype)}
    print(json.dumps({**told, "version": version("replay-rec"), "torch": torch.__version__}))


if __name__ == "__main__":
    main()
