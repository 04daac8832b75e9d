"""Training speed of RecBole's BERT4Rec. argv[1]: JSON; the last line printed is JSON.

RecBole's own split makes a sample of each prefix of a history. Its format for ready splits is used instead, so that it
trains on the same sequences as the others, one a user; and a plain loop, since its trainer adds progress bars.
"""

import json
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.model.sequential_recommender import BERT4Rec
from steps import Steps, sequences, tell


def write(path, lists, length):
    """RecBole's atomic file of ready sequences. Ids are tokens, so 0 is an item like another."""
    lines = ["user_id:token\titem_id_list:token_seq\titem_id:token"]
    for user, items in enumerate(lists):
        lines.append(f"u{user}\t{' '.join(f'i{item}' for item in items[-length:])}\ti{items[-1]}")
    path.write_text("\n".join(lines) + "\n")


def settings(arguments, folder):
    return {
        "data_path": str(folder.parent),
        "load_col": {"inter": ["user_id", "item_id_list", "item_id"]},
        "alias_of_item_id": ["item_id_list"],
        "benchmark_filename": ["train", "valid", "test"],
        "MAX_ITEM_LIST_LENGTH": arguments["length"],
        "n_layers": arguments["blocks"],
        "n_heads": arguments["heads"],
        "hidden_size": arguments["width"],
        "inner_size": 4 * arguments["width"],
        "hidden_dropout_prob": arguments["dropout"],
        "attn_dropout_prob": arguments["dropout"],
        "mask_ratio": arguments["mask_probability"],
        "loss_type": "CE",
        "train_neg_sample_args": None,
        "train_batch_size": arguments["batch_size"],
        "worker": 0,
        "use_gpu": False,
        "state": "ERROR",
        "show_progress": False,
    }


def main():
    arguments = json.loads(sys.argv[1])
    sys.argv = sys.argv[:1]  # RecBole reads the command line too
    warnings.simplefilter("ignore")
    torch.set_num_threads(arguments["threads"])
    lists = sequences(arguments["train"])
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "log"
        folder.mkdir()
        for part, chosen in (("train", lists), ("valid", lists[:8]), ("test", lists[:8])):
            write(folder / f"log.{part}.inter", chosen, arguments["length"])
        config = Config(model="BERT4Rec", dataset="log", config_dict=settings(arguments, folder))
        batches = data_preparation(config, create_dataset(config))[0]
    model = BERT4Rec(config, batches.dataset)
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    steps = Steps(arguments["seconds"])
    over = False
    while not over:
        for batch in batches:
            optimizer.zero_grad()
            model.calculate_loss(batch).backward()
            optimizer.step()
            over = steps.done()
            if over:
                break
    tell(steps, lists, arguments, "recbole")


if __name__ == "__main__":
    main()
