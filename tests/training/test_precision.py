"""Training computes in bfloat16 where the device does so faster, and in float32 elsewhere."""

import pytest
import torch

from gobelin.kernels import hardware
from gobelin.training import find_preset
from gobelin.training.precision import autocast
from gobelin.training.presets import FROM_SCRATCH

CPU = torch.device("cpu")


def computed(precision, device=CPU):
    with autocast(device, precision):
        return (torch.ones(2, 2) @ torch.ones(2, 2)).dtype


@pytest.mark.parametrize(
    ("capabilities", "is_intels", "expected"),
    [
        ({"avx512_bf16": True}, False, torch.bfloat16),
        ({"avx512_bf16": True}, True, torch.float32),  # slower than float32: vectors without tiles
        ({"amx_bf16": True, "avx512_bf16": True}, True, torch.bfloat16),
        ({"neon": True, "bf16": True}, False, torch.bfloat16),
        ({"avx2": True, "avx512_bf16": False, "amx_bf16": False}, True, torch.float32),
        ({}, False, torch.float32),
    ],
)
def test_auto_asks_the_processor(monkeypatch, capabilities, is_intels, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    monkeypatch.setattr(hardware, "is_intels", lambda: is_intels)
    assert computed("auto") == expected
    assert computed("bfloat16") == torch.bfloat16
    assert computed("float32") == torch.float32


def test_presets_leave_it_to_the_device():
    for name in FROM_SCRATCH:
        config = find_preset(name)
        assert {config.text.optim.precision, config.unet.optim.precision} == {"auto"}
