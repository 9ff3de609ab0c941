"""Two processes on one machine: the model that one alone makes."""

import dataclasses
import os
import subprocess
import sys

import pytest
import tomli_w
import torch
from rich.console import Console
from safetensors.torch import load_file

from gobelin.cli.train import without_none
from gobelin.training.run import train


def launch(count, *arguments):
    """``torchrun`` on this machine alone."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    return subprocess.run(
        [*command, "-m", "gobelin", "train", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


@pytest.fixture
def config(micro):
    config = micro()
    return dataclasses.replace(
        config,
        unet=dataclasses.replace(
            config.unet, optim=dataclasses.replace(config.unet.optim, precision="float32", optimizer="muon")
        ),
    )


def written(config, tmp_path):
    file = tmp_path / "micro.toml"
    file.write_text(tomli_w.dumps(without_none(dataclasses.asdict(config))))
    return str(file)


def test_two_processes_make_the_model_that_one_makes(config, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    train(config, one, console=Console(quiet=True))
    done = launch(2, written(config, tmp_path), "--out", str(two))
    assert done.returncode == 0, done.stderr
    parts = {folder: load_file(folder / "unet" / "diffusion_pytorch_model.safetensors") for folder in (one, two)}
    for name, tensor in parts[one].items():
        torch.testing.assert_close(parts[two][name], tensor, rtol=1e-3, atol=1e-5, msg=f"{name} differs")
    lines = [(folder / "training" / "metrics.jsonl").read_text().count("\n") for folder in (one, two)]
    assert lines[0] == lines[1], "both processes wrote"


def test_a_batch_that_cannot_be_shared_evenly_is_refused(config, tmp_path):
    uneven = dataclasses.replace(
        config, unet=dataclasses.replace(config.unet, optim=dataclasses.replace(config.unet.optim, batch_size=5))
    )
    done = launch(2, written(uneven, tmp_path), "--out", str(tmp_path / "two"))
    assert done.returncode != 0
    assert "a batch of 5 cannot be shared evenly among 2 processes" in done.stderr
