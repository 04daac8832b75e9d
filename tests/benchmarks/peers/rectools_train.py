"""Training speed of RecTools' BERT4Rec. argv[1]: JSON; the last line printed is JSON."""

import json
import sys
import warnings

import pandas as pd
import pyarrow.parquet as pq
import pytorch_lightning as lightning
import torch
from rectools import Columns
from rectools.dataset import Dataset
from rectools.models import BERT4RecModel
from steps import Steps, sequences, tell


class Clock(lightning.Callback):
    def __init__(self, steps):
        self.steps = steps

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        trainer.should_stop = trainer.should_stop or self.steps.done()


def dataset(path):
    """RecTools' dataset of the training log."""
    log = pq.read_table(path).to_pandas()
    return Dataset.construct(
        pd.DataFrame(
            {
                Columns.User: log["user"],
                Columns.Item: log["item"],
                Columns.Weight: 1.0,
                Columns.Datetime: pd.to_datetime(log["time"], unit="s"),
            }
        )
    )


def model(arguments):
    """The architecture of `arguments`; it trains for its seconds."""

    def trainer():
        return lightning.Trainer(
            max_epochs=-1,
            accelerator="cpu",
            devices=1,
            callbacks=[Clock(Steps(arguments["seconds"]))],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            precision=arguments["precision"],
        )

    return BERT4RecModel(
        n_blocks=arguments["blocks"],
        n_heads=arguments["heads"],
        n_factors=arguments["width"],
        dropout_rate=arguments["dropout"],
        mask_prob=arguments["mask_probability"],
        session_max_len=arguments["length"],
        batch_size=arguments["batch_size"],
        loss="softmax",
        get_trainer_func=trainer,
    )


def main():
    arguments = json.loads(sys.argv[1])
    warnings.simplefilter("ignore")
    torch.set_num_threads(arguments["threads"])
    trained = model(arguments).fit(dataset(arguments["train"]))
    steps = trained.fit_trainer.callbacks[0].steps  # RecTools trains with a copy of the trainer it is given
    tell(steps, sequences(arguments["train"]), arguments, "rectools")


if __name__ == "__main__":
    main()
