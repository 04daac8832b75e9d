"""The main job: raw log → tables → pre-train → fine-tune by each transfer → evaluate → registry → recommendations.

    python mlflow_projects/pipeline.py --config pipeline/demo [--section.key value …]

One process runs the steps one after the other, each as a child of one MLflow run; a step whose inputs, settings and code
are unchanged says so and is skipped (the recipes decide that themselves). Exit codes: 0, 2 for a mistake in settings or
data, 3 where the gate refuses the candidate.
"""

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # run as a script from a checkout that is not installed

from etl.config import EtlConfig, GraftrecError, Section, load  # noqa: E402
from trainer.config import FinetuneConfig, PretrainConfig, TrackingConfig, TransferName  # noqa: E402


class PipelineConfig(Section):
    """One setting for each step, and which transfers and seeds the steps are repeated for.

    The lake, the release and the folders of runs flow from one step to the next, whatever the sections say of them.
    """

    name: str = "pipeline"
    runs: str = "runs"  # folder of this pipeline's training runs
    etl: EtlConfig
    pretrain: PretrainConfig
    finetune: FinetuneConfig
    transfers: tuple[TransferName, ...] = ("none", "shallow", "deep")
    seeds: tuple[int, ...] = (0, 1, 2)
    pretrain_each_seed: bool = False  # False: one pre-trained model, of the first seed, under all
    tracking: TrackingConfig = TrackingConfig()
