"""Textual inversion files: every layout that trainers write, the word of each, and what is refused by name."""

import pickle
import random
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tests.conftest import sentence_of
from torch import Tensor

from gobelin.errors import ModelError, UsageError
from gobelin.formats.textual_inversion import read_textual_inversion
from gobelin.pipeline import Pipeline

VECTORS = torch.arange(12.0).reshape(2, 6) / 7


def parameters_of_torch_1_8(held: dict[str, Tensor]) -> torch.nn.ParameterDict:
    """A ``ParameterDict`` with the attributes that it had until PyTorch 1.11, as the original code saved it."""
    older = torch.nn.ParameterDict()
    hooks = ("_backward_hooks", "_forward_hooks", "_forward_pre_hooks", "_state_dict_hooks")
    older.__dict__ = {
        "training": True,
        "_parameters": OrderedDict({name: torch.nn.Parameter(one) for name, one in held.items()}),
        "_buffers": OrderedDict(),
        "_non_persistent_buffers_set": set(),
        **{name: OrderedDict() for name in (*hooks, "_load_state_dict_pre_hooks", "_modules")},
    }
    return older


def original(held: object) -> dict:
    return {"string_to_token": {"*": torch.tensor(265)}, "string_to_param": held}


PICKLED = {
    "original, PyTorch 1.8": original(parameters_of_torch_1_8({"*": VECTORS})),
    "original, today": original(torch.nn.ParameterDict({"*": VECTORS})),
    "original, a word of its own": original(torch.nn.ParameterDict({"sks": VECTORS})),
    "a1111": {**original({"*": VECTORS}), "name": "another", "step": 7, "sd_checkpoint": None},
    "a1111, with a gradient": original({"*": torch.nn.Parameter(VECTORS)}),
}


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("layout", PICKLED)
def test_pickled_layouts_are_the_word_of_the_files_name(layout: str, protocol: int, tmp_path: Path) -> None:
    torch.save(PICKLED[layout], tmp_path / "My-Style.pt", pickle_protocol=protocol)
    word, vectors = read_textual_inversion(tmp_path / "My-Style.pt", allow_pickle=True)
    assert word == "My-Style"
    assert torch.equal(vectors, VECTORS)


@pytest.mark.parametrize(
    ("tensors", "word"),
    [
        ({"emb_params": VECTORS}, "My-Style"),
        ({"emp_params": VECTORS}, "My-Style"),
        ({"clip_l": VECTORS}, "My-Style"),
        ({"string_to_param.*": VECTORS}, "My-Style"),
        ({"string_to_param.*": VECTORS, "string_to_token.*": torch.tensor(265)}, "My-Style"),
        ({"<cat-toy>": VECTORS}, "<cat-toy>"),
        ({"<cat-toy>": VECTORS[0]}, "<cat-toy>"),
    ],
)
def test_layouts_of_safetensors(tensors: dict[str, Tensor], word: str, tmp_path: Path) -> None:
    save_file(tensors, tmp_path / "My-Style.safetensors")
    found, vectors = read_textual_inversion(tmp_path / "My-Style.safetensors")
    assert found == word
    assert torch.equal(vectors, VECTORS[: len(vectors)])


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"clip_l": VECTORS, "clip_g": VECTORS}, "is an embedding of Stable Diffusion XL"),
        ({"clip_g": VECTORS}, "is an embedding of Stable Diffusion XL"),
        ({"clip_l": VECTORS, "t5": VECTORS}, "is an embedding of Stable Diffusion 3 or Flux"),
        ({"emb_params": VECTORS, "emb_params_out": VECTORS}, "holds 'emb_params_out', OneTrainer's output embedding"),
        ({"emp_params": VECTORS, "emp_params_out": VECTORS}, "holds 'emp_params_out', OneTrainer's output embedding"),
        ({"emp_params_out": VECTORS}, "OneTrainer's output embedding"),
        ({"bundle_emb.x.string_to_param.*": VECTORS, "lora_te_x.alpha": VECTORS}, "is a LoRA with embeddings in it"),
        ({"<a>": VECTORS, "<b>": VECTORS}, "it holds 2 tensors, '<a>' first"),
        ({"string_to_param.a": VECTORS, "string_to_param.b": VECTORS}, "it holds 2 tensors"),
        ({"emb_params": VECTORS[None]}, r"'emb_params' is \[1, 2, 6\] of float32, expected vectors"),
        ({"emb_params": torch.ones(2, 6, dtype=torch.int64)}, r"is \[2, 6\] of int64, expected vectors"),
        ({"emb_params": torch.ones(0, 6)}, "expected vectors"),
        ({"emb_params": VECTORS / 0}, "holds NaN or infinity"),
        ({"x" * 100_000: VECTORS / 0}, "a tensor whose name has 100,000 characters"),
        ({}, "it holds no tensor"),
    ],
)
def test_other_files_are_refused_by_name(tensors: dict[str, Tensor], message: str, tmp_path: Path) -> None:
    save_file({name: one.clone() for name, one in tensors.items()}, tmp_path / "x.safetensors")
    said = sentence_of(lambda: read_textual_inversion(tmp_path / "x.safetensors"))
    assert said is not None
    with pytest.raises(ModelError, match=message):
        read_textual_inversion(tmp_path / "x.safetensors")
    assert "x.safetensors" in said


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF"])
def test_a_picture_is_said_to_be_one(kind: str, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "x.pt", format=kind)
    with pytest.raises(ModelError, match=r"x\.pt is a picture, into which AUTOMATIC1111 can put an embedding"):
        read_textual_inversion(tmp_path / "x.pt", allow_pickle=True)


@pytest.mark.parametrize(
    "state", [{1}, {"a"}, frozenset({1}), frozenset(), [set(), {2}], {"_parameters": {3}}], ids=str
)
@pytest.mark.parametrize("protocol", [2, 4])
def test_no_set_but_an_empty_one_is_read(state: object, protocol: int, tmp_path: Path) -> None:
    torch.save({"string_to_param": {"*": VECTORS}, "other": state}, tmp_path / "x.pt", pickle_protocol=protocol)
    with pytest.raises(ModelError, match=r"x\.pt"):
        read_textual_inversion(tmp_path / "x.pt", allow_pickle=True)


def test_damage_to_a_parameter_dict_is_one_sentence(tmp_path: Path) -> None:
    torch.save(original(parameters_of_torch_1_8({"*": VECTORS})), tmp_path / "x.pt")
    whole = (tmp_path / "x.pt").read_bytes()
    start = whole.index(b"_non_persistent_buffers_set") - 400
    drawn = random.Random(0)
    for _ in range(150):
        content = bytearray(whole)
        for _ in range(drawn.randint(1, 4)):
            codes = [pickle.EMPTY_SET[0], pickle.ADDITEMS[0], pickle.BUILD[0], drawn.randrange(256)]
            content[start + drawn.randrange(800)] = drawn.choice(codes)
        (tmp_path / "x.pt").write_bytes(content)
        sentence_of(lambda: read_textual_inversion(tmp_path / "x.pt", allow_pickle=True))


@pytest.mark.parametrize(
    ("width", "family"),
    [
        (1024, "Stable Diffusion 2.x"),
        (1280, "Stable Diffusion XL"),
        (768, "Stable Diffusion 1.x"),
        (5, "another"),
    ],
)
def test_vectors_of_another_width_name_their_family(
    width: int, family: str, oracle_folder: Path, tmp_path: Path
) -> None:
    pipe = Pipeline.from_pretrained(oracle_folder, "cpu")
    save_file({"emb_params": torch.ones(1, width)}, tmp_path / "new-word.safetensors")
    with pytest.raises(UsageError, match=rf"new-word\.safetensors: the vectors are {width} wide.*made for {family}"):
        pipe.load_textual_inversion(tmp_path / "new-word.safetensors")
    assert pipe.learned_words == []
    assert pipe.tokenizer.words("new-word").tokens("new-word") != (1,)


def test_a_word_that_is_known_says_what_to_do(oracle_folder: Path, tmp_path: Path) -> None:
    pipe = Pipeline.from_pretrained(oracle_folder, "cpu")
    save_file({"emb_params": torch.ones(1, 64)}, tmp_path / "Red.safetensors")
    with pytest.raises(UsageError, match=r"Red\.safetensors: 'Red' is a token already.*renaming its file or as token="):
        pipe.load_textual_inversion(tmp_path / "Red.safetensors")
    assert pipe.load_textual_inversion(tmp_path / "Red.safetensors", token="my-red") == "my-red"
    with pytest.raises(UsageError, match="'MY-RED' is a token already"):
        pipe.load_textual_inversion(tmp_path / "Red.safetensors", token="MY-RED")
