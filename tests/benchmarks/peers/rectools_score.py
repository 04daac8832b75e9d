"""Speed of RecTools' `recommend`: BERT4Rec, every user, the whole catalogue, seen items out. argv[1]: JSON.

The weights are those after a few steps: what they are changes no arithmetic.
"""

import json
import sys
import time
import warnings
from importlib.metadata import version

import pyarrow.parquet as pq
import torch
from rectools_train import dataset, model


def main():
    arguments = json.loads(sys.argv[1])
    warnings.simplefilter("ignore")
    torch.set_num_threads(arguments["threads"])
    log = dataset(arguments["train"])
    fitted = model({**arguments, "seconds": 0.0}).fit(log)
    users = pq.read_table(arguments["train"], columns=["user"])["user"].unique().to_numpy()
    fitted.recommend(users[:256], log, k=arguments["k"], filter_viewed=True)
    begun = time.perf_counter()
    answer = fitted.recommend(users, log, k=arguments["k"], filter_viewed=True)
    spent = time.perf_counter() - begun
    measured = {"users_per_second": len(users) / spent, "rows": len(answer), "version": version("rectools")}
    print(json.dumps({**measured, "torch": torch.__version__}))


if __name__ == "__main__":
    main()
