"""Training speed of RePlay's BERT4Rec. argv[1]: JSON; the last line printed is JSON."""

import json
import sys
import warnings

import lightning
import numpy as np
import pandas as pd
import torch
from replay.data import FeatureHint, FeatureSource, FeatureType
from replay.data.nn import PandasSequentialDataset, TensorFeatureInfo, TensorFeatureSource, TensorSchema
from replay.models.nn.sequential.bert4rec import Bert4Rec, Bert4RecTrainingDataset
from steps import Steps, sequences, tell


class Clock(lightning.Callback):
    def __init__(self, steps):
        self.steps = steps

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        trainer.should_stop = trainer.should_stop or self.steps.done()


def main():
    arguments = json.loads(sys.argv[1])
    warnings.simplefilter("ignore")
    torch.set_num_threads(arguments["threads"])
    lists = sequences(arguments["train"])
    num_items = int(max(one.max() for one in lists)) + 1
    feature = TensorFeatureInfo(
        name="item_id",
        is_seq=True,
        feature_type=FeatureType.CATEGORICAL,
        feature_hint=FeatureHint.ITEM_ID,
        feature_sources=[TensorFeatureSource(FeatureSource.INTERACTIONS, "item_id")],
        cardinality=num_items,
        embedding_dim=arguments["width"],
    )
    schema = TensorSchema(feature)
    frame = pd.DataFrame({"user_id": np.arange(len(lists)), "item_id": lists})
    dataset = Bert4RecTrainingDataset(
        PandasSequentialDataset(schema, "user_id", "item_id", frame),
        max_sequence_length=arguments["length"],
        mask_prob=arguments["mask_probability"],
    )
    model = Bert4Rec(
        schema,
        block_count=arguments["blocks"],
        head_count=arguments["heads"],
        hidden_size=arguments["width"],
        max_seq_len=arguments["length"],
        dropout_rate=arguments["dropout"],
        enable_embedding_tying=True,
        loss_type=arguments["loss"],
    )
    steps = Steps(arguments["seconds"])
    trainer = lightning.Trainer(
        max_epochs=-1,
        accelerator="cpu",
        devices=1,
        callbacks=[Clock(steps)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        precision=arguments["precision"],
    )
    trainer.fit(model, torch.utils.data.DataLoader(dataset, batch_size=arguments["batch_size"], shuffle=True))
    tell(steps, lists, arguments, "replay-rec")


if __name__ == "__main__":
    main()
