"""Start-up: what help, mistakes and opening a model do without ("What a start waits for", docs/decisions.md)."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gobelin.cli.main import COMMANDS, command_module
from gobelin.training import TRAINING_PRESETS

MISTAKES = {
    "generate x --stepz 7": "unknown option --stepz: did you mean --steps?",
    "generate x --steps 0": "--steps is 0: give a whole number from 1 to 1000",
    "look": "SOURCE is missing",
    "edit x": "--to is missing",
    "train --unet.optim.steps x": "--unet.optim.steps is 'x'",
    "train --preset huge": "unknown preset 'huge'",
    "train": "no folder to write to",
    "evaluate scens": "unknown measurement 'scens'",
    "verify": "MODEL is missing",
    "convert folder model.ckpt": "model.ckpt would be a .ckpt file",
    "serve --port x": "--port is 'x'",
    "serve --lora-dir x": "the LoRAs of one prompt would change the model for everybody",
    "page": "--out is missing",
    "data check": "FOLDER is missing",
    "data chek": "unknown action 'chek'",
}
_RUN_WITHOUT_TORCH = """
import contextlib, io, json, sys

class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            raise ImportError("PyTorch is imported")

sys.meta_path.insert(0, NoTorch())
from gobelin.cli.main import main
answers = []
for arguments in json.load(sys.stdin):
    said, status = io.StringIO(), 0
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            main(arguments)
        except SystemExit as leaving:
            status = leaving.code or 0
        except ImportError as error:
            status = repr(error)
    answers.append([status, said.getvalue()])
json.dump(answers, sys.stdout)
"""


def helps() -> Iterator[list[str]]:
    """List the ways to ask for help: of every command, of its actions, and of every preset."""
    yield from ([], ["--help"], ["--version"])
    for command in COMMANDS:
        yield [command, "--help"]
        module = command_module(command)
        for action in (*getattr(module, "_ACTIONS", ()), *getattr(module, "_MEASUREMENTS", ())):
            yield [command, action, "--help"]
    for preset in TRAINING_PRESETS:
        yield ["train", "--preset", preset, "--help"]


@pytest.fixture(scope="module")
def without_torch() -> dict[str, tuple[int | str, str]]:
    """What every help and every mistake answers, (status, text), where PyTorch cannot be imported."""
    lines = [*helps(), *(mistake.split() for mistake in MISTAKES)]
    done = subprocess.run(
        [sys.executable, "-c", _RUN_WITHOUT_TORCH], input=json.dumps(lines), capture_output=True, text=True, check=True
    )
    return {" ".join(line): tuple(answer) for line, answer in zip(lines, json.loads(done.stdout), strict=True)}


@pytest.mark.parametrize("arguments", [" ".join(one) for one in helps()])
def test_help_does_without_torch(without_torch: dict[str, Any], arguments: str) -> None:
    status, said = without_torch[arguments]
    assert status == 0, said
    assert "usage: gobelin" in said or arguments == "--version"


@pytest.mark.parametrize("arguments", MISTAKES)
def test_mistakes_are_said_without_torch(without_torch: dict[str, Any], arguments: str) -> None:
    status, said = without_torch[arguments]
    assert status == 2, said
    assert said.startswith(f"gobelin: {MISTAKES[arguments]}")


def test_a_model_is_opened_and_paints_without_the_compiler(tmp_path: Path) -> None:
    command = ["generate", "a red circle", "--steps", "1", "--out", str(tmp_path)]
    code = (
        f"import json, sys\nfrom gobelin.cli.main import main\nmain({command})\njson.dump([*sys.modules], sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(json.loads(done.stderr))
    assert {"torch", "gobelin.vae"} <= loaded
    assert not loaded & {"torch._dynamo", "torch._inductor", "sympy", "torch.distributed.tensor"}
    assert "gobelin.formats.generation_info.all_programs" not in loaded
    assert not loaded & {"scipy", "transformers", "diffusers", "tyro", "rich", "yaml"}
    assert len(list(tmp_path.glob("*.png"))) == 1
