from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from gobelin.clip import TextEncoderConfig
from gobelin.errors import ModelError
from gobelin.formats.component import Component, config_from_json
from gobelin.formats.files import read_json, write_json
from gobelin.formats.weights import write_tensors
from gobelin.unet_config import UNetConfig
from gobelin.vae import VAEConfig
from gobelin.validation import Count, validate_fields

# What the folders of Stable Diffusion 1.5 hold.
SD15 = {
    UNetConfig: {
        "_class_name": "UNet2DConditionModel",
        "_diffusers_version": "0.6.0",
        "act_fn": "silu",
        "attention_head_dim": 8,
        "block_out_channels": [320, 640, 1280, 1280],
        "center_input_sample": False,
        "cross_attention_dim": 768,
        "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
        "downsample_padding": 1,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": 4,
        "layers_per_block": 2,
        "mid_block_scale_factor": 1,
        "norm_eps": 1e-05,
        "norm_num_groups": 32,
        "out_channels": 4,
        "sample_size": 64,
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    },
    VAEConfig: {
        "_class_name": "AutoencoderKL",
        "_diffusers_version": "0.6.0",
        "act_fn": "silu",
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "in_channels": 3,
        "latent_channels": 4,
        "layers_per_block": 2,
        "norm_num_groups": 32,
        "out_channels": 3,
        "sample_size": 512,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
    },
    TextEncoderConfig: {
        "architectures": ["CLIPTextModel"],
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "dropout": 0.0,
        "eos_token_id": 2,
        "hidden_act": "quick_gelu",
        "hidden_size": 768,
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "intermediate_size": 3072,
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": 77,
        "model_type": "clip_text_model",
        "num_attention_heads": 12,
        "num_hidden_layers": 12,
        "pad_token_id": 1,
        "projection_dim": 768,
        "torch_dtype": "float32",
        "vocab_size": 49408,
    },
}


@dataclass(frozen=True, kw_only=True)
class ToyConfig:
    widths: tuple[Count, ...]
    depth: Count = 1

    fixed: ClassVar[dict[str, Any]] = {"style": "plain", "scale": None}

    def __post_init__(self) -> None:
        validate_fields(self)


class Toy(Component[ToyConfig]):
    config_class = ToyConfig
    class_name = "ToyModel"
    weights_name = "toy.safetensors"

    def __init__(self, config: ToyConfig):
        super().__init__(config)
        self.layer = nn.Linear(config.widths[0], config.widths[1])


@pytest.mark.parametrize("config_class", SD15)
def test_the_configurations_of_stable_diffusion_are_the_presets(config_class: type) -> None:
    config = config_from_json(config_class, SD15[config_class], Path("config.json"))
    ids = ("bos_token_id", "eos_token_id", "pad_token_id")  # OpenAI's file has them wrong
    preset = {**vars(config_class.sd15()), **{name: value for name, value in vars(config).items() if name in ids}}
    assert vars(config) == preset


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "lacks the field 'widths'"),
        ({"widths": [1, 2], "style": "fancy"}, "style is 'fancy', and only 'plain' is supported"),
        ({"widths": [1, 2], "scale": 1.0}, "scale is 1.0, and only None is supported"),
        ({"widths": [1, 2], "depth": 0}, "depth is 0: give a whole number of 1 or more"),
        ({"widths": [1, 2], "depth": "two"}, "depth is 'two': give a whole number of 1 or more"),
    ],
)
def test_a_configuration_that_cannot_be_meant_is_refused_by_file_and_field(content: dict, message: str) -> None:
    with pytest.raises(ModelError) as caught:
        config_from_json(ToyConfig, content, Path("folder/config.json"))
    assert str(caught.value).startswith("folder/config.json")
    assert message in str(caught.value)


def test_other_fields_and_fixed_fields_with_their_one_value_are_passed_over() -> None:
    content = {"widths": [1, 2], "style": "plain", "scale": None, "_name_or_path": "somewhere", "unheard_of": [1]}
    assert config_from_json(ToyConfig, content, Path("c")) == ToyConfig(widths=(1, 2))


@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_a_component_comes_back_from_its_folder(dtype: torch.dtype | None, tmp_path: Path) -> None:
    toy = Toy(ToyConfig(widths=(2, 3), depth=4))
    toy.save_pretrained(str(tmp_path / "toy"), dtype)
    again = Toy.from_pretrained(str(tmp_path / "toy"))
    assert again.config == toy.config
    assert again.dtype == torch.float32
    assert again.device == torch.device("cpu")
    assert not again.training
    assert torch.equal(again.layer.weight, toy.layer.weight.to(dtype or torch.float32).float())
    assert toy.dtype == torch.float32
    assert read_json(tmp_path / "toy" / "config.json").items() >= {"_class_name": "ToyModel", "depth": 4}.items()


def test_a_folder_without_a_configuration_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no file at .*nowhere/config\.json: is this a model folder"):
        Toy.from_pretrained(tmp_path / "nowhere")


def test_a_component_may_read_the_names_that_other_writers_use(tmp_path: Path) -> None:
    class Renamed(Toy):
        @classmethod
        def map_names(cls, names: Iterable[str]) -> dict[str, str]:
            return {name: name.replace("linear", "layer") for name in names}

    write_json(tmp_path / "config.json", {"widths": [2, 3]})
    write_tensors(tmp_path / "toy.safetensors", {"linear.weight": torch.ones(3, 2), "linear.bias": torch.ones(3)})
    assert Renamed.from_pretrained(tmp_path).layer.weight.sum() == 6
    with pytest.raises(ModelError, match=r"lacks 'layer\.bias'"):
        Toy.from_pretrained(tmp_path)
