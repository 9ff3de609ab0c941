"""The loop's parts: order, learning rate, averages, decay, checkpoints, a polite stop."""

import dataclasses
import json
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import nn

from gobelin.errors import TrainingError
from gobelin.training.checkpoints import MANIFEST, load_checkpoint, save_checkpoint
from gobelin.training.config import DataConfig, OptimConfig
from gobelin.training.run_folder import Run, locked
from gobelin.training.train_model import train
from gobelin.training.trainer import _with_gradients, fit, learning_rate, make_optimizers
from gobelin.training.weight_average import WeightAverage

OPTIM = OptimConfig(steps=10, batch_size=3, learning_rate=0.5, warmup_steps=4, ema=0.5)


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


@dataclasses.dataclass
class Numbers:
    x: torch.Tensor

    def to(self, device):
        return self


class LineLoss(nn.Module):
    """Learn y = 3x: small enough to see everything."""

    def __init__(self, on_step):
        super().__init__()
        self.line = nn.Linear(1, 1)
        for parameter in self.parameters():
            nn.init.zeros_(parameter)
        self.on_step = on_step

    def forward(self, batch):
        self.on_step()
        return {"loss": (self.line(batch.x) - 3 * batch.x).square().mean()}


class Line:
    name, optim, lr_ratios, is_divisible = "line", OPTIM, {}, True

    def __init__(self, on_step=lambda count: None, **changes):
        self.optim = dataclasses.replace(OPTIM, **changes)
        self.count = 0
        self.evaluated = []

        def counted():
            self.count += 1
            on_step(self.count)

        self.module = LineLoss(counted)

    def __deepcopy__(self, memo):
        return self

    def batch(self, step, rows):
        return Numbers(torch.randn(self.optim.batch_size, 1, generator=torch.Generator().manual_seed(step))[rows])

    def describe(self, step):
        return f"numbers of step {step}"

    def evaluate(self, module, step, run):
        self.evaluated.append((step, module.line.weight.item()))


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


def test_the_average_is_what_comes_out(run, monkeypatch):
    stage = Line()
    last = []
    original = WeightAverage.swap
    monkeypatch.setattr(
        WeightAverage, "swap", lambda self: (last.append(stage.module.line.weight.item()), original(self))[1]
    )
    averaged = fit(stage, run)
    assert 0 < averaged.line.weight.item() < last[-1], "the weights themselves are ahead of their average"
    assert [step for step, _ in stage.evaluated] == [0, OPTIM.steps]
    assert stage.evaluated[-1][1] == averaged.line.weight.item(), "and so is what was evaluated"


def test_a_batch_in_parts_has_the_gradient_of_the_whole(run):
    whole = fit(Line(batch_size=6), dataclasses.replace(run, folder=run.folder / "whole"))
    parts = Line(batch_size=6, accumulate=3)
    torch.testing.assert_close(fit(parts, run).line.weight, whole.line.weight)
    assert parts.count == 3 * OPTIM.steps


def test_frozen_weights_have_no_average_no_state_and_are_in_no_checkpoint(run):
    stage = Line()
    stage.module.line.bias.requires_grad_(False)
    fit(stage, run)
    (file,) = (run.checkpoint_folder("line") / "step-00000010").glob("*.safetensors")
    names = load_file(file)
    assert any(name.startswith("weights.line.weight") for name in names)
    assert not any("bias" in name for name in names)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_stops_and_the_run_goes_on(run, number):
    whole = fit(Line(), dataclasses.replace(run, folder=run.folder / "whole"))
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt):
        fit(Line(on_step=lambda count: os.kill(os.getpid(), number) if count == 6 else None), run)
    assert signal.getsignal(number) is before
    assert [path.name for path in run.checkpoint_folder("line").iterdir()] == ["step-00000006"]
    rest = Line()
    resumed = fit(rest, run)
    assert rest.count == 4
    assert torch.equal(resumed.line.weight, whole.line.weight)


def test_it_trains_outside_the_main_thread_where_no_signal_can_be_caught(run):
    whole = fit(Line(), dataclasses.replace(run, folder=run.folder / "whole"))
    with ThreadPoolExecutor(1) as pool:
        averaged = pool.submit(fit, Line(), run).result()
    assert torch.equal(averaged.line.weight, whole.line.weight)


def saved(folder, step):
    save_checkpoint(folder, step, {"x": torch.full((3,), float(step)), "none": torch.tensor(step)})


def test_checkpoints_replace_each_other_only_when_whole(tmp_path, monkeypatch):
    for step in (1, 2, 3):
        saved(tmp_path, step)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000003"]

    def full_disk(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("gobelin.training.checkpoints.state_dict_saver.save", full_disk)
    with pytest.raises(TrainingError, match=r"step 4 could not be written.*the disk is full.*that of step 3 stands"):
        saved(tmp_path, 4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000003"]
    state = {"x": torch.zeros(3), "none": torch.tensor(0)}
    assert load_checkpoint(tmp_path, state) == 3
    assert state["x"].tolist() == [3, 3, 3]
    assert state["none"].item() == 3


def test_a_checkpoint_holds_no_pickle(tmp_path):
    saved(tmp_path, 1)
    assert {path.suffix for path in (tmp_path / "step-00000001").iterdir()} == {".safetensors", ".json"}


def test_a_request_in_the_last_step_stops_the_run_too(run):
    last = OPTIM.steps
    with pytest.raises(KeyboardInterrupt):
        fit(Line(on_step=lambda count: os.kill(os.getpid(), signal.SIGINT) if count == last else None), run)
    rest = Line()
    fit(rest, run)
    assert rest.count == 0


@pytest.mark.parametrize("damage", ["cut", "empty", "gone", "random", "one bit", "no manifest", "another stage"])
def test_a_damaged_checkpoint_is_named(damage, tmp_path):
    state = {"x": torch.zeros(3), "none": torch.tensor(0)}
    assert load_checkpoint(tmp_path, state) == 0
    for step in (2, 4):
        saved(tmp_path, step)
    (file,) = (tmp_path / "step-00000004").glob("*.safetensors")
    whole = file.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    contents = {"cut": whole[:-10], "empty": b"", "random": bytes(range(256)) * 40, "one bit": bytes(flipped)}
    if damage == "gone":
        file.unlink()
    elif damage == "no manifest":
        (file.parent / MANIFEST).unlink()
    elif damage == "another stage":
        state["y"] = torch.zeros(1)
    else:
        file.write_bytes(contents[damage])
    with pytest.raises(
        TrainingError, match=r"step-00000004 is damaged: remove its folder to go on from step 2"
    ) as error:
        load_checkpoint(tmp_path, state)
    assert "\n" not in str(error.value)


def test_a_second_run_in_the_folder_is_refused(tmp_path):
    with (
        locked(tmp_path / "training"),
        pytest.raises(TrainingError, match=r"another run is training in .* \(process \d+\): wait for it"),
        locked(tmp_path / "training"),
    ):
        pass
    with locked(tmp_path / "training"):
        pass


def test_batches_are_made_ahead_and_the_wait_for_them_is_measured(run):
    class Slow(Line):
        def batch(self, step, rows):
            time.sleep(0.02)
            return super().batch(step, rows)

    fit(Slow(), run)
    (line,) = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert 0.3 < line["data_wait"] <= 1, "next to nothing is computed in this stage"
    assert line["memory_mb"] > 10
    fit(Line(), dataclasses.replace(run, folder=run.folder / "fast"))


def test_an_error_in_making_a_batch_ends_the_run(run):
    class Broken(Line):
        def batch(self, step, rows):
            raise OSError("the image is gone")

    with pytest.raises(OSError, match="the image is gone"):
        fit(Broken(), run)


def test_metrics_have_each_step_once_whatever_was_killed(run, monkeypatch):
    monkeypatch.setattr("gobelin.training.trainer.LOG_EVERY", 1)
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


def test_weights_that_no_loss_depends_on_stay(run, monkeypatch):
    """In one process; several would wait for their gradients, and say so instead."""
    stage = Line(weight_decay=0.0)
    stage.module.idle = nn.Linear(1, 1)
    before = stage.module.idle.weight.item()
    assert fit(stage, run).idle.weight.item() == before
    rest = Line(weight_decay=0.0, steps=12)
    rest.module.idle = nn.Linear(1, 1)
    fit(rest, run)
    assert rest.count == 2, "and are in checkpoints"
    monkeypatch.setattr("gobelin.training.distributed.is_initialized", lambda: True)
    stage.module.zero_grad()
    with pytest.raises(TrainingError, match=r"stage line: its loss does not depend on line\.weight.*freeze it"):
        _with_gradients(stage, stage.module, run)


def test_what_a_killed_process_left_half_written_is_removed(tmp_path):
    left = ["unet/.config.json.123.tmp", ".README.md.9.tmp", "training/checkpoints/vae/.step-00000002.tmp/x"]
    kept = ["unet/config.json", ".mine.tmp", "training/checkpoints/vae/step-00000002/x"]
    for name in [*left, *kept]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    with locked(tmp_path / "training"):
        assert not any((tmp_path / name).exists() for name in left)
        assert all((tmp_path / name).exists() for name in kept)


def test_a_stage_that_was_done_when_its_run_was_killed_keeps_no_checkpoints(micro, tmp_path):
    config = micro(steps=1, data=DataConfig(count=8, validation=0), sample_every=9)
    train(config, tmp_path / "model", stage="tokenizer", console=Console(quiet=True))
    left = tmp_path / "model" / "training" / "checkpoints" / "tokenizer"
    left.mkdir(parents=True)
    train(config, tmp_path / "model", stage="tokenizer", resume=True, console=Console(quiet=True))
    assert not left.exists()
