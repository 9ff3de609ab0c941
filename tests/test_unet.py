"""The U-Net against diffusers' UNet2DConditionModel: same keys, same numbers, same files."""

import math
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from safetensors.torch import load_file, save_file
from tests.conftest import edit_config, fill_, norm_eps, relative_error
from torch import Tensor

from gobelin.attention import AttentionEdit, AttentionSite
from gobelin.errors import ModelError, UsageError
from gobelin.formats.weights import parameter_count
from gobelin.layers import ResnetBlock2D
from gobelin.unet import DownBlock2D, Transformer2DModel, UNet, UpBlock2D
from gobelin.unet_config import UNetConfig

SMALL = UNetConfig.of(
    *(8, 12),
    attention=(True, False),
    sample_size=8,
    layers_per_block=1,
    cross_attention_dim=6,
    attention_head_dim=2,
    norm_num_groups=4,
)

BATCH = {
    "noisy_latents": torch.randn(3, 4, 6, 5, generator=torch.Generator().manual_seed(0)),
    "timesteps": torch.tensor([3.0, 500.0, 999.0]),
    "text_embeddings": torch.randn(3, 7, 6, generator=torch.Generator().manual_seed(1)),
}


def random_config(seed: int) -> UNetConfig:
    draw = random.Random(seed)
    groups, heads = draw.choice((1, 2, 4)), draw.choice((1, 2, 3, 4))
    unit = math.lcm(groups, heads, 2)
    levels = draw.randint(1, 3)
    return UNetConfig.of(
        *(unit * draw.randint(1, 5) for _ in range(levels)),
        attention=tuple(draw.random() < 0.6 for _ in range(levels)),
        in_channels=draw.randint(1, 5),
        out_channels=draw.randint(1, 5),
        layers_per_block=draw.randint(1, 2),
        cross_attention_dim=draw.randint(3, 16),
        attention_head_dim=heads,
        norm_num_groups=groups,
        norm_eps=draw.choice((1e-5, 1e-3)),
    )


def random_inputs(config: UNetConfig, seed: int) -> dict[str, Tensor]:
    draw = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    batch, length = draw.randint(1, 3), draw.randint(2, 11)
    height, width = draw.choice(((8, 8), (5, 9), (7, 4), (6, 10), (1, 3)))
    mask = torch.rand(batch, length, generator=generator) < 0.5
    mask[:, 0] = True
    return {
        "noisy_latents": torch.randn(batch, config.in_channels, height, width, generator=generator),
        "timesteps": torch.rand(batch, generator=generator) * 999,
        "text_embeddings": torch.randn(batch, length, config.cross_attention_dim, generator=generator),
        "text_mask": mask,
    }


def twin(unet: UNet) -> UNet2DConditionModel:
    """diffusers' model of the same configuration, on the very same weights."""
    with torch.device("meta"):
        theirs = UNet2DConditionModel.from_config(unet.config_json())
    weights = unet.state_dict()
    assert weights.keys() == theirs.state_dict().keys()
    theirs.load_state_dict(weights, assign=True)
    return theirs.eval()


@torch.no_grad()
def outputs(ours: UNet, theirs: UNet2DConditionModel, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    expected = theirs(
        inputs["noisy_latents"],
        inputs["timesteps"],
        inputs["text_embeddings"],
        encoder_attention_mask=inputs.get("text_mask"),
    )
    return ours(**inputs), expected.sample


@pytest.mark.parametrize("seed", range(24))
def test_any_shape_computes_what_diffusers_does(seed: int) -> None:
    ours = fill_(UNet(random_config(seed)), seed)
    theirs = twin(ours)
    assert norm_eps(ours) == norm_eps(theirs)
    inputs = random_inputs(ours.config, seed)
    masked, expected = outputs(ours, theirs, inputs)
    assert relative_error(masked, expected) < 2e-5
    del inputs["text_mask"]
    unmasked, expected = outputs(ours, theirs, inputs)
    assert relative_error(unmasked, expected) < 2e-5


class Recorder(AttnProcessor):
    """diffusers' eager attention, noting down its probabilities."""

    def __init__(self) -> None:
        self.probs: Tensor | None = None

    def __call__(self, attn: Any, *inputs: Any, **options: Any) -> Tensor:
        scores = attn.get_attention_scores

        def recorded(*arguments: Any) -> Tensor:
            self.probs = scores(*arguments)
            return self.probs

        attn.get_attention_scores = recorded
        try:
            return super().__call__(attn, *inputs, **options)
        finally:
            del attn.get_attention_scores


@pytest.mark.parametrize("seed", range(12))
@torch.no_grad()
def test_what_is_traced_is_what_diffusers_attends_by(seed: int) -> None:
    config = random_config(seed)
    ours = fill_(UNet(config), seed)
    theirs, inputs = twin(ours), random_inputs(config, seed)
    recorders = {name: Recorder() for name in theirs.attn_processors}
    theirs.set_attn_processor(dict(recorders))
    outputs(ours, theirs, inputs)
    prediction, maps = ours.trace(**inputs, sites="*", reduce="none")
    assert torch.equal(prediction, ours(**inputs))
    assert {f"{site.name}.processor" for site in maps} == recorders.keys()
    for site, probs in maps.items():
        expected = recorders[f"{site.name}.processor"].probs
        assert (probs.flatten(0, 1) - expected).abs().max() < 3e-5  # diffusers' own are as far as 1.3e-5 from float64
        assert probs.shape[2] == math.prod(site.grid(*inputs["noisy_latents"].shape[-2:]))
        assert torch.allclose(probs.sum(dim=-1), torch.ones(()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_tracing_changes_no_bit_and_may_concern_some_rows_alone(dtype: torch.dtype) -> None:
    unet = fill_(UNet(SMALL)).to(dtype)
    inputs = {name: tensor if tensor.dtype == torch.bool else tensor.to(dtype) for name, tensor in BATCH.items()}
    plain = unet(**inputs)
    prediction, whole = unet.trace(**inputs)
    assert torch.equal(prediction, plain)
    assert [site.kind for site in whole] == ["cross"] * 4
    prediction, part = unet.trace(**inputs, rows=slice(1, 3), reduce="none")
    assert torch.equal(prediction, plain)
    for site, probs in part.items():
        assert torch.allclose(probs.mean(dim=1), whole[site][1:3], atol=1e-6)
    assert unet.trace(**inputs, sites=())[1] == {}


@torch.no_grad()
def test_edits_change_the_rows_and_sites_that_they_concern() -> None:
    unet = fill_(UNet(SMALL))
    plain = unet(**BATCH)
    seen = []

    def watched(site: AttentionSite, probs: Tensor) -> Tensor:
        seen.append(site)
        return probs

    def first_alone(site: AttentionSite, probs: Tensor) -> Tensor:
        return F.one_hot(torch.zeros(probs.shape[:-1], dtype=torch.int64), probs.shape[-1]).float()

    watching, first = AttentionEdit(change=watched, sites="up*"), AttentionEdit(change=first_alone)
    prediction, maps = unet.trace(**BATCH, edits=[watching])
    assert torch.equal(prediction, plain)
    assert seen == [site for site in unet.attention_sites if site.name.startswith("up")]

    prediction, maps = unet.trace(**BATCH, edits=[watching, first], rows=slice(2, 3))
    assert all(probs[..., 0].eq(1).all() for probs in maps.values())
    # Whose words are all the first one sees what only the first word says.
    alone = unet(**{**BATCH, "text_embeddings": BATCH["text_embeddings"][:, :1], "text_mask": None})
    assert relative_error(prediction[2], alone[2]) < 1e-5
    assert relative_error(prediction[:2], plain[:2]) < 1e-6


COMPILED = """
import sys
import torch
from gobelin.unet import UNet
from gobelin.unet_config import UNetConfig

heads = {"cross_attention_dim": 6, "attention_head_dim": 2, "norm_num_groups": 4}
unet = UNet(UNetConfig.of(8, 12, attention=(True, False), layers_per_block=1, **heads)).eval()
inputs = torch.randn(2, 4, 8, 6), torch.tensor([3.0, 900.0]), torch.randn(2, 5, 6)
entry = getattr(unet, sys.argv[1])
with torch.no_grad():
    plain, maps = unet.trace(*inputs)
    compiled = torch.compile(entry, fullgraph=True, backend="eager")(*inputs)
    prediction, traced = compiled if sys.argv[1] == "trace" else (compiled, maps)
    assert torch.allclose(prediction, plain, atol=1e-6)
    assert traced.keys() == maps.keys()
    assert all(torch.allclose(traced[site], maps[site], atol=1e-6) for site in maps)
print("compiled")
"""


@pytest.mark.slow
@pytest.mark.parametrize("entry", ["forward", "trace"])
def test_both_entries_compile_as_one_graph(entry: str) -> None:
    done = subprocess.run([sys.executable, "-c", COMPILED, entry], capture_output=True, text=True, timeout=300)
    assert done.stdout == "compiled\n", done.stderr


@pytest.mark.parametrize("timesteps", [[0, 999], [0.25, 998.75]], ids=["whole", "fractional"])
def test_timesteps_may_be_whole_or_fractional(timesteps: list[float]) -> None:
    ours = fill_(UNet(SMALL))
    inputs = {
        "noisy_latents": torch.randn(2, 4, 8, 8),
        "timesteps": torch.tensor(timesteps),
        "text_embeddings": torch.randn(2, 5, 6),
    }
    actual, expected = outputs(ours, twin(ours), inputs)
    assert relative_error(actual, expected) < 2e-5
    assert (
        relative_error(
            actual[:1], ours(inputs["noisy_latents"], inputs["timesteps"] + 0.5, inputs["text_embeddings"])[:1]
        )
        > 1e-4
    )


def test_sd15_has_the_parameters_of_diffusers() -> None:
    with torch.device("meta"):
        ours = UNet(UNetConfig.sd15())
    theirs = twin(ours)  # raises where a name or a shape differs
    assert parameter_count(ours) == sum(one.numel() for one in theirs.parameters()) == 859_520_964
    assert len(ours.state_dict()) == 686


@pytest.mark.slow
def test_sd15_full_size_computes_what_diffusers_does() -> None:
    with torch.device("meta"):
        ours = UNet(UNetConfig.sd15())
    fill_(ours)
    inputs = {
        "noisy_latents": torch.randn(1, 4, 12, 9),
        "timesteps": torch.tensor([601]),
        "text_embeddings": torch.randn(1, 77, 768),
    }
    actual, expected = outputs(ours, twin(ours), inputs)
    assert relative_error(actual, expected) < 2e-5


def test_what_is_printed_names_the_blocks_as_diffusers_does() -> None:
    printed = repr(UNet(SMALL))
    for name in ("Transformer2DModel", "BasicTransformerBlock", "Attention", "GEGLU", "FeedForward"):
        assert f": {name}(" in printed


def test_gradient_checkpointing_recomputes_each_block_and_changes_no_gradient() -> None:
    unet = fill_(UNet(SMALL)).train()
    inputs = random_inputs(SMALL, seed=3)
    inputs["text_embeddings"].requires_grad_()
    calls = []
    for block in unet.modules():
        if isinstance(block, DownBlock2D | UpBlock2D):
            block.resnets[0].register_forward_hook(lambda *_: calls.append(1))

    gradients = []
    for recompute in (False, True):
        unet.gradient_checkpointing = recompute
        unet.zero_grad()
        inputs["text_embeddings"].grad = None
        calls.clear()
        unet(**inputs).square().mean().backward()
        assert (len(calls) > 4) == recompute
        trained = (*unet.parameters(), inputs["text_embeddings"])
        gradients.append([tensor.grad.clone() for tensor in trained])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain)


def test_zero_init_silences_the_branches_and_the_output_and_nothing_else() -> None:
    unet = fill_(UNet(SMALL))
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    unet.zero_init_()
    silenced = {name for name, tensor in unet.state_dict().items() if not torch.equal(tensor, before[name])}
    last_layers = {
        f"{name}.{'conv2' if isinstance(module, ResnetBlock2D) else 'proj_out'}"
        for name, module in unet.named_modules()
        if isinstance(module, ResnetBlock2D | Transformer2DModel)
    } | {"conv_out"}
    assert silenced == {f"{layer}.{kind}" for layer in last_layers for kind in ("weight", "bias")}
    assert not unet(**random_inputs(SMALL, 0)).any()


def test_a_saved_folder_opens_in_diffusers(tmp_path: Path) -> None:
    ours = fill_(UNet(SMALL))
    ours.save_pretrained(tmp_path)
    theirs = UNet2DConditionModel.from_pretrained(tmp_path)
    actual, expected = outputs(ours, theirs, random_inputs(SMALL, 1))
    assert relative_error(actual, expected) < 2e-5


def test_a_folder_that_diffusers_saved_opens_here(tmp_path: Path) -> None:
    theirs = twin(fill_(UNet(SMALL)))
    theirs.save_pretrained(tmp_path)
    ours = UNet.from_pretrained(tmp_path)
    assert not ours.training
    assert ours.config_json() == {**UNet(SMALL).config_json(), "sample_size": 8}
    actual, expected = outputs(ours, theirs, random_inputs(SMALL, 1))
    assert relative_error(actual, expected) < 2e-5


def test_saving_and_loading_can_change_the_precision(tmp_path: Path) -> None:
    ours = fill_(UNet(SMALL))
    ours.save_pretrained(tmp_path, dtype=torch.float16)
    assert {tensor.dtype for tensor in load_file(tmp_path / UNet.weights_name).values()} == {torch.float16}
    loaded = UNet.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in loaded.state_dict().values()} == {torch.bfloat16}
    assert loaded.dtype == torch.bfloat16
    torch.testing.assert_close(loaded.conv_in.weight.float(), ours.conv_in.weight, rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"block_out_channels": ()}, "block_out_channels has 0 widths"),
        ({"block_out_channels": (8, 12, 16)}, "block_out_channels has 3 widths"),
        ({"down_block_types": ("DownBlock2D",)}, "down_block_types names 1 blocks"),
        ({"up_block_types": ("UpBlock2D",)}, "up_block_types 1"),
        ({"down_block_types": ("DownBlock2D", "AttnDownBlock2D")}, "'AttnDownBlock2D': the choices are CrossAttn"),
        ({"up_block_types": ("UpBlock2D", "DownBlock2D")}, "'DownBlock2D': the choices are CrossAttnUpBlock2D"),
        ({"norm_num_groups": 3}, "the width 8 must divide into 3 groups"),
        ({"norm_num_groups": 0}, "norm_num_groups is 0: give a whole number of 1 or more"),
        ({"cross_attention_dim": (6, 6)}, r"cross_attention_dim is \(6, 6\)"),
        ({"attention_head_dim": (2, 2)}, r"attention_head_dim is \(2, 2\)"),
        (
            {"block_out_channels": (7, 14), "norm_num_groups": 1, "attention_head_dim": 1},
            "the first width 7 must be even",
        ),
        ({"attention_head_dim": 8}, "the width 12 must divide into 4 groups .* and 8 heads"),
    ],
)
def test_a_configuration_that_cannot_be_built_is_refused(fields: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        UNetConfig(**{**vars(SMALL), **fields})


@pytest.mark.parametrize("name", list(UNetConfig.fixed))
def test_a_config_file_of_another_architecture_is_refused_by_the_field(name: str, tmp_path: Path) -> None:
    fill_(UNet(SMALL)).save_pretrained(tmp_path)
    edit_config(tmp_path, **{name: not UNetConfig.fixed[name]})
    with pytest.raises(ModelError, match=rf"config\.json: {name} is "):
        UNet.from_pretrained(tmp_path)


def damage(file: Path, how: str) -> None:
    if how == "missing":
        return file.unlink()
    if how == "truncated":
        return file.write_bytes(file.read_bytes()[:-100])
    if how == "not safetensors":
        return file.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    tensors = load_file(file)
    if how == "a key too few":
        del tensors["conv_in.bias"], tensors["mid_block.resnets.0.conv1.bias"]
    elif how == "a key too many":
        tensors["zebra.weight"] = torch.zeros(1)
    elif how == "another shape":
        tensors["conv_in.bias"] = torch.zeros(5)
    return save_file(tensors, file)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", "no weight file at {file}"),
        ("truncated", "{file} is not a whole safetensors file"),
        ("not safetensors", "{file} is a pointer of Git LFS"),
        ("a key too few", "{file} lacks 'conv_in.bias' (and 1 more)"),
        ("a key too many", "{file} holds 'zebra.weight', which"),
        ("another shape", "{file}: 'conv_in.bias' is [5], but the configuration says [8]"),
    ],
)
def test_damaged_weights_are_refused_by_file_and_key(how: str, message: str, tmp_path: Path) -> None:
    UNet(SMALL).save_pretrained(tmp_path)
    file = tmp_path / UNet.weights_name
    damage(file, how)
    with pytest.raises(ModelError) as caught:
        UNet.from_pretrained(tmp_path)
    assert message.format(file=file) in str(caught.value)
