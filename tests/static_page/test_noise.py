"""Noise in JavaScript against PyTorch's generator on the CPU."""

import numpy as np
import pytest
import torch
from tests.static_page.conftest import RunScript

SEEDS = [0, 1, 7, 5489, 2**31 - 1, 2**32 - 1, 2**32 + 5, 2**53 - 1]
SIZES = [16, 17, 31, 32, 64, 1000, 1024, 4096]

DRAW = """
const { Generator, drawNoise } = await module("noise");
const generator = new Generator(BigInt(given.seed));
return given.sizes.map((size) => [...drawNoise(generator, size)]);
"""
UNIFORM = """
const { Generator } = await module("noise");
const generator = new Generator(BigInt(given.seed));
return Array.from({ length: given.count }, () => generator.random() & 0xffffff);
"""


@pytest.mark.parametrize("seed", [*SEEDS, 2**63 - 1])
def test_the_generator_is_pytorchs(script: RunScript, seed: int) -> None:
    drawn = script(UNIFORM, {"seed": str(seed), "count": 2000})
    theirs = torch.rand(2000, generator=torch.Generator().manual_seed(seed))
    assert (torch.tensor(drawn) / 2**24).tolist() == theirs.tolist()


@pytest.mark.parametrize("seed", SEEDS)
def test_noise_is_pytorchs(script: RunScript, seed: int) -> None:
    """One draw after the other, of whole blocks of 16 and not, as start noise and the steps' noise are drawn."""
    generator = torch.Generator().manual_seed(seed)
    for size, ours in zip(SIZES, script(DRAW, {"seed": str(seed), "sizes": SIZES}), strict=True):
        theirs = torch.randn(size, generator=generator).numpy()
        assert np.abs(np.array(ours) - theirs).max() < 3e-6  # where the CPU has no AVX2
        if torch.backends.cpu.get_cpu_capability().startswith("AVX"):
            assert np.array_equal(np.array(ours, dtype=np.float32), theirs)


def test_fewer_numbers_are_refused(script: RunScript) -> None:
    said = script(
        """
        const { Generator, drawNoise } = await module("noise");
        try { drawNoise(new Generator(0), 15); } catch (error) { return error.message; }
        """
    )
    assert said.startswith("15 numbers asked for")
