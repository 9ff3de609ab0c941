"""A request to stop, by Ctrl-C or SIGTERM, at any moment: saved and gone, and the command that goes on is said."""

import dataclasses
import io
import json
import os
import pkgutil
import signal
import threading
import time

import pytest
import torch
from rich.console import Console
from tests.training.small_stage import make_run
from tests.training.test_trainer import OPTIM, Line

from gobelin.training.config import DataConfig
from gobelin.training.train_model import train
from gobelin.training.trainer import fit


@pytest.fixture
def run(tmp_path):
    return dataclasses.replace(make_run(tmp_path), save_every=100)


def test_a_request_ends_a_wait_for_data_and_what_is_trained_is_saved(run):
    """Before the data comes: it is let go only when the checkpoint stands."""
    arrives, waits = threading.Event(), []

    class Stuck(Line):
        def batch(self, step, rows):
            if step == 5:
                threading.Thread(target=self.stop, daemon=True).start()
                waits.append(arrives.wait(20))
            return super().batch(step, rows)

        def stop(self):
            while self.count < 5:
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGTERM)
            while not (run.checkpoint_folder("line") / "step-00000005").exists():
                time.sleep(0.01)
            arrives.set()

    with pytest.raises(KeyboardInterrupt):
        fit(Stuck(), run)
    assert waits == [True]
    whole = fit(Line(), dataclasses.replace(run, folder=run.folder / "whole"))
    assert torch.equal(fit(Line(), run).line.weight, whole.line.weight)


@pytest.mark.parametrize("at", [0, 4, OPTIM.steps])
def test_a_request_ends_an_evaluation_which_is_made_when_training_goes_on(run, at):
    run = dataclasses.replace(run, sample_every=4)

    class Slow(Line):
        def evaluate(self, module, step, run):
            run.log("line", {"step": step}, "validation.jsonl")
            if step == at:
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(60)
            super().evaluate(module, step, run)

    stopped = Slow()
    with pytest.raises(KeyboardInterrupt):
        fit(stopped, run)
    assert at not in dict(stopped.evaluated)

    class Logged(Line):
        def evaluate(self, module, step, run):
            run.log("line", {"step": step}, "validation.jsonl")

    fit(Logged(), run)
    lines = [json.loads(line)["step"] for line in (run.folder / "validation.jsonl").read_text().splitlines()]
    assert lines == [0, 4, 8, 10]


@pytest.mark.parametrize(
    ("where", "number"), [("reads", signal.SIGTERM), ("encodes", signal.SIGTERM), ("trains", signal.SIGINT)]
)
def test_a_signal_is_answered_with_the_command_that_goes_on(micro, tmp_path, monkeypatch, number, where):
    places = {
        "reads": ("gobelin.training.recipes.recipe.CachedDataset", "__len__", None),
        "encodes": ("gobelin.training.recipes.recipe.LatentCache", "fill", None),
        "trains": ("gobelin.training.stages.VAEStage", "batch", 1),
    }
    owner, name, step = places[where]
    original = getattr(pkgutil.resolve_name(owner), name)

    def signalled(self, *given):
        if step is None or given[0] == step:
            os.kill(os.getpid(), number)
        return original(self, *given)

    monkeypatch.setattr(f"{owner}.{name}", signalled)
    said = io.StringIO()
    out = tmp_path / "my model"
    config = micro(steps=2, data=DataConfig(count=8, validation=0), sample_every=9, save_every=1)
    with pytest.raises(KeyboardInterrupt):
        train(config, out, console=Console(file=said, width=40))
    saved = {"reads": "nothing", "encodes": "tokenizer, text_encoder, vae", "trains": "tokenizer, text_encoder"}[where]
    assert f"stopped: saved so far: {saved}" in said.getvalue()
    assert f"go on with: gobelin train --out '{out}' --resume\n" in said.getvalue()
