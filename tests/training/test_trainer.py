"""The loop's parts: order, learning rate, averages, decay, checkpoints, a polite stop."""

import dataclasses
import json
import os
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from torch import nn

from gobelin.errors import TrainingError
from gobelin.training.checkpoints import CHECKPOINT_FILE, load_checkpoint, save_checkpoint
from gobelin.training.config import OptimConfig
from gobelin.training.trainer import Run, batch_indices, derive_seed, fit, learning_rate, make_optimizers

OPTIM = OptimConfig(steps=10, batch_size=3, learning_rate=0.5, warmup_steps=4, ema=0.5)


@given(dataset_size=st.integers(1, 40), batch_size=st.integers(1, 30))
def test_every_epoch_sees_every_sample_once(dataset_size, batch_size):
    steps = -(-3 * dataset_size // batch_size)
    order = torch.cat([batch_indices(5, "vae", step, batch_size, dataset_size) for step in range(steps)])
    epochs = order[: 3 * dataset_size].reshape(3, dataset_size)
    for epoch in epochs:
        assert sorted(epoch.tolist()) == list(range(dataset_size))


def test_orders_differ_by_seed_stage_and_epoch():
    first = batch_indices(0, "vae", 0, 30, 30).tolist()
    assert first == batch_indices(0, "vae", 0, 30, 30).tolist()
    for other in ((1, "vae", 0), (0, "unet", 0), (0, "vae", 1)):
        assert first != batch_indices(*other, 30, 30).tolist()


def test_seeds_fit_a_generator_and_differ():
    seeds = {
        derive_seed(seed, purpose, number) for seed in (0, 1, 2**40) for purpose in ("a", "b") for number in range(5)
    }
    assert len(seeds) == 30
    for seed in seeds:
        torch.Generator().manual_seed(seed)


def test_the_learning_rate_warms_up_and_falls_to_its_end():
    rates = [learning_rate(OPTIM, step) for step in range(10)]
    assert rates[:5] == pytest.approx([0.125, 0.25, 0.375, 0.5, 0.5])
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[-1] == pytest.approx(0.5 * 0.02)


def test_the_learning_rate_holds_before_it_falls():
    optim = dataclasses.replace(OPTIM, hold=0.7)
    rates = [learning_rate(optim, step) for step in range(10)]
    assert rates[:8] == pytest.approx([0.125, 0.25, 0.375, 0.5, 0.5, 0.5, 0.5, 0.5])
    assert rates[7] > rates[8] > rates[9] == pytest.approx(0.5 * 0.02)
    longer = dataclasses.replace(optim, steps=20)
    assert [learning_rate(longer, step) for step in range(7)] == rates[:7], "a run that holds can be made longer"


def test_rates_slow_the_parameters_they_name():
    module = nn.ModuleDict({"text": nn.Linear(2, 2), "image": nn.Linear(2, 2, bias=False)})
    (adamw,) = make_optimizers(module, OPTIM, {"text.": 0.1})
    rates = {id(p): group["lr_ratio"] for group in adamw.param_groups for p in group["params"]}
    assert {rates[id(p)] for p in module["text"].parameters()} == {0.1}
    assert {rates[id(p)] for p in module["image"].parameters()} == {1.0}
    assert len(rates) == 3


def test_only_matrices_decay():
    optim = dataclasses.replace(OPTIM, weight_decay=0.1)
    (adamw,) = make_optimizers(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)), optim)
    decay, free = adamw.param_groups
    assert [p.ndim for p in decay["params"]] == [2]
    assert [p.ndim for p in free["params"]] == [1, 1, 1]
    assert (decay["weight_decay"], free["weight_decay"]) == (0.1, 0.0)


class Line:
    """Learn y = 3x: small enough to see everything."""

    name, dataset_size, optim, lr_ratios = "line", 7, OPTIM, {}

    def __init__(self, on_step=lambda count: None):
        self.module = nn.Linear(1, 1)
        for parameter in self.module.parameters():
            nn.init.zeros_(parameter)
        self.on_step, self.count = on_step, 0

    def loss(self, indices, generator):
        self.count += 1
        self.on_step(self.count)
        x = torch.randn(len(indices), 1, generator=generator)
        return {"loss": (self.module(x) - 3 * x).square().mean()}

    def sample_grid(self, module, step):
        return None


@pytest.fixture
def run(tmp_path):
    return Run(
        folder=tmp_path,
        seed=0,
        device=torch.device("cpu"),
        save_every=100,
        sample_every=100,
        console=Console(quiet=True),
    )


def test_the_average_is_what_comes_out(run):
    stage = Line()
    averaged = fit(stage, run)
    assert averaged is not stage.module
    assert 0 < averaged.weight.item() < stage.module.weight.item()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_stops_and_the_run_goes_on(run, number):
    whole = fit(Line(), dataclasses.replace(run, folder=run.folder / "whole"))
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt):
        fit(Line(on_step=lambda count: os.kill(os.getpid(), number) if count == 6 else None), run)
    assert signal.getsignal(number) is before
    assert [path.name for path in run.checkpoint_folder(Line()).iterdir()] == ["step-00000006"]
    rest = Line()
    resumed = fit(rest, run)
    assert rest.count == 4
    assert torch.equal(resumed.weight, whole.weight)


def test_it_trains_outside_the_main_thread_where_no_signal_can_be_caught(run):
    whole = fit(Line(), dataclasses.replace(run, folder=run.folder / "whole"))
    with ThreadPoolExecutor(1) as pool:
        averaged = pool.submit(fit, Line(), run).result()
    assert torch.equal(averaged.weight, whole.weight)


def test_checkpoints_replace_each_other_only_when_whole(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, 1, {"x": torch.ones(1)})
    save_checkpoint(tmp_path, 2, {"x": torch.full((1,), 2.0)})
    save_checkpoint(tmp_path, 3, {"x": torch.full((1,), 3.0)})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000003"]

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(TrainingError, match=r"step 4 could not be written.*the disk is full.*that of step 3 stands"):
        save_checkpoint(tmp_path, 4, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000003"]
    assert load_checkpoint(tmp_path)["x"].item() == 3


def test_a_request_in_the_last_step_stops_the_run_too(run):
    last = OPTIM.steps
    with pytest.raises(KeyboardInterrupt):
        fit(Line(on_step=lambda count: os.kill(os.getpid(), signal.SIGINT) if count == last else None), run)
    rest = Line()
    fit(rest, run)
    assert rest.count == 0


@pytest.mark.parametrize("damage", ["cut", "empty", "gone", "random", "one bit"])
def test_a_damaged_checkpoint_is_named(damage, tmp_path):
    assert load_checkpoint(tmp_path) is None
    for step in (2, 4):
        save_checkpoint(tmp_path, step, {"x": torch.arange(1000)})
    file = tmp_path / "step-00000004" / CHECKPOINT_FILE
    whole = file.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    contents = {"cut": whole[:-100], "empty": b"", "random": bytes(range(256)) * 40, "one bit": bytes(flipped)}
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(contents[damage])
    with pytest.raises(
        TrainingError, match=r"step-00000004.* is damaged: remove its folder to go on from step 2"
    ) as error:
        load_checkpoint(tmp_path)
    assert "\n" not in str(error.value)
    assert "weights_only" not in str(error.value)


def test_metrics_have_each_step_once_whatever_was_killed(run, monkeypatch):
    monkeypatch.setattr("gobelin.training.trainer._LOG_EVERY", 1)
    run = dataclasses.replace(run, save_every=4)

    def killed(count):
        if count == 7:
            raise OSError("killed")

    with pytest.raises(OSError, match="killed"):
        fit(Line(on_step=killed), run)
    with (run.folder / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "other", "step": 9}\n{"stage": "li')
    fit(Line(), run)
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["stage"] == "line"] == list(range(1, OPTIM.steps + 1))
    assert sum(line["stage"] == "other" for line in lines) == 1


@pytest.mark.parametrize(
    "error",
    [RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), MemoryError()],
)
def test_a_batch_that_does_not_fit_says_what_to_lower(run, error):
    def full(count):
        raise error

    with pytest.raises(TrainingError, match=r"a batch of \d+ images does not fit into memory.*--line\.optim\.batch"):
        fit(Line(on_step=full), run)
    with pytest.raises(RuntimeError, match="else"):
        fit(Line(on_step=lambda count: (_ for _ in ()).throw(RuntimeError("else"))), run)
