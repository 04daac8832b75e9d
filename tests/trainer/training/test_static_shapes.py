"""Steps of static shapes: they give what ragged ones give, read nothing back, and runs end alike however stopped."""

import itertools
import json
import signal
import time

import pytest
import torch
import torch.optim.optimizer as torch_optimizer
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from etl.settings import GraftrecError
from etl.tables import FIRST_INDEX
from tests.fixtures.networks import NUM_ITEMS, batch_of, model_of
from tests.fixtures.trainings import equal_weights, start, tiny, weights_of
from trainer.config import Bert4RecConfig, LossConfig, MaskedItemConfig, NextItemConfig, PretrainConfig, TrainConfig
from trainer.data.ahead import packed
from trainer.parallel.distributed import World
from trainer.recipes.pretrain import run as pretrain
from trainer.tasks import build_task, loss, packed_softmax
from trainer.training.device_step import Unread, step_on_device
from trainer.training.loop import NonFiniteLoss, Training

LENGTHS, ROWS, MOST = [5, 12, 3, 8, 1, 0, 7], 9, 12
SMALL = {"width": 16, "heads": 2, "max_length": MOST}
MODELS = {
    "rotary, users, knowledge": Bert4RecConfig(**SMALL, user_width=4, knowledge_width=3),
    "learned": Bert4RecConfig(**SMALL, blocks=1, positions="learned"),
    "gated, cosines": Bert4RecConfig(**SMALL, block="ligr", score="cosine"),
    "times": Bert4RecConfig(**SMALL, time={"bias": True, "intervals": True}),
    "times of events": Bert4RecConfig(**SMALL, time={"bias": True, "intervals": True, "request_time": "last_event"}),
}
FEW = {"num_negatives": 10}
TASKS = {
    "next": NextItemConfig(loss=LossConfig(label_smoothing=0.1)),
    "next, sampled": NextItemConfig(loss=LossConfig(kind="sampled", **FEW)),
    "next, bce": NextItemConfig(loss=LossConfig(kind="bce", **FEW)),
    "next, gbce": NextItemConfig(loss=LossConfig(kind="gbce", **FEW)),
    "masked": MaskedItemConfig(mask_probability=0.5),
    "masked, sampled": MaskedItemConfig(loss=LossConfig(kind="sampled", **FEW)),
}


def timed(lengths, **how):
    batch = batch_of(lengths, **how)
    gaps = torch.randint(0, 10**13, batch.items.shape, generator=torch.Generator().manual_seed(5))
    batch.times = gaps.cumsum(1)
    return batch


def made(name, *, dropout=0.0, reads=None):
    """The network, with weights at which nothing is zero; with `reads` some, some items are no targets."""
    model = model_of(MODELS[name].model_copy(update={"dropout": dropout}), seed=1).train()
    random = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=random, dtype=parameter.dtype)
    if reads == "some":
        rows_V = torch.arange(NUM_ITEMS) % 3 != 0
        rows_V[:FIRST_INDEX] = False
        model.restrict_targets(rows_V)
        model.mark_untrained(torch.arange(NUM_ITEMS) == FIRST_INDEX + 4)
    return model


@pytest.mark.parametrize("task_name", TASKS)
@pytest.mark.parametrize(("name", "reads"), zip(MODELS, itertools.cycle(["some", "all"]), strict=False))
def test_loss_and_gradients_are_those_of_a_ragged_batch(name, task_name, reads, monkeypatch):
    """In fp64, without dropout, with the same masks and negatives."""
    monkeypatch.setattr(loss, "integers", lambda draw, stream, count, below, device: torch.arange(count) * 7 % below)
    monkeypatch.setattr(packed_softmax, "DEVICE_BLOCK_SCORES", 100)  # several blocks
    ragged = timed(LENGTHS)
    batch = packed(ragged, rows=ROWS, max_length=MOST)
    assert batch.packing.source_RT.shape == (3, MOST)
    task, found = build_task(TASKS[task_name]), []
    if task_name.startswith("masked"):
        masks = task.mask(batch, NUM_ITEMS)
        B, T = ragged.items.shape
        of_ragged = masks[0][:B, :T], masks[1][:B], masks[2][:B, :T]
        monkeypatch.setattr(
            task, "mask", lambda given, _: [x.clone() for x in (of_ragged if given is ragged else masks)]
        )
    for given in (ragged, batch):
        model = made(name, reads=reads)
        total, positions = task.loss(model, given)
        total.backward()
        slopes = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        means = {name: slope / positions for name, slope in slopes.items()}
        found.append(((total / positions).item(), int(positions), means))
    assert found[0][1] == found[1][1] > 0
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-12)
    torch.testing.assert_close(found[1][2], found[0][2], rtol=1e-10, atol=1e-12)


def test_masks_are_drawn_as_often_as_on_a_cpu():
    task = build_task(MaskedItemConfig(mask_probability=0.3, last_only_probability=0.2))
    shares = []
    for is_packed in (False, True):
        counts = torch.zeros(3)
        for step in range(60):
            batch = batch_of([40, 7, 20, 1] * 8, draw=(0, 0, step))
            batch = packed(batch, rows=32, max_length=40) if is_packed else batch
            corrupted_BT, lengths_B, chosen_BT = task.mask(batch, NUM_ITEMS)
            assert chosen_BT.any(1).all()
            changed = (corrupted_BT != batch.items) & (torch.arange(40) < lengths_B[:, None])
            counts += torch.tensor([chosen_BT.sum(), changed.sum(), (lengths_B < batch.lengths).sum()])
        shares.append(counts / 60)
    assert shares[1].tolist() == pytest.approx(shares[0].tolist(), rel=0.03)


def test_two_processes_draw_what_one_does():
    task = build_task(MaskedItemConfig())
    whole = packed(batch_of(LENGTHS), rows=7, max_length=MOST)
    corrupted_BT, *_ = task.mask(whole, NUM_ITEMS)
    half = batch_of(LENGTHS)
    half.items, half.lengths, half.users, half.rows = half.items[3:], half.lengths[3:], half.users[3:], slice(3, 7)
    theirs_BT, *_ = task.mask(packed(half, rows=4, max_length=MOST), NUM_ITEMS)
    assert torch.equal(theirs_BT, corrupted_BT[3:])


# --- nothing is read back ---------------------------------------------


class Steps:
    """What a run asks of a loader, beside batches."""

    num_steps, max_length, epoch, step = 1, MOST, 0, 0


def training_of(model, task, *, compile="off", **settings):
    world = World(0, 1, next(model.parameters()).device, torch.float32, False, True, compile)
    return Training(model, task, Steps(), TrainConfig(batch_size=ROWS, **settings), world)


def moved(model, change):
    """The network with each tensor changed."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            module.register_parameter(name, nn.Parameter(change(parameter.detach())))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, change(buffer))
    return model


@pytest.mark.parametrize("task_name", TASKS)
@pytest.mark.parametrize(("name", "reads"), zip(MODELS, itertools.cycle(["some", "all"]), strict=False))
def test_a_step_reads_nothing_back(name, task_name, reads, monkeypatch):
    """With numbers that aren't there: item, tolist, numpy, boolean indexing and nonzero raise on fake tensors; on meta
    tensors, copies to the CPU do too."""
    batch, task = packed(timed(LENGTHS), rows=ROWS, max_length=MOST), build_task(TASKS[task_name])
    fake = FakeTensorMode()
    model = moved(made(name, dropout=0.1, reads=reads).float(), fake.from_tensor)
    with fake:
        training = training_of(model, task)
        numbers = step_on_device(training, batch._with(fake.from_tensor), wish=0, learning_rate=1e-3)
        assert numbers.shape == (4,)
        for reads_back in READ_BACKS:
            with pytest.raises(Exception, match=r"aten\.|not supported for tensor subclasses"):
                reads_back(numbers)

    supported = torch_optimizer._get_fused_kernels_supported_devices()
    monkeypatch.setattr(torch_optimizer, "_get_fused_kernels_supported_devices", lambda: [*supported, "meta"])
    training = training_of(made(name, dropout=0.1, reads=reads).float().to("meta"), task)
    numbers = step_on_device(training, batch.to(torch.device("meta")), wish=0, learning_rate=1e-3)
    assert numbers.device.type == "meta"
    for reads_back in (*READ_BACKS, torch.Tensor.cpu, lambda x: x.to("cpu")):
        with pytest.raises((RuntimeError, NotImplementedError, TypeError)):
            reads_back(numbers)


READ_BACKS = (
    lambda x: x[0].item(),
    torch.Tensor.tolist,
    torch.Tensor.numpy,
    torch.Tensor.nonzero,
    lambda x: x[x > 0],
    lambda x: bool(x[0]),
)


def test_the_fused_loss_computes_nothing_that_is_read_back(monkeypatch):
    """The whole of it, where the step's proof takes torch's word for the shapes of one operation."""
    monkeypatch.setattr(packed_softmax, "DEVICE_BLOCK_SCORES", 100)
    shapes = {"query": (9, 4), "table": (20, 4), "bias": (20,)}
    given = {name: torch.empty(shape, device="meta", dtype=torch.bfloat16) for name, shape in shapes.items()}
    targets_N, counts_N = (torch.empty(9, device="meta", dtype=dtype) for dtype in (torch.int64, torch.bool))
    found = packed_softmax.in_blocks(*given.values(), targets_N, counts_N, 0.1, torch.bfloat16)
    assert [tuple(x.shape) for x in found] == [(), *shapes.values()]


def test_a_step_that_is_no_number_changes_nothing_and_is_told_one_step_later():
    model, task = made("learned").float(), build_task(TASKS["next"])
    training = training_of(model, task)
    batch = packed(batch_of(LENGTHS), rows=ROWS, max_length=MOST).to(torch.device("cpu"))
    training.unread = Unread(batch, step_on_device(training, batch, wish=0, learning_rate=1e-3))
    assert training.settle().positions == sum(LENGTHS)
    with torch.no_grad():
        model.output_bias[FIRST_INDEX] = torch.nan
    before = [p.detach().clone() for p in model.parameters()]
    training.unread = Unread(batch, step_on_device(training, batch, wish=0, learning_rate=1e-3))
    for parameter, was in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(parameter, was, rtol=0, atol=0, equal_nan=True)
    with pytest.raises(NonFiniteLoss, match=r"loss nan .* that begins with user indices"):
        training.settle()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "task_name"), [("rotary, users, knowledge", "next"), ("times", "masked, sampled")])
def test_compiled_equals_eager(name, task_name):
    """With dropout, which is a hash and no state."""
    found = []
    for how in ("off", "on"):
        training = training_of(made(name, dropout=0.1), build_task(TASKS[task_name]), compile=how)
        numbers = []
        for lengths, step in itertools.product((LENGTHS, [12, 12, 11, 2]), range(2)):
            batch = packed(timed(lengths, draw=(0, 0, step)), rows=ROWS, max_length=MOST)
            numbers.append(step_on_device(training, batch, wish=0, learning_rate=1e-3))
        found.append((torch.stack(numbers), dict(training.model.named_parameters())))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-9, atol=0)
    torch.testing.assert_close(found[1][1], found[0][1], rtol=1e-6, atol=1e-9)


# --- whole runs, forced on the CPU ---------------------------------------------

STATIC = {"static_shapes": True}
RUNS = {
    "next": {"task": {"kind": "next_item"}},
    "masked": {"task": {"kind": "masked_item"}},
}


@pytest.fixture(scope="module", params=RUNS)
def uninterrupted(request, tiny_lake, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    sections = {**RUNS[request.param], "runtime": STATIC}
    return sections, pretrain(tiny(PretrainConfig, folder, tiny_lake, name="whole", **sections)).folder


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_packed_run_stopped_in_mid_epoch_ends_with_the_same_weights(number, tiny_lake, tmp_path, uninterrupted):
    sections, whole = uninterrupted
    process = start(tmp_path, tiny_lake, name="whole", **sections)
    deadline = time.monotonic() + 120
    while len(list((tmp_path / "runs" / "whole" / "checkpoints").glob("step-*/manifest.json"))) < 2:
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == (143 if number == signal.SIGTERM else -number)
    resumed = pretrain(tiny(PretrainConfig, tmp_path, tiny_lake, name="whole", **sections)).folder
    assert equal_weights(weights_of(resumed), weights_of(whole))
    histories = [json.loads((folder / "history.json").read_text()) for folder in (resumed, whole)]
    assert [(e["loss"], e["metrics"]) for e in histories[0]] == [(e["loss"], e["metrics"]) for e in histories[1]]
    assert histories[1][-1]["loss"] < histories[1][0]["loss"]


def test_what_has_no_static_shapes_is_refused_by_name(tmp_path):
    with pytest.raises(GraftrecError, match=r"static_shapes: expected model bert4rec .* found bert4rec, target_item"):
        tiny(PretrainConfig, tmp_path, tmp_path, task={"kind": "target_item"}, runtime=STATIC)
