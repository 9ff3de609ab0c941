"""The command line as a whole: start, help, and mistakes."""

import subprocess
import sys

import pytest

from gobelin.cli.main import COMMANDS

HEAVY = ("torch", "numpy", "PIL", "pydantic", "tyro", "rich")


@pytest.mark.parametrize("code", ["import gobelin", "from gobelin.cli.main import main; main(['--help'])"])
def test_the_package_and_its_help_import_nothing_heavy(code):
    check = f"import sys\n{code}\nheavy = set({HEAVY}) & set(sys.modules)\nassert not heavy, heavy"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_help_lists_every_command(gobelin):
    status, out, _ = gobelin("--help")
    assert status == 0
    assert gobelin() == (0, out, "")
    for command in COMMANDS:
        assert f"  {command} " in out


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_examples_in_plain_words(gobelin, command):
    status, out, _ = gobelin(command, "--help")
    assert status == 0
    assert f"gobelin {command}" in out.split("xamples:")[1]
    assert "None" not in out
    assert "default: )" not in out


def test_options_stand_in_groups(gobelin, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    _, out, _ = gobelin("edit", "--help")
    places = [out.index(f" {title} ") for title in ("options", "edit options", "image options", "model options")]
    assert places == sorted(places)
    groups = [out[start:end] for start, end in zip(places, [*places[1:], None], strict=True)]
    for group, option in zip(groups, ("--to", "--self-replace", "--seed", "--lora"), strict=True):
        assert f" {option} " in group
    assert max(map(len, out.splitlines())) <= 120


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("paint", "unknown command 'paint': the choices are generate, look, edit, train"),
        ("generat", "unknown command 'generat': did you mean 'generate'?"),
        # unknown
        ("generate x --stepz 7", "unknown option --stepz: did you mean --steps?"),
        ("generate x --negative y", "unknown option --negative: did you mean --negative-prompt?"),
        ("generate x --init_image y", "unknown option --init_image: did you mean --init-image?"),
        ("generate x --no-maps", "unknown option --no-maps: did you mean --maps?"),
        ("generate x --brush 7", "unknown option --brush: see gobelin generate --help"),
        ("generate x -s 7", "unknown option -s: see gobelin generate --help"),
        ("generate --stepz=7 x", "unknown option --stepz: did you mean --steps?"),
        ("look x --word y", "unknown option --word: did you mean --words?"),
        ("edit x --too y", "unknown option --too: did you mean --to?"),
        ("train --unet.optim.stepz 7", "unknown option --unet.optim.stepz: did you mean --unet.optim.steps?"),
        ("train --caption-dropout 0", "unknown option --caption-dropout: did you mean --unet.caption-dropout?"),
        ("evaluate scenes --limt 7", "unknown option --limt: did you mean --limit?"),
        ("verify x --againts y", "unknown option --againts: did you mean --against?"),
        ("convert x y --dtyp float16", "unknown option --dtyp: did you mean --dtype?"),
        ("show sd15 --hight 64", "unknown option --hight: did you mean --height?"),
        ("data scenes --cont 7", "unknown option --cont: did you mean --count?"),
        # of the wrong type, or out of range
        ("generate x --steps abc", "--steps is 'abc': give a whole number from 1 to 1000"),
        ("generate x --steps=abc", "--steps is 'abc': give a whole number from 1 to 1000"),
        ("generate x --steps=", "--steps is '': give a whole number from 1 to 1000"),
        ("generate x --steps 2.5", "--steps is '2.5': give a whole number from 1 to 1000"),
        ("generate x --steps -5", "--steps is -5: give a whole number from 1 to 1000"),
        ("generate x --steps 0", "--steps is 0: give a whole number from 1 to 1000"),
        ("generate x --seed -1", "seed is -1: give a whole number of 0 or more"),
        ("generate x --seed x", "--seed is 'x': give a whole number"),
        ("generate x --count 0", "--count is 0: give a whole number from 1 to"),
        ("generate x --height 0", "--height is 0: give a whole number of 1 or more"),
        ("generate x --guidance inf", "--guidance is inf: give a number"),
        ("generate x --guidance -nan", "--guidance is nan: give a number"),
        ("generate x --weights webui", "--weights is 'webui': give one of 'a1111', 'comfyui', 'none'"),
        ("generate x --dtype float8", "--dtype is 'float8': give one of 'auto', 'float32', 'bfloat16', 'float16'"),
        ("generate x --sampler magic", "unknown sampler 'magic': the choices are ddpm, ddim"),
        ("generate x --sampler eular", "unknown sampler 'eular': did you mean 'euler'?"),
        ("look x --per word", "--per is 'word': give one of 'step', 'layer', 'head'"),
        ("look x --at 3 y", "--at is (3, 'y'): give 2 values, each a whole number"),
        ("train --unet.optim.steps x", "--unet.optim.steps is 'x': give a whole number"),
        ("train --vae.preset huge", "--vae.preset is 'huge': give one of 'nano', 'tiny', 'small', 'sd15'"),
        ("evaluate scenes --limit x", "--limit is 'x': give a whole number"),
        ("show sd15 --height x", "--height is 'x': give a whole number"),
        ("data scenes --out x --count x", "--count is 'x': give a whole number"),
        # without a value, or with one too many
        ("generate x --steps", "--steps has no value: give a whole number from 1 to 1000"),
        ("generate x --steps --seed 3", "--steps has no value: give a whole number from 1 to 1000"),
        ("generate x --out", "--out has no value: give PATH ("),
        ("look x --at 3", "--at has 3 alone: give 2 values, each a whole number"),
        ("look x --words", "--words has no value: give TEXT … ("),
        ("edit x --to", "--to has no value: give TEXT ("),
        ("edit x --to y --reweight", "--reweight has no value: give WORD=NUMBER, as in red=2"),
        ("generate x --maps=yes", "--maps takes no value: leave out 'yes'"),
        # twice, missing, too many
        ("generate x --steps 3 --steps 4", "--steps is given twice: give it once"),
        ("generate x --maps --maps", "--maps is given twice: give it once"),
        ("generate", "no prompt given: put what to paint first, as in gobelin generate"),
        ("generate --lora x.safetensors y", "no prompt given: put what to paint first, as in gobelin generate"),
        ("edit x", "--to is missing: give TEXT ("),
        ("edit --to y", "PROMPT is missing: give TEXT ("),
        ("look", "SOURCE is missing: give TEXT ("),
        ("convert x", "TARGET is missing: give PATH ("),
        ("verify", "MODEL is missing: give TEXT ("),
        ("data scenes", "--out is missing: give PATH ("),
        ("data check", "FOLDER is missing: give PATH ("),
        ("look a red circle", "'red' is one argument too many: put several words in quotes"),
        ("edit a red --to y", "'red' is one argument too many: put several words in quotes"),
        ("edit --to y a red", "'red' is one argument too many: put several words in quotes"),
        ("convert x y z", "'z' is one argument too many"),
        ("show sd15 sd15", "'sd15' is one argument too many"),
    ],
)
def test_mistakes_get_one_sentence(refused, tmp_path, monkeypatch, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    status, said = refused(*arguments.split())
    assert said.startswith(sentence)
    assert status == 2
    assert not list(tmp_path.iterdir()), "nothing is written"


@pytest.mark.parametrize("arguments", [["generate", "  "], ["generate", ""]])
def test_an_empty_prompt_is_refused(refused, arguments):
    assert refused(*arguments) == (2, "the prompt is empty: say in a few words what to paint")


def test_devices_that_are_not_there_are_refused(refused):
    for device in ("abacus", "cpu:x"):
        status, sentence = refused("generate", "x", "--device", device)
        assert status == 2
        assert f"unknown device '{device}'" in sentence
