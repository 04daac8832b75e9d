"""On a CUDA device: what the CPU gives, and a run that is stopped ends as if nothing had been. `make test-gpu`."""

import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from etl.tables import FIRST_INDEX
from tests.fixtures.networks import batch_of, model_of
from tests.fixtures.trainings import config_file, equal_weights, tiny, weights_of
from trainer.config import (
    Bert4RecConfig,
    CaserConfig,
    FinetuneConfig,
    LossConfig,
    MaskedItemConfig,
    NextItemConfig,
    PeterRecConfig,
    PretrainConfig,
    RuntimeConfig,
)
from trainer.data.ahead import packed
from trainer.data.events import Events
from trainer.inference.model_folder import load_model
from trainer.inference.scorer import ModelScorer, top_k
from trainer.parallel.distributed import join
from trainer.recipes.finetune import run as finetune
from trainer.recipes.pretrain import run as pretrain
from trainer.tasks import build_task, softmax
from trainer.training.device_step import tensors_only
from trainer.training.loop import Loss

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

CUDA = torch.device("cuda")
MODELS = {
    "bert4rec": Bert4RecConfig(
        blocks=2, width=16, heads=2, max_length=12, dropout=0.0, user_width=4, knowledge_width=3
    ),
    "learned": Bert4RecConfig(blocks=1, width=16, heads=2, max_length=12, dropout=0.0, positions="learned"),
    "gated, cosines": Bert4RecConfig(
        blocks=2, width=16, heads=2, max_length=12, dropout=0.0, block="ligr", score="cosine"
    ),
    "peterrec": PeterRecConfig(width=16, dilations=(1, 2), max_length=12, dropout=0.0),
    "caser": CaserConfig(width=8, max_length=12, window=3, horizontal=4, vertical=2, dropout=0.0, user_width=4),
}
TASKS = {
    "masked": MaskedItemConfig(mask_probability=0.5),
    "next": NextItemConfig(loss=LossConfig(label_smoothing=0.1)),
    "next, three targets, bce": NextItemConfig(targets=3, loss=LossConfig(kind="bce", num_negatives=10)),
    "next, gbce": NextItemConfig(loss=LossConfig(kind="gbce", num_negatives=10)),
    "masked, sampled": MaskedItemConfig(loss=LossConfig(kind="sampled", num_negatives=10)),
}


@pytest.mark.parametrize("block", [64, 1 << 25])
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_are_the_cpus(name, task, block, monkeypatch):
    monkeypatch.setattr(softmax, "DEVICE_BLOCK_SCORES", block)
    monkeypatch.setattr(softmax, "BLOCK_ROWS", 1)
    batch, found = batch_of([5, 12, 3, 8, 1]), []
    for device in ("cpu", "cuda"):
        model = model_of(MODELS[name]).to(device)
        loss, positions = build_task(TASKS[task]).loss(model, batch.to(torch.device(device)))
        loss.backward()
        slopes = {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}
        found.append((loss.item(), int(positions), slopes))
    assert found[0][:2] == pytest.approx(found[1][:2])
    torch.testing.assert_close(found[1][2], found[0][2])


@pytest.mark.parametrize("compiles", [False, True])
@pytest.mark.parametrize("task", [name for name, config in TASKS.items() if config.packs])
@pytest.mark.parametrize("name", ["bert4rec", "learned", "gated, cosines"])
def test_a_packed_batch_gives_what_it_gives_on_a_cpu(name, task, compiles):
    """Masks, negatives and dropout too: they are the same on both."""
    batch, found = packed(batch_of([5, 12, 3, 8, 1]), rows=6, max_length=12), []
    for device in ("cpu", "cuda"):
        model = model_of(MODELS[name].model_copy(update={"dropout": 0.1})).to(device).train()
        given = Loss(model, build_task(TASKS[task]))
        if compiles and device == "cuda":
            given.compile(dynamic=False, fullgraph=True)
        loss, positions = given(tensors_only(batch).to(torch.device(device)))
        loss.backward()
        slopes = {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}
        found.append((loss.item(), int(positions), slopes))
    assert found[1][:2] == pytest.approx(found[0][:2])
    torch.testing.assert_close(found[1][2], found[0][2])


def test_bf16_is_taken_by_itself_and_its_loss_is_near():
    world = join(RuntimeConfig())
    assert world.device.type == "cuda"
    assert world.autocast == (torch.cuda.get_device_capability() >= (8, 0))
    model, batch = model_of(MODELS["bert4rec"]).float().to(CUDA), batch_of([5, 12, 3, 8, 1]).to(CUDA)
    task = build_task(TASKS["next"])
    exact, _ = task.loss(model, batch)
    with torch.autocast("cuda", torch.bfloat16):
        near, _ = task.loss(model, batch)
    assert near.item() != exact.item()
    assert near.item() == pytest.approx(exact.item(), rel=0.01)


@pytest.mark.parametrize("name", MODELS)
def test_scores_and_the_best_rows_are_the_cpus(name):
    lengths = [5, 0, 11, 3]
    items = np.random.default_rng(0).integers(FIRST_INDEX, FIRST_INDEX + 30, sum(lengths))
    histories = Events.of(np.array([3, 4, 5, 99]), np.cumsum([0, *lengths]), items, np.empty(0, np.int64))
    task, found = build_task(TASKS["next"]), []
    for device in ("cpu", "cuda"):
        scorer = ModelScorer(model_of(MODELS[name]).to(device), task, device=device)
        rows, best = top_k(scorer.scores(histories), histories, 7)
        found.append((scorer.score(histories), torch.from_numpy(rows), best))
    torch.testing.assert_close(found[1], found[0])


@pytest.fixture(scope="module")
def uninterrupted(tiny_lake, tmp_path_factory):
    return pretrain(tiny(PretrainConfig, tmp_path_factory.mktemp("whole"), tiny_lake, name="whole")).folder


def test_the_same_run_gives_the_same_weights(uninterrupted, tiny_lake, tmp_path):
    again = pretrain(tiny(PretrainConfig, tmp_path, tiny_lake, name="whole"))
    assert equal_weights(weights_of(again.folder), weights_of(uninterrupted))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_run_stopped_in_mid_epoch_ends_with_the_same_weights(number, uninterrupted, tiny_lake, tmp_path):
    path = config_file(tmp_path, tiny_lake, name="whole")
    process = subprocess.Popen([sys.executable, "-m", "trainer", "pretrain", "--config", str(path)], cwd=tmp_path)
    deadline = time.monotonic() + 120
    while len(list((tmp_path / "runs" / "whole" / "checkpoints").glob("step-*/manifest.json"))) < 2:
        assert process.poll() is None, "ended before it could be stopped"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(number)
    assert process.wait(60) == (143 if number == signal.SIGTERM else -number)
    result = pretrain(tiny(PretrainConfig, tmp_path, tiny_lake, name="whole"))
    assert equal_weights(weights_of(result.folder), weights_of(uninterrupted))


def test_what_a_graft_copies_gets_there(tiny_lake, tmp_path):
    """Every group of parameters, and rows of shared items: before a step is taken, the model is its parent."""
    parent = pretrain(tiny(PretrainConfig, tmp_path, tiny_lake, name="parent", data={"domain": "all"})).folder
    reads_all = {"domain": "all", "predicted": "target", "split": "joint-5"}
    told = {"name": "graft", "parent": str(parent / "model"), "shared_items": True, "data": reads_all}
    initialise_from = finetune(tiny(FinetuneConfig, tmp_path, tiny_lake, train={"learning_rate": 1e-12}, **told)).folder
    before, after = (load_model(folder / "model").model.state_dict() for folder in (parent, initialise_from))
    first = {name: slice(FIRST_INDEX, None) for name in ("item_embedding.weight", "output_bias")}
    for name, tensor in before.items():
        torch.testing.assert_close(after[name][first.get(name, ...)], tensor[first.get(name, ...)])


def test_a_model_trained_there_scores_alike_on_a_cpu(uninterrupted):
    items = np.array([FIRST_INDEX, FIRST_INDEX + 3, FIRST_INDEX + 5])
    histories = Events.of(np.array([FIRST_INDEX]), np.array([0, 3]), items, np.empty(0, np.int64))
    found = []
    for device in ("cpu", "cuda"):
        trained_model = load_model(uninterrupted / "model", device=device)
        scorer = ModelScorer(trained_model.model, trained_model.task, device=device)
        found.append(scorer.score(histories))
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-3)
