"""Trackers: what is sent to them arrives, and what is missing is said in a sentence."""

import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from gobelin.errors import TrainingError, UsageError
from gobelin.training.trackers import open_tracker

CONFIG = {"seed": 3, "unet": {"steps": 5}, "words": ("a", "<b>")}


@pytest.fixture
def sheet(tmp_path):
    file = tmp_path / "unet-000050.png"
    levels = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    Image.fromarray(levels).save(file)
    return file


def track(name, folder, sheet, step=50):
    tracker = open_tracker(name, folder, CONFIG)
    tracker.log("vae", step + 50, {"loss": 0.5, "kl": 7.0})
    tracker.log("unet", step, {"loss": 0.25})
    tracker.image("unet", step, sheet)
    tracker.close()


def test_none_tracks_nothing(tmp_path, sheet):
    track("none", tmp_path / "run", sheet)
    assert not (tmp_path / "run").exists()


def test_tensorboard_reads_back_what_was_sent(tmp_path, sheet):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    track("tensorboard", tmp_path / "run", sheet)
    track("tensorboard", tmp_path / "run", sheet, step=100)  # a run that is resumed
    events = accumulator.EventAccumulator(str(tmp_path / "run" / "training" / "tensorboard"))
    events.Reload()
    tags = events.Tags()
    assert set(tags["scalars"]) == {"vae/loss", "vae/kl", "unet/loss"}
    assert [(one.step, one.value) for one in events.Scalars("unet/loss")] == [(50, 0.25), (100, 0.25)]
    assert [(one.step, one.value) for one in events.Scalars("vae/kl")] == [(100, 7.0), (150, 7.0)]
    image = events.Images("unet/samples")[0]
    (tmp_path / "back.png").write_bytes(image.encoded_image_string)
    with Image.open(tmp_path / "back.png") as back, Image.open(sheet) as sent:
        assert np.array_equal(np.asarray(back.convert("RGB")), np.asarray(sent))
    assert "config/text_summary" in tags["tensors"]
    assert '"seed": 3' in events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()


def test_tensorboard_takes_losses_that_are_no_numbers(tmp_path):
    pytest.importorskip("tensorboard")
    tracker = open_tracker("tensorboard", tmp_path, {})
    tracker.log("unet", 1, {"loss": float("nan"), "grad_norm": float("inf")})
    tracker.close()


class FakeRun:
    def __init__(self, sent):
        self.sent = sent

    def log(self, values):
        self.sent.append(values)

    def define_metric(self, name, step_metric):
        self.sent.append((name, step_metric))

    def finish(self):
        self.sent.append("finished")


def fake(name, begin=lambda **options: None):
    """A module with the part of wandb's interface that is used; gives back what it was sent."""
    sent = []

    def init(**options):
        begin(**options)
        sent.append(options)
        return FakeRun(sent)

    module = ModuleType(name)
    module.__dict__.update(init=init, Image=lambda path: SimpleNamespace(path=path))
    return module, sent


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_steps_of_stages_are_sent_beside_their_numbers(tmp_path, sheet, monkeypatch, name):
    module, sent = fake(name)
    monkeypatch.setitem(sys.modules, name, module)
    track(name, tmp_path / "tapestry", sheet)
    options = sent[0]
    assert (options["project"], options["name"], options["config"]) == ("gobelin", "tapestry", CONFIG)
    lines = [one for one in sent[1:-1] if isinstance(one, dict)]
    assert lines[:2] == [{"vae/step": 100, "vae/loss": 0.5, "vae/kl": 7.0}, {"unet/step": 50, "unet/loss": 0.25}]
    assert (lines[2]["unet/step"], lines[2]["unet/samples"].path) == (50, str(sheet))
    assert sent[-1] == "finished"
    axes = [one for one in sent if isinstance(one, tuple)]
    assert axes == ([("vae/*", "vae/step"), ("unet/*", "unet/step")] if name == "wandb" else [])


def test_a_resumed_run_goes_on_as_the_same_run_of_wandb(tmp_path, monkeypatch):
    module, sent = fake("wandb")
    monkeypatch.setitem(sys.modules, "wandb", module)
    for folder in ("a", "a", "b"):
        open_tracker("wandb", tmp_path / folder, CONFIG)
    first, second, other = (options["id"] for options in sent)
    assert first == second != other


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_service_that_does_not_answer_is_said_in_a_sentence(tmp_path, monkeypatch, name):
    def begin(**_):
        raise RuntimeError("no API key\nand many more lines")

    monkeypatch.setitem(sys.modules, name, fake(name, begin)[0])
    with pytest.raises(TrainingError, match=rf"the tracker {name} cannot start \(no API key\): log in to it, or train"):
        open_tracker(name, tmp_path, CONFIG)


@pytest.mark.parametrize(
    ("name", "module"),
    [("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb"), ("trackio", "trackio")],
)
def test_a_missing_package_is_named_with_its_command(tmp_path, monkeypatch, name, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(TrainingError, match=rf"^to track with {name}, pip install 'gobelin\[{name}\]'$"):
        open_tracker(name, tmp_path, CONFIG)


def test_an_unknown_tracker_is_refused(tmp_path):
    import jaxtyping

    jaxtyping.config.update("jaxtyping_disable", True)  # its own check is to be seen
    with pytest.raises(UsageError, match="the tracker is 'mlflow': give one of none, tensorboard, wandb, trackio"):
        open_tracker("mlflow", tmp_path, CONFIG)


def test_wandb_writes_offline(tmp_path, sheet, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    track("wandb", tmp_path / "tapestry", sheet)
    (folder,) = (tmp_path / "tapestry" / "training" / "wandb").glob("offline-run-*")
    assert len(list(folder.glob("*.wandb"))) == 1
    assert len(list(folder.rglob("samples_*.png"))) == 1


def test_trackio_writes_to_its_folder(tmp_path, sheet, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio")
    track("trackio", tmp_path / "tapestry", sheet)
    assert list((tmp_path / "trackio").glob("gobelin*.db"))
