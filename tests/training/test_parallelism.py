"""One step is one step: in one process, in two with DDP or FSDP, in parts, and resumed from one to the other."""

import contextlib
import json
import shutil

import pytest
import torch
from tests.training.in_two_processes import KINDS
from tests.training.small_stage import STEPS, Interrupted, SmallStage, fit, make_run, text_gradients
from tests.training.test_distributed import launch

from gobelin.training.checkpoints import load_checkpoint


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Averaged weights of one process, by optimizer; its runs, and what two processes make of them."""
    folder = tmp_path_factory.mktemp("runs")
    made = {}
    for optimizer in ("adamw", "muon"):
        made[optimizer] = fit(SmallStage(optimizer), make_run(folder / optimizer))
        with contextlib.suppress(Interrupted):
            fit(SmallStage(optimizer, until=2), make_run(folder / "begun"))
        for parallelism in ("ddp", "fsdp"):
            shutil.copytree(folder / "begun", folder / f"{optimizer}-{parallelism}-from-one")
        shutil.rmtree(folder / "begun")
    done = launch(2, "-m", "tests.training.in_two_processes", str(folder))
    assert done.returncode == 0, done.stderr
    return folder, made


def is_near(found, expected):
    """Equal but for the order of sums, in float64: a hundred thousandth of a step."""
    return all((found[name] - value).abs().max() < 1e-8 for name, value in expected.items())


def is_equal(found, expected):
    return all(torch.equal(found[name], value) for name, value in expected.items())


def test_two_processes_contrast_the_pairs_of_the_whole_batch(alone):
    folder, _ = alone
    whole, shared = text_gradients(slice(None)), torch.load(folder / "text-gradients.pt")
    assert whole.keys() == shared.keys()
    for name, value in whole.items():
        assert (shared[name] - value).abs().max() <= 1e-5 * value.abs().max() + 1e-6, name


def weights(run_folder):
    """The weights in the newest checkpoint, which are not averaged."""
    state = {f"weights.{name}": value.detach().clone() for name, value in SmallStage().module.named_parameters()}
    assert load_checkpoint(run_folder / "checkpoints" / "small", state) == STEPS
    return state


@pytest.mark.parametrize(("optimizer", "parallelism"), KINDS)
def test_two_processes_and_parts_of_batches_take_the_same_steps(alone, optimizer, parallelism):
    folder, made = alone
    parts = fit(SmallStage(optimizer, accumulate=2), make_run(folder / f"{optimizer}-{parallelism}-parts"))
    assert is_near(parts, made[optimizer])
    before = SmallStage().module.state_dict()
    assert not any(torch.equal(before[name], value) for name, value in made[optimizer].items())
    for name in (f"{optimizer}-{parallelism}", f"{optimizer}-{parallelism}-2"):
        assert is_near(torch.load(folder / f"{name}.pt"), made[optimizer]), name
        assert is_near(weights(folder / name), weights(folder / optimizer)), name
        assert not is_near(torch.load(folder / f"{name}.pt"), weights_by_name(folder / name)), "the average lags"


def weights_by_name(run_folder):
    return {name.removeprefix("weights."): value for name, value in weights(run_folder).items()}


@pytest.mark.parametrize(("optimizer", "parallelism"), KINDS)
def test_they_write_the_same_lines(alone, optimizer, parallelism):
    folder, _ = alone
    one, two = (
        [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
        for name in (optimizer, f"{optimizer}-{parallelism}")
    )
    for name in ("stage", "step", "lr"):
        assert [line[name] for line in two] == [line[name] for line in one]
    for name in ("loss", "grad_norm"):
        assert [line[name] for line in two] == pytest.approx([line[name] for line in one], rel=1e-6)
    assert len(one) == STEPS


@pytest.mark.parametrize(("optimizer", "parallelism"), KINDS)
def test_a_resumed_run_is_the_run_to_the_bit(alone, optimizer, parallelism):
    """In as many processes as before. Sampling at every step leaves no trace, either."""
    folder, _ = alone
    kind = f"{optimizer}-{parallelism}"
    assert is_equal(torch.load(folder / f"{kind}-resumed.pt"), torch.load(folder / f"{kind}.pt"))
    assert is_equal(weights(folder / f"{kind}-resumed"), weights(folder / kind))


@pytest.mark.parametrize(("optimizer", "parallelism"), KINDS)
def test_a_run_goes_on_with_more_or_fewer_processes_and_sharded_or_not(alone, optimizer, parallelism):
    """The steps that remain add up in another order, so that they agree to rounding."""
    folder, made = alone
    kind = f"{optimizer}-{parallelism}"
    other = "ddp" if parallelism == "fsdp" else "fsdp"
    assert is_near(torch.load(folder / f"{kind}-from-one.pt"), made[optimizer])
    assert is_near(torch.load(folder / f"{kind}-to-{other}.pt"), made[optimizer])
    assert is_near(fit(SmallStage(optimizer), make_run(folder / f"{kind}-to-one")), made[optimizer])


def test_the_average_goes_on_where_it_was(tmp_path):
    whole = fit(SmallStage(), make_run(tmp_path / "whole"))
    with contextlib.suppress(Interrupted):
        fit(SmallStage(until=2), make_run(tmp_path / "run", sample_every=1))
    assert is_equal(fit(SmallStage(), make_run(tmp_path / "run", sample_every=1)), whole)


def test_the_first_step_is_adamws(tmp_path):
    """With the bias correction of a first step: the optimizer is new."""
    stage = SmallStage()
    stage.optim = stage.optim.__class__(**{**vars(stage.optim), "steps": 1, "weight_decay": 0.0, "clip_norm": 1e9})
    before = {name: value.clone() for name, value in stage.module.state_dict().items()}
    after = fit(stage, make_run(tmp_path))
    rate = stage.optim.learning_rate / stage.optim.warmup_steps
    taken = torch.cat([((after[name] - before[name]) / rate).abs().flatten() for name in before])
    assert taken.median().item() == pytest.approx(1, abs=1e-3), "Adam's first step is the rate, whatever the gradient"
