"""Muon: torch's own on matrices, kernels as matrices, and what it leaves to AdamW."""

import dataclasses

import pytest
import torch
from torch import nn

from gobelin.training import find_preset
from gobelin.training.muon import Muon, muon_parameters, newton_schulz
from gobelin.training.trainer import make_optimizers
from gobelin.unet import UNet
from gobelin.unet_config import UNetConfig


@pytest.mark.parametrize("shape", [(24, 24), (16, 80), (80, 16), (17, 33)])
def test_singular_values_become_about_one_and_directions_stay(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    inside = left.T @ newton_schulz(matrix) @ right.T
    assert ((inside.diag() > 0.6) & (inside.diag() < 1.3)).all()
    assert (inside - inside.diag().diag()).abs().max() < 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_matrix_of_rank_one_does_not_explode(dtype):
    generator = torch.Generator().manual_seed(0)
    matrix = (torch.randn(64, 1, generator=generator) @ torch.randn(1, 256, generator=generator)).to(dtype)
    made = newton_schulz(matrix)
    assert made.dtype == dtype
    assert 0.6 < torch.linalg.svdvals(made.float())[0] < 1.3


def matrices():
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(20, 48)), nn.Parameter(torch.randn(48, 20))]


def descend(optimizer, parameters, steps=5):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon of its own")
def test_it_is_torchs_own_on_matrices():
    ours, theirs = matrices(), matrices()
    descend(Muon(ours, lr=0.1, weight_decay=0.2), ours)
    options = {"lr": 0.1, "weight_decay": 0.2, "adjust_lr_fn": "match_rms_adamw"}
    descend(torch.optim.Muon(theirs, **options), theirs)
    for one, other, start in zip(ours, theirs, matrices(), strict=True):
        # torch keeps its momentum as a sum and ours is a mean: the same direction, but for bfloat16's rounding
        assert (one - other).norm() < 0.02 * (other - start).norm()


def test_a_kernel_is_a_matrix():
    flat, kernel = nn.Parameter(torch.zeros(20, 36)), nn.Parameter(torch.zeros(20, 4, 3, 3))
    descend(Muon([flat], lr=0.1), [flat])
    descend(Muon([kernel], lr=0.1), [kernel])
    assert kernel.abs().max() > 0
    # Nothing but the shape differs: the same numbers in the same order.
    assert torch.equal(kernel.flatten(1), flat)


def test_a_step_is_as_large_as_adamws():
    (parameter, _) = matrices()
    before = parameter.detach().clone()
    descend(Muon([parameter], lr=0.01), [parameter], steps=1)
    size = (parameter - before).square().mean().sqrt() / 0.01
    assert 0.14 < size < 0.26, "0.2 learning rates, the root mean square of AdamW's steps"


def test_it_is_for_hidden_layers():
    unet = UNet(UNetConfig.nano())
    taken = muon_parameters(unet)
    assert "mid_block.resnets.0.conv1.weight" in taken
    assert "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight" in taken
    assert not {"conv_in.weight", "conv_out.weight", "conv_norm_out.weight", "conv_out.bias"} & taken
    assert muon_parameters(nn.Sequential(nn.Embedding(50, 20), nn.Linear(20, 20))) == {"1.weight"}


def test_every_parameter_has_one_optimizer():
    unet = UNet(UNetConfig.nano())
    optim = dataclasses.replace(find_preset("nano").unet.optim, optimizer="muon")
    optimizers = make_optimizers(unet, optim)
    assert [type(optimizer) for optimizer in optimizers] == [Muon, torch.optim.AdamW]
    given = [id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    assert sorted(given) == sorted(id(p) for p in unet.parameters())
