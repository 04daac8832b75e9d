"""What the peers' training scripts share. Runs in a peer's environment: plain Python, numpy, pyarrow and torch."""

import json
import time
from importlib.metadata import version

import numpy as np
import pyarrow.parquet as pq
import torch

WARM_STEPS = 2  # not counted: buffers are allocated, kernels chosen


class Steps:
    """A clock of training steps: the first WARM_STEPS aren't counted, then it runs for `seconds`, at least 3 steps."""

    def __init__(self, seconds):
        self.seconds, self.count, self.begun, self.last = seconds, -WARM_STEPS, 0.0, 0.0

    def done(self):
        """To be called at the end of each step: whether it was the last."""
        self.count, self.last = self.count + 1, time.perf_counter()
        if self.count <= 0:
            self.begun = self.last
        return self.count >= 3 and self.last - self.begun >= self.seconds

    @property
    def seconds_per_step(self):
        return (self.last - self.begun) / self.count


def sequences(path):
    """Users' training sequences (item numbers from 0, oldest first) as a list of arrays, by user."""
    table = pq.read_table(path)
    user, item = table["user"].to_numpy(), table["item"].to_numpy()
    return np.split(item, np.flatnonzero(np.diff(user)) + 1)


def tell(steps, lists, arguments, package):
    """Print what was measured. Peers pad every sequence to `length`, so each step costs the same, and the items of an
    average step stand for all."""
    num_items = sum(min(len(one), arguments["length"]) for one in lists)
    per_step = num_items / len(lists) * arguments["batch_size"]
    measured = {
        "items_per_second": per_step / steps.seconds_per_step,
        "steps": steps.count,
        "version": version(package),
        "torch": torch.__version__,
    }
    print(json.dumps(measured))
