"""Models that do not fit together or were made to harm: each is one clear error that names what is wrong."""

import json
import shutil
import sys
import warnings
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tests.oracles import original_weights
from tests.trials import trials

from gobelin.errors import ModelError
from gobelin.pipeline import Pipeline

TRIALS = trials(10)
FILES = (
    "model_index.json",
    "unet/config.json",
    "vae/config.json",
    "text_encoder/config.json",
    "scheduler/scheduler_config.json",
    "tokenizer/tokenizer_config.json",
    "tokenizer/tokenizer.json",
)
PARTS = ("unet", "vae", "text_encoder")

odd_values = st.sampled_from(
    [
        None,
        True,
        -1,
        0,
        1,
        3,
        10**9,
        10**12,
        10**30,
        1e308,
        float("nan"),
        float("inf"),
        "",
        "os.system",
        "../../etc/passwd",
        "/etc/passwd",
        ["os", "system"],
        ["diffusers", "UNet2DConditionModel"],
        [],
        [0],
        [10**9] * 4,
        [[1]],
        {"a": 1},
        "x" * 10_000,
    ]
)


@pytest.fixture
def model(oracle_folder: Path, tmp_path: Path) -> Path:
    """A folder to do harm to."""
    shutil.copytree(oracle_folder, tmp_path / "model", dirs_exist_ok=True)
    return tmp_path / "model"


def changed(model: Path, source: Path, name: str, content: str) -> None:
    """The folder as it was but for one file."""
    for file in FILES:
        shutil.copy(source / file, model / file)
    (model / name).write_text(content)


def refused(model: Path) -> ModelError | None:
    """Why a model does not open; None where it does, and paints."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of words that a short tokenizer leaves out
        try:
            Pipeline.from_pretrained(model, "cpu")("a red circle", steps=1)
        except ModelError as error:
            return error
    return None


def is_named(error: ModelError, model: Path) -> bool:
    """Whether an error says where it is: in a file, or between the parts."""
    return str(model) in str(error) or str(error).startswith("the parts of this model do not belong together")


@TRIALS
@given(data=st.data(), name=st.sampled_from(FILES))
def test_odd_configurations(data: st.DataObject, name: str, model: Path, oracle_folder: Path) -> None:
    """They open, where the value means nothing, or are refused; nothing is imported for them."""
    content = json.loads((oracle_folder / name).read_text())
    key = data.draw(st.sampled_from([*list(content)[:60], "other", "auto_map", "trust_remote_code"]))
    changed(model, oracle_folder, name, json.dumps(content | {key: data.draw(odd_values)}))
    before = set(sys.modules)
    error = refused(model)
    assert error is None or is_named(error, model)
    assert not {module for module in set(sys.modules) - before if module.startswith(("diffusers", "transformers"))}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *product(FILES, ["[]", "{", '{"_class_name": 3}']),
        *product(FILES[:2], ["", "null", '{"a":' * 100_000, "\x00", "NaN"]),  # one reader reads them all
    ],
)
def test_files_that_are_no_configuration(name: str, content: str, model: Path, oracle_folder: Path) -> None:
    changed(model, oracle_folder, name, content)
    error = refused(model)
    assert "tokenizer/" in name or "scheduler" in name if error is None else is_named(error, model)


@TRIALS
@given(data=st.data(), part=st.sampled_from(PARTS))
def test_weights_that_do_not_fit(data: st.DataObject, part: str, model: Path, oracle_folder: Path) -> None:
    """The first key that is wrong is named."""
    source = next((oracle_folder / part).glob("*.safetensors"))
    weights: dict[str, Any] = load_file(source)
    name = data.draw(st.sampled_from(sorted(weights)))
    kind = data.draw(st.sampled_from(["missing", "extra", "shape", "nan", "infinite", "flat", "precision"]))
    said = name.removeprefix("text_model.")
    if kind == "missing":
        del weights[name]
    elif kind == "extra":
        weights["no.such.layer"], said = torch.ones(2), "no.such.layer"
    elif kind == "shape":
        weights[name] = torch.ones(*weights[name].shape, 2)
    elif kind == "flat":
        weights[name] = weights[name].sum()
    elif kind == "precision":
        weights[name] = weights[name].half()
    else:
        odd = torch.nan if kind == "nan" else torch.inf
        weights[name].view(-1)[data.draw(st.integers(0, weights[name].numel() - 1))] = odd
    for other in PARTS:
        file = next((oracle_folder / other).glob("*.safetensors"))
        shutil.copy(file, model / other / file.name)
    save_file(weights, model / part / source.name, {"format": "pt"})
    if kind == "precision":
        Pipeline.from_pretrained(model, "cpu")
        return
    with pytest.raises(ModelError) as caught:
        Pipeline.from_pretrained(model, "cpu")
    assert said in str(caught.value)
    assert str(model / part) in str(caught.value)


def test_a_link_out_of_the_folder_is_not_followed(model: Path, tmp_path: Path) -> None:
    """An index may name a file beside it only; a link there is the user's own."""
    weights = next((model / "unet").glob("*.safetensors"))
    index = {"weight_map": {"conv_in.weight": "..\\..\\x.safetensors"}}
    weights.rename(tmp_path / "x.safetensors")
    (model / "unet" / f"{weights.name}.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"no weight file at|expected one in the same folder"):
        Pipeline.from_pretrained(model, "cpu")


def is_named_file(refused: str, path: Path) -> bool:
    """Whether a sentence says where it is: in the file, in what lies beside it, or between the parts."""
    return str(path.with_suffix("")) in refused or refused.startswith("the parts of this model do not belong together")


@TRIALS
@given(data=st.data())
def test_tampered_single_files(data: st.DataObject, oracle: Any, words: Path, tmp_path: Path) -> None:
    """Tensors gone, renamed, reshaped, of another precision, beside others; metadata and a ``.yaml`` that lie."""
    weights = original_weights(oracle)
    for _ in range(data.draw(st.integers(0, 3))):
        name = data.draw(st.sampled_from(sorted(weights)))
        match data.draw(st.sampled_from(["gone", "renamed", "shape", "dtype", "flat", "nan", "beside"])):
            case "gone":
                del weights[name]
            case "renamed":
                weights[name.replace(*data.draw(st.sampled_from(RENAMES)))] = weights.pop(name)
            case "shape":
                weights[name] = torch.ones(*weights[name].shape, 2)
            case "dtype":
                weights[name] = weights[name].to(data.draw(st.sampled_from(DTYPES)))
            case "flat":
                weights[name] = weights[name].float().sum()
            case "nan":
                weights[name] = torch.full_like(weights[name].float(), data.draw(st.sampled_from([NAN, INFINITY])))
            case _:
                shape = data.draw(st.sampled_from([(), (0,), (1,), (2, 3)]))
                weights[data.draw(st.sampled_from(BESIDE))] = torch.ones(shape)
    keys = st.sampled_from(["gobelin", "modelspec.prediction_type", "ss_v_parameterization", "format"])
    values = st.sampled_from(
        ["v", "epsilon", "", "{", '{"unet": {"layers_per_block": 1000000000}}', "true", "x" * 1000]
    )
    path = tmp_path / "model.safetensors"
    save_file(weights, path, data.draw(st.dictionaries(keys, values, max_size=2)))
    configuration = data.draw(st.none() | st.sampled_from(YAMLS) | st.text(max_size=40))
    path.with_suffix(".yaml").unlink(missing_ok=True)
    if configuration is not None:
        path.with_suffix(".yaml").write_text(configuration, encoding="utf-8", errors="replace")
    refused = ""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            opened = Pipeline.from_pretrained(path, "cpu", tokenizer=words, ema=data.draw(st.booleans()))
            assert all(parameter.isfinite().all() for parameter in opened.unet.parameters())
        except ModelError as error:
            refused = str(error)
    assert not refused or is_named_file(refused, path)
    assert "\n" not in refused
    assert len(refused) < 600 + len(str(path))


NAN, INFINITY = float("nan"), float("inf")
DTYPES = [torch.float64, torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8, torch.bool, torch.int64]
RENAMES = [
    ("model.", "model_ema."),
    (".q.", ".to_q."),
    ("first_stage_model.", ""),
    ("weight", "scale_weight"),
    (".", ""),
]
BESIDE = [
    "v_pred",
    "ztsnr",
    "edm_mean",
    "model.diffusion_model.out.2.scale_weight",
    "x",
    "model_ema.decay",
    "lora_te_x",
]
YAMLS = [
    "model: {params: {parameterization: v}}",
    "model: {params: {scale_factor: -1}}",
    "model: {params: {timesteps: 1e12, linear_start: .nan}}",
    "model: {params: {unet_config: {params: {num_heads: 7}}}}",
    "a: &a [x]\nb: &b [*a, *a]\nmodel: *b",
    "!!python/object/apply:os.system ['true']",
    "[" * 5000,
]
