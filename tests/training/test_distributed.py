"""Two processes on one machine: the model that one alone makes."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file

from gobelin.cli.train import config_to_toml
from gobelin.errors import TrainingError
from gobelin.pipeline import Pipeline
from gobelin.training.config import DataConfig
from gobelin.training.run_folder import locked
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


SLOW_TO_BEGIN = """
import time
from datetime import timedelta
from pathlib import Path

import torch

from gobelin.training import distributed

distributed._TIMEOUT = timedelta(seconds=3)
for _ in range(2):  # as of two calls of train() in one process
    with distributed.init_process_group(torch.device("cpu")):
        if distributed.is_main_process():
            time.sleep(6)
        distributed.wait_for_main()
        assert distributed.broadcast(distributed.is_main_process())
    names = [task.joinpath("comm").read_text().strip() for task in Path("/proc/self/task").glob("*")]
    assert not [name for name in names if "gloo" in name], names
"""


def torchrun(count, *arguments, restarts=0):
    """``torchrun`` on this machine alone."""
    options = ["--standalone", f"--nproc-per-node={count}", f"--max-restarts={restarts}"]
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *options, *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def launch(count, *arguments, restarts=0):
    """Run ``torchrun`` to its end."""
    run = torchrun(count, *arguments, restarts=restarts)
    said, errors = run.communicate(timeout=600)
    return subprocess.CompletedProcess(run.args, run.returncode, said, errors)


def sentences(errors):
    """What the processes said, and not ``torchrun``."""
    assert "/gobelin/" not in errors, errors  # a traceback of ours; torchrun has one of its own
    return [line for line in errors.splitlines() if line.startswith("gobelin: ")]


def test_processes_wait_for_the_main_one_however_long_it_takes(tmp_path):
    """A million images are looked at for longer than a step is waited for; no thread of the group is left to abort."""
    (tmp_path / "script.py").write_text(SLOW_TO_BEGIN)
    done = launch(2, str(tmp_path / "script.py"))
    assert done.returncode == 0, done.stderr


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
    texts = [load_file(folder / "training" / "text_encoder" / "model.safetensors") for folder in (one, two)]
    step = config.text.optim.learning_rate
    for name, tensor in texts[0].items():
        torch.testing.assert_close(texts[1][name], tensor, rtol=0, atol=step / 20, msg=f"{name} differs")
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


IN_A_BAD_PROCESS = """
import os, signal, sys, time
import torch
from gobelin.cli.main import main
from gobelin.data.batches import Order
from gobelin.training import trainer

how, *arguments = sys.argv[1:]
rank, is_first = int(os.environ["RANK"]), os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
indices = Order.indices

def at_step(self, step):
    if self.stage == "unet" and step == 3 and is_first:
        if how == "killed" and rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "not a number":
            self.__dict__["seed"] = 7
        if how == "stuck":
            print("stuck", flush=True)
            time.sleep(3600 if rank == 1 else 0)
    return indices(self, step)

Order.indices = at_step
if how == "not a number":
    clip = torch.nn.utils.clip_grad_norm_
    torch.nn.utils.clip_grad_norm_ = lambda *given: clip(*given) * float("nan")
main(["train", *arguments])
"""


@pytest.fixture
def bad(tmp_path):
    script = tmp_path / "bad.py"
    script.write_text(IN_A_BAD_PROCESS)
    return str(script)


def small(config):
    """Few samples, and a checkpoint at every other step."""
    unet = dataclasses.replace(config.unet, train_text_encoder=False)
    return dataclasses.replace(config, unet=unet, samples=1, save_every=2)


@pytest.mark.slow  # it waits for torchrun to notice
def test_a_killed_process_is_started_again_and_the_run_goes_on_by_itself(config, tmp_path, bad):
    file, out = written(small(config), tmp_path), tmp_path / "out"
    done = launch(2, bad, "killed", file, "--out", str(out), "--parallelism", "fsdp", restarts=1)
    assert done.returncode == 0, done.stderr
    (said,) = sentences(done.stderr)
    assert "lost the others" in said or "interrupted" in said, "torchrun ends the others, if they do not see it first"
    whole = train(small(config), tmp_path / "whole", console=Console(quiet=True))
    parts = [load_file(one / "unet" / "diffusion_pytorch_model.safetensors") for one in (out, whole)]
    for name, tensor in parts[1].items():
        torch.testing.assert_close(parts[0][name], tensor, rtol=0, atol=config.unet.optim.learning_rate / 20, msg=name)
    again = launch(2, bad, "well", file, "--out", str(out), restarts=1)
    assert again.returncode != 0, "a run of another launch is not gone on with unasked"
    assert all("holds a training run: add --resume" in line for line in sentences(again.stderr))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ("in use", "another run is training in"),
        ("no data", "no folder at"),
        ("uneven", "a batch of 5 cannot be shared evenly among 2 processes"),
        ("not a number", "stage text_encoder, step 0, images"),
        ("unwritable", "Permission denied" if os.getuid() else "is a file"),
    ],
)
def test_an_error_is_said_once_and_ends_all_processes(config, tmp_path, bad, what, expected):
    out, options = tmp_path / "out", []
    config = small(config)
    if what == "no data":
        config = dataclasses.replace(config, data=DataConfig(path=str(tmp_path / "nowhere")))
    if what == "uneven":
        options = ["--unet.optim.batch-size", "5"]
    if what == "unwritable":
        out.write_text("dear")
    how = what if what == "not a number" else "well"
    with locked(out / "training") if what == "in use" else nullcontext():
        done = launch(2, bad, how, written(config, tmp_path), "--out", str(out), *options)
    assert done.returncode != 0
    assert len(sentences(done.stderr)) == 1, done.stderr
    assert expected in sentences(done.stderr)[0]
    if what in ("no data", "uneven"):
        assert not out.exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_torchrun_saves_also_while_a_process_waits_for_data(config, tmp_path, bad, number):
    file, out = written(small(config), tmp_path), tmp_path / "out"
    run = torchrun(2, bad, "stuck", file, "--out", str(out))
    assert run.stdout is not None
    while "stuck" not in run.stdout.readline():
        assert run.poll() is None
    while not (out / "training" / "checkpoints" / "unet" / "step-00000002").exists():
        assert run.poll() is None
        time.sleep(0.1)
    run.send_signal(number)
    _, errors = run.communicate(timeout=600)
    saved = sorted(path.name for path in (out / "training" / "checkpoints" / "unet").iterdir())
    assert saved[-1] == "step-00000003", errors
    command = f"torchrun --nproc-per-node 2 -m gobelin train --out {out} --resume"
    assert errors.count(f"vae, unet at step 3; go on with: {command}") == 1, errors


@pytest.mark.slow
def test_an_odd_number_of_images_of_which_one_is_damaged_hangs_nobody(config, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for number in range(7):
        Image.new("RGB", (20, 20), (30 * number, 0, 0)).save(data / f"{number}.png")
        (data / f"{number}.txt").write_text(f"number {number}")
    (data / "3.png").write_bytes((data / "3.png").read_bytes()[:40])
    config = dataclasses.replace(small(config), data=DataConfig(path=str(data), size=32), parallelism="fsdp")
    out = tmp_path / "out"
    done = launch(2, "-m", "gobelin", "train", written(config, tmp_path), "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert "6 captioned images" in (out / "README.md").read_text()
