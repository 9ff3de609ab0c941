"""The code on the pages runs as it is printed: every page's blocks, in order, in one namespace."""

import dataclasses
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image

import gobelin
from gobelin import pipeline
from gobelin.data import SceneDataset, find_world

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```python\n(?P<code>.*?)^```$(?:\s*^```text\n(?P<output>.*?)^```$)?", re.MULTILINE | re.DOTALL)
LEFT_OUT = (ROOT / "docs" / "reference", ROOT / "docs" / "stable-diffusion.md")  # generated; opens what is not here
PAGES = [
    page
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
    if page not in LEFT_OUT and page.parent not in LEFT_OUT and BLOCK.search(page.read_text(encoding="utf-8"))
]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the pages open: a model in both forms, a LoRA, a learned word, images, and a folder of captioned ones."""
    folder = tmp_path_factory.mktemp("files")
    shipped = gobelin.Pipeline.from_pretrained()
    shipped.save_pretrained(folder / "sd15")
    shipped.save_single_file(folder / "sd15.safetensors")
    shutil.copytree(pipeline.shipped_model() / "tokenizer", folder / "tokenizer")
    _write_lora(folder / "style.safetensors", shipped)
    _write_inversion(folder / "cat.safetensors", shipped)
    Image.new("RGB", (64, 64), "grey").save(folder / "image.png")
    mask = Image.new("L", (64, 64))
    mask.paste(255, (32, 0, 64, 64))
    mask.save(folder / "mask.png")
    (folder / "my-images").mkdir()
    scenes = SceneDataset(world=find_world("nano"), count=4)
    for index in range(len(scenes)):
        Image.fromarray(scenes[index].image).save(folder / "my-images" / f"{index}.png")
        (folder / "my-images" / f"{index}.txt").write_text(scenes[index].caption)
    return folder


@pytest.fixture
def page_folder(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with these files to run a page in; models recommend two steps, so that painting is quick."""
    opened = pipeline.open_model

    def open_quick(*args: Any, **options: Any) -> gobelin.Model:
        model = opened(*args, **options)
        return dataclasses.replace(model, recommended=dataclasses.replace(model.recommended, steps=2))

    monkeypatch.setattr(pipeline, "open_model", open_quick)
    monkeypatch.setattr(gobelin.samplers, "SAMPLERS", gobelin.samplers.SAMPLERS)
    samplers = dict(gobelin.samplers.SAMPLERS)
    folder = tmp_path / "page"
    shutil.copytree(files, folder)
    monkeypatch.chdir(folder)
    yield folder
    gobelin.samplers.SAMPLERS.clear()
    gobelin.samplers.SAMPLERS.update(samplers)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_code_of_a_page_runs(
    page: Path, page_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each block runs after those before it, and prints what stands below it."""
    text = page.read_text(encoding="utf-8")
    source = page_folder / "page.py"
    source.write_text(_code_alone(text), encoding="utf-8")
    module = ModuleType("page")
    module.__file__ = str(source)
    monkeypatch.setitem(sys.modules, "page", module)
    for block in BLOCK.finditer(text):
        line = text[: block.start("code")].count("\n")
        exec(compile("\n" * line + block["code"], str(source), "exec"), vars(module))
        printed = capsys.readouterr().out
        if block["output"] is not None:
            assert printed == block["output"], f"{page.name}:{line} prints something else"


def test_pages_are_found() -> None:
    """The pattern sees the blocks: none of the pages that exist to show code is left out."""
    names = {page.stem for page in PAGES}
    assert names >= {"README", "index", "controls", "guidance", "add-a-sampler", "add-a-control", "add-an-option"}


def _code_alone(text: str) -> str:
    """Blank every line of a page but its code's, so that tracebacks and sources have the page's line numbers."""
    kept = {
        line
        for block in BLOCK.finditer(text)
        for line in range(text[: block.start("code")].count("\n"), text[: block.end("code")].count("\n"))
    }
    return "".join(code if line in kept else "\n" for line, code in enumerate(text.splitlines(keepends=True)))


def _write_lora(path: Path, pipe: gobelin.Pipeline) -> None:
    from safetensors.torch import save_file

    name = next(name for name, _ in pipe.unet.named_modules() if name.endswith("attn2.to_k"))
    weight = pipe.unet.get_submodule(name).weight
    layer = f"lora_unet_{name.replace('.', '_')}"
    tensors = {
        f"{layer}.lora_down.weight": torch.full((2, weight.shape[1]), 0.01),
        f"{layer}.lora_up.weight": torch.full((weight.shape[0], 2), 0.01),
        f"{layer}.alpha": torch.tensor(2.0),
    }
    save_file(tensors, path)


def _write_inversion(path: Path, pipe: gobelin.Pipeline) -> None:
    from safetensors.torch import save_file

    save_file({"emb_params": torch.zeros(2, pipe.unet.config.cross_attention_dim)}, path)
