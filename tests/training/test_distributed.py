"""Two processes on one machine: the model that one alone makes."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from gobelin.cli.train import config_to_toml
from gobelin.errors import TrainingError
from gobelin.pipeline import Pipeline
from gobelin.training.config import DataConfig
from gobelin.training.train_model import train

IN_EACH_PROCESS = """
import json, pathlib, sys, torch
from gobelin.cli.main import main
from gobelin.training import distributed

with distributed.init_process_group(torch.device("cpu")):
    rows = torch.arange(7)[distributed.shard()]
    mean = rows.float().mean()
    distributed.all_reduce_mean_([mean])
    said = [distributed.world_size(), rows.tolist(), mean.item(), distributed.all_gather_rows(10 * rows, 7).tolist(),
            distributed.broadcast("first" if distributed.is_main_process() else "other")]
    name = "first" if distributed.is_main_process() else "other"
    pathlib.Path(sys.argv[1], f"{name}.json").write_text(json.dumps(said))
    main(["train", *sys.argv[2:]])
"""


def launch(count, *arguments):
    """``torchrun`` on this machine alone."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    return subprocess.run(
        [*command, *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture
def config(micro):
    config = micro(data=DataConfig(count=16, validation=0), save_every=9, sample_every=9)
    return dataclasses.replace(
        config,
        unet=dataclasses.replace(
            config.unet,
            train_text_encoder=True,
            optim=dataclasses.replace(config.unet.optim, precision="float32", optimizer="muon"),
        ),
    )


def written(config, tmp_path):
    file = tmp_path / "micro.toml"
    file.write_text(config_to_toml(config))
    return str(file)


def test_two_processes_make_the_model_that_one_makes(config, tmp_path):
    """They take turns and tell each other; the text encoder goes on learning with the U-Net, too."""
    one, two = tmp_path / "one", tmp_path / "two"
    train(config, one, console=Console(quiet=True))
    before, after = (
        load_file(one / folder / "model.safetensors") for folder in ("training/text_encoder", "text_encoder")
    )
    assert any(not torch.equal(before[name], after[name]) for name in before)
    Pipeline.from_pretrained(one)
    script = tmp_path / "in_each_process.py"
    script.write_text(IN_EACH_PROCESS)
    done = launch(2, str(script), str(tmp_path), written(config, tmp_path), "--out", str(two))
    assert done.returncode == 0, done.stderr
    said = [json.loads((tmp_path / f"{process}.json").read_text()) for process in ("first", "other")]
    whole = [0, 10, 20, 30, 40, 50, 60]
    assert said == [[2, [0, 2, 4, 6], 3.0, whole, "first"], [2, [1, 3, 5], 3.0, whole, "first"]]
    parts = {folder: load_file(folder / "unet" / "diffusion_pytorch_model.safetensors") for folder in (one, two)}
    # AdamW divides a gradient by its own size, so where one is nearly zero its rounding becomes a small step.
    step = config.unet.optim.learning_rate
    for name, tensor in parts[one].items():
        torch.testing.assert_close(parts[two][name], tensor, rtol=0, atol=step / 20, msg=f"{name} differs")
    lines = [(folder / "training" / "metrics.jsonl").read_text().count("\n") for folder in (one, two)]
    assert lines[0] == lines[1], "both processes wrote"


def test_a_batch_that_cannot_be_shared_evenly_is_refused(config, tmp_path, monkeypatch):
    uneven = dataclasses.replace(
        config, unet=dataclasses.replace(config.unet, optim=dataclasses.replace(config.unet.optim, batch_size=5))
    )
    monkeypatch.setattr("gobelin.training.distributed.world_size", lambda: 2)
    with pytest.raises(TrainingError, match="a batch of 5 cannot be shared evenly among 2 processes"):
        train(uneven, tmp_path / "two", console=Console(quiet=True))
    assert not (tmp_path / "two").exists()
