"""What a process computes with, where the settings leave it open: precision and threads."""

import pytest
import torch

from trainer.config import RuntimeConfig
from trainer.distributed import join


@pytest.mark.parametrize(("precision", "autocast"), [("auto", False), ("fp32", False), ("bf16", True)])
@pytest.mark.parametrize("has_tiles", [False, True])
def test_bf16_on_a_cpu_is_a_choice(precision, autocast, has_tiles, monkeypatch):
    """With AMX tiles too: products are faster by them, the steps of a small model are not."""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: has_tiles, raising=False)
    world = join(RuntimeConfig(device="cpu", precision=precision, threads=1))
    assert (world.autocast, world.dtype) == (autocast, torch.float32)
