"""``gobelin train`` as it is typed: presets and files, what is refused in one sentence, and the help."""

import json
import tomllib
from pathlib import Path

import pytest
from PIL import Image

from gobelin.training import TRAINING_PRESETS

QUICK = ("--samples", 0, "--device", "cpu", "--unet.optim.steps", 1, "--unet.optim.batch-size", 1)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(3):
        Image.new("RGB", (64, 64), (80 * number, 0, 0)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"number {number}")
    return folder


@pytest.mark.parametrize("preset", TRAINING_PRESETS)
def test_the_configuration_of_every_preset_goes_through_a_file(gobelin, tmp_path, preset):
    status, printed, err = gobelin("train", "--preset", preset, "--print-config", "--seed", 7)
    assert (status, err) == (0, "")
    (tmp_path / "mine.toml").write_text(printed)
    assert gobelin("train", tmp_path / "mine.toml", "--print-config") == (0, printed, "")
    assert tomllib.loads(printed)["seed"] == 7


def test_a_short_file_of_a_method_starts_from_its_preset(gobelin, tmp_path):
    (tmp_path / "mine.toml").write_text('method = "adapter"\n[adapter]\nrank = 3\n')
    _, printed, _ = gobelin("train", tmp_path / "mine.toml", "--print-config", "--adapter.alpha", 2)
    _, expected, _ = gobelin("train", "--preset", "lora", "--print-config", "--adapter.rank", 3, "--adapter.alpha", 2)
    assert printed == expected


@pytest.mark.parametrize("preset", ["nano", "lora"])
def test_the_help_is_in_plain_words(gobelin, monkeypatch, preset):
    monkeypatch.setenv("COLUMNS", "110")
    status, out, err = gobelin("train", "--preset", preset, "--help")
    assert (status, err) == (0, "")
    assert max(map(len, out.splitlines())) <= 120
    for internal in ("Config", "TrainFrom", "dataclass", "<class", "_config", "config."):
        assert internal not in out
    options = out[out.index("usage:") :]
    places = [options.index(name) for name in ("--out PATH", "--seed INT", "--unet.optim.steps")]
    assert places == sorted(places), "the command's own come first"
    assert ("--adapter.rank INT" in out) == ("--model TEXT" in out) == (preset == "lora")
    assert ("--tokenizer.vocab-size INT" in out) == (preset == "nano")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("stepz = 3", "unknown key 'stepz': the choices are"),
        ("[unet.optim]\nstep = 3", "unknown key 'step': did you mean 'steps'?"),
        ("[unet.optim]\nsteps = 'many'", "steps is 'many': give a whole number of 1 or more"),
        ("[unet.optim]\nlearning_rate = -1", "learning_rate is -1.0: give a number above 0"),
        ("unet = 3", "unet is 3, expected a table [unet]"),
        ("[tokenizer]\nvocab_size = 600", "unknown key 'tokenizer': training from scratch has it, with --preset nano"),
        ("method = 'dora'", "method is 'dora': give one of 'full', 'adapter'"),
        ("method = 3", "method is 3"),
        ("[data]\nsize = 40", "size is 40: give a multiple of 16"),
        ("[data", "cannot be read"),
    ],
)
def test_mistakes_in_a_file_are_said_in_a_sentence(refused, tmp_path, text, sentence):
    (tmp_path / "mine.toml").write_text(f"model = 'any'\n{text}\n" if "method" not in text else text)
    _, said = refused("train", tmp_path / "mine.toml", "--print-config")
    assert str(tmp_path / "mine.toml") in said
    assert sentence in said


def test_a_file_for_training_from_a_model_needs_no_preset_from_scratch(refused, tmp_path):
    (tmp_path / "mine.toml").write_text("method = 'adapter'\n")
    _, said = refused("train", tmp_path / "mine.toml", "--preset", "nano", "--print-config")
    assert said.endswith("unknown key 'method': training from a model has it, with a preset such as --preset finetune")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--preset huge", "unknown preset 'huge': the choices are nano"),
        ("--preset lora", "no folder to write to: say --out DIR"),
        ("--preset emoji --out a", "emoji-set/train, which is not here: gobelin data emoji --out emoji-set writes it"),
        ("--preset lora --out a --out b", "--out is given twice: give it once"),
        ("--preset lora --tokenizer.vocab-size 600", "unknown option --tokenizer.vocab-size"),
        ("--adapter.rank 3", "unknown option --adapter.rank"),
        ("--preset lora --adapter.rnak 3", "unknown option --adapter.rnak: did you mean --adapter.rank?"),
        ("--preset lora --unet.optim.betas 2 3 --print-config", "betas"),
        ("--preset lora --vae.l1 3 --print-config", "vae.l1 is 3.0 and would have no effect, as the method is adapter"),
        ("--data.path x --data.count 5 --print-config", "data.count is 5 and would have no effect, as images are read"),
        ("--preset vae --unet.optim.steps 5 --print-config", "unet.optim.steps is 5 and would have no effect"),
        ("--preset lora --stage vae --out a", "unknown stage 'vae': the choices are unet"),
        ("--preset vae --stage unet --out a", "unknown stage 'unet': the choices are vae"),
    ],
)
def test_mistakes_in_options_are_said_in_a_sentence(refused, tmp_path, monkeypatch, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    _, said = refused("train", *arguments.split())
    assert sentence in said
    assert not list(tmp_path.iterdir())


def test_a_run_is_resumed_without_a_preset_and_not_with_another(gobelin, refused, images, tmp_path):
    """The harmless settings may be others; a file's values count at a resumed run too."""
    out = tmp_path / "run"
    status, printed, err = gobelin("train", "--preset", "lora", "--data.path", images, "--out", out, *QUICK)
    assert status == 0, err
    assert printed.strip() == str(out)
    status, _, err = gobelin("train", "--out", out, "--resume", "--save-every", 9)
    assert status == 0, err
    assert json.loads((out / "training" / "config.json").read_text())["save_every"] == 9
    assert gobelin("train", "--preset", "lora", "--out", out, "--resume")[0] == 0
    _, said = refused("train", "--preset", "nano", "--out", out, "--resume")
    assert (
        said == f"--preset is nano, and the run in {out} trains from a model, by the method adapter: leave out --preset"
    )
    _, said = refused("train", "--preset", "finetune", "--out", out, "--resume")
    assert said.startswith("--preset is finetune, and the run in")
    (tmp_path / "mine.toml").write_text("[adapter]\nrank = 5\n")
    status, _, err = gobelin("train", tmp_path / "mine.toml", "--out", out, "--resume")
    assert status == 1
    assert "has another configuration: adapter.rank was 16 and is 5" in err
