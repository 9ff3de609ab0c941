"""Training computes in bfloat16 where the device does so in hardware, and in float32 elsewhere."""

import pytest
import torch

from gobelin.training import find_preset
from gobelin.training.precision import autocast

CPU = torch.device("cpu")


def computed(precision, device=CPU):
    with autocast(device, precision):
        return (torch.ones(2, 2) @ torch.ones(2, 2)).dtype


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"amx_bf16": True, "avx512_bf16": False}, torch.bfloat16),
        ({"neon": True, "bf16": True}, torch.bfloat16),
        ({"avx2": True, "avx512_bf16": False, "amx_bf16": False}, torch.float32),
        ({}, torch.float32),
    ],
)
def test_auto_asks_the_processor(monkeypatch, capabilities, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert computed("auto") == expected
    assert computed("bfloat16") == torch.bfloat16
    assert computed("float32") == torch.float32


def test_presets_leave_it_to_the_device():
    for name in ("nano", "tiny"):
        config = find_preset(name)
        assert {config.text.optim.precision, config.unet.optim.precision} == {"auto"}
