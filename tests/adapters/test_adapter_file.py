"""Trained adapters in files: diffusers, PEFT, LyCORIS and Gobelin itself open them to the same numbers."""

import copy
import json
from functools import cache
from pathlib import Path

import pytest
import torch
from lycoris.modules import get_module, make_module
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file
from tests.conftest import relative_error
from torch import Tensor

from gobelin.adapters.adapter_file import write_adapter
from gobelin.adapters.adapter_settings import AdapterConfig
from gobelin.adapters.trainable import adapter_parameters, add_adapters_, remove_adapters_
from gobelin.errors import UsageError
from gobelin.pipeline import Pipeline

LATENTS = torch.randn(2, 4, 8, 6, generator=torch.Generator().manual_seed(5))
TIMES = torch.tensor([7.0, 801.0])
EMBEDDINGS = torch.randn(2, 16, 64, generator=torch.Generator().manual_seed(6))
IDS = torch.tensor([[1, 5, 6, 7, *[2] * 12], [1, 8, *[2] * 14]])
CONFIGS = {
    "LoRA": AdapterConfig(rank=3, alpha=1.5),
    "LoRA of a rank beyond its layers": AdapterConfig(rank=100, targets="transformer"),
    "LoCon": AdapterConfig(rank=2, alpha=4.0, targets="all"),
    "LoHa": AdapterConfig(kind="loha", rank=2, alpha=1.0, targets="all"),
    "LoKr": AdapterConfig(kind="lokr", rank=2, alpha=1.0, targets="all"),
    "LoKr with a factor": AdapterConfig(kind="lokr", rank=3, factor=4, targets="transformer"),
    "LoKr of whole matrices": AdapterConfig(kind="lokr", rank=1000, alpha=8.0, targets="transformer"),
}
LORAS = [name for name, config in CONFIGS.items() if config.kind == "lora"]


def trained(folder: Path, config: AdapterConfig) -> Pipeline:
    """A model after two steps of training adapters in its U-Net and text encoder, in float64 from then on.

    In float64, what is left is how the files were read, and no order of sums.
    """
    pipe = Pipeline.from_pretrained(folder, "cpu")
    for number, network in enumerate((pipe.unet, pipe.text_encoder)):
        add_adapters_(network, config, torch.Generator().manual_seed(number))
    parameters = [one for network in (pipe.unet, pipe.text_encoder) for one in adapter_parameters(network)]
    optimizer = torch.optim.SGD(parameters)
    for _ in range(2):
        optimizer.zero_grad()
        loss = (pipe.unet(LATENTS, TIMES, pipe.text_encoder(IDS)) - LATENTS).square().mean()
        loss.backward()
        for one in parameters:  # as AdamW's first steps: each number by the learning rate
            one.grad.sign_()
        for group in optimizer.param_groups:
            group["lr"] = 3e-3
        optimizer.step()
    return pipe


@torch.no_grad()
def outputs(unet, text_encoder) -> tuple[Tensor, Tensor]:
    """What both networks say, in float64."""
    unet, text_encoder = (copy.deepcopy(network).double() for network in (unet, text_encoder))
    noise = unet(LATENTS.double(), TIMES, EMBEDDINGS.double())
    text = text_encoder(IDS)
    return (noise if isinstance(noise, Tensor) else noise.sample), (
        text if isinstance(text, Tensor) else text.last_hidden_state
    )


def assert_same(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]) -> None:
    found = [relative_error(one, other) for one, other in zip(ours, theirs, strict=True)]
    print("relative errors", found)
    assert max(found) <= 1e-5, found


def header(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


@pytest.fixture(scope="module")
def models(oracle_folder):
    """Makes a trained model and what it says, once for each name."""
    base = Pipeline.from_pretrained(oracle_folder, "cpu")
    without = outputs(base.unet, base.text_encoder)

    @cache
    def make(name: str) -> tuple[Pipeline, tuple[Tensor, Tensor]]:
        pipe = trained(oracle_folder, CONFIGS[name])
        said = outputs(pipe.unet, pipe.text_encoder)
        assert all(relative_error(one, other) > 1e-3 for one, other in zip(said, without, strict=True))
        return pipe, said

    return make


def both(pipe: Pipeline) -> dict[str, torch.nn.Module]:
    return {"unet": pipe.unet, "text_encoder": pipe.text_encoder}


@pytest.mark.parametrize(
    ("name", "layout"), [(name, "kohya") for name in CONFIGS] + [(name, "diffusers") for name in LORAS]
)
def test_gobelin_opens_it_to_what_it_was_trained_to(name, layout, models, oracle_folder, tmp_path):
    pipe, said = models(name)
    file = tmp_path / "x.safetensors"
    write_adapter(file, both(pipe), layout, {"title": "x"})
    assert header(file)["title"] == "x"
    other = Pipeline.from_pretrained(oracle_folder, "cpu")
    other.load_lora(file)
    assert_same(outputs(other.unet, other.text_encoder), said)


@pytest.mark.parametrize("layout", ["kohya", "diffusers"])
@pytest.mark.parametrize("name", LORAS)
def test_diffusers_opens_it_to_what_it_was_trained_to(name, layout, models, make_oracle, tmp_path):
    pipe, said = models(name)
    file = tmp_path / "x.safetensors"
    write_adapter(file, both(pipe), layout)
    theirs = make_oracle()
    theirs.load_lora_weights(file)
    assert_same(outputs(theirs.unet, theirs.text_encoder), said)


@pytest.mark.parametrize("name", CONFIGS)
def test_lycoris_opens_it_to_what_it_was_trained_to(name, models, make_oracle, tmp_path):
    pipe, said = models(name)
    file = tmp_path / "x.safetensors"
    write_adapter(file, both(pipe))
    theirs = make_oracle()
    prefix = "" if hasattr(theirs.text_encoder, "text_model") else "text_model."  # transformers 5 has none
    layers = {f"lora_unet_{name}".replace(".", "_"): layer for name, layer in theirs.unet.named_modules()}
    for name, layer in theirs.text_encoder.named_modules():
        layers[f"lora_te_{prefix}{name}".replace(".", "_")] = layer
    tensors = load_file(file)
    for name in {key.split(".")[0] for key in tensors}:
        kind, parts = get_module(tensors, name)
        make_module(kind, parts, name, layers[name]).apply_to()
    with torch.no_grad():  # it has the original layers in lists, where no copy in float64 reaches them
        unet = theirs.unet(LATENTS, TIMES, EMBEDDINGS).sample.double()
        text = theirs.text_encoder(IDS).last_hidden_state.double()
    assert_same((unet, text), said)


@pytest.mark.parametrize("name", LORAS)
def test_peft_opens_the_folder_of_a_unet(name, models, make_oracle, oracle_folder, tmp_path):
    pipe, said = models(name)
    write_adapter(tmp_path, {"unet": pipe.unet}, "peft")
    theirs = make_oracle()
    unet = PeftModel.from_pretrained(theirs.unet, tmp_path)
    assert_same(outputs(unet, pipe.text_encoder), said)
    other = Pipeline.from_pretrained(oracle_folder, "cpu")
    other.load_lora(tmp_path)
    assert_same(outputs(other.unet, pipe.text_encoder), said)


def test_an_adapter_of_the_unet_alone_is_one_too(oracle_folder, make_oracle, tmp_path):
    pipe = trained(oracle_folder, CONFIGS["LoRA"])
    remove_adapters_(pipe.text_encoder)
    said = outputs(pipe.unet, pipe.text_encoder)
    for layout in ("kohya", "diffusers"):
        write_adapter(tmp_path / f"{layout}.safetensors", {"unet": pipe.unet}, layout)
        theirs = make_oracle()
        theirs.load_lora_weights(tmp_path / f"{layout}.safetensors")
        assert_same(outputs(theirs.unet, theirs.text_encoder), said)


@pytest.mark.parametrize("name", CONFIGS)
def test_kohyas_header_says_what_the_adapter_is(name, models, tmp_path):
    pipe, _ = models(name)
    config, file = CONFIGS[name], tmp_path / "x.safetensors"
    write_adapter(file, {"unet": pipe.unet}, metadata={"ss_network_dim": "7", "ss_v_parameterization": "True"})
    said = header(file)
    assert said["ss_base_model_version"] == "sd_v1"
    assert said["ss_network_module"] == ("networks.lora" if config.kind == "lora" else "lycoris.kohya")
    assert said["ss_network_dim"] == str(config.rank)
    assert float(said["ss_network_alpha"]) == (config.alpha or config.rank)
    assert said["ss_v_parameterization"] == "True"
    alphas = {tensor.item() for key, tensor in load_file(file).items() if key.endswith(".alpha")}
    whole = name == "LoKr of whole matrices"  # LyCORIS: alpha = lora_dim
    assert alphas == {config.rank if whole else config.alpha or config.rank}
    arguments = json.loads(said["ss_network_args"])
    assert arguments.get("algo", "lora") == config.kind
    assert arguments.get("conv_dim") == (str(config.rank) if config.targets == "all" else None)
    assert arguments.get("factor") == (str(config.factor or -1) if config.kind == "lokr" else None)


def test_of_two_ranks_kohyas_header_says_none(oracle_folder, tmp_path):
    pipe = Pipeline.from_pretrained(oracle_folder, "cpu")
    add_adapters_(pipe.unet, AdapterConfig(rank=4))
    add_adapters_(pipe.text_encoder, AdapterConfig(rank=2))
    networks = {"unet": pipe.unet, "text_encoder": pipe.text_encoder}
    write_adapter(tmp_path / "x.safetensors", networks)
    assert header(tmp_path / "x.safetensors")["ss_network_dim"] == "Dynamic"
    write_adapter(tmp_path / "y.safetensors", networks, "diffusers")
    said = json.loads(header(tmp_path / "y.safetensors")["lora_adapter_metadata"])
    assert (said["unet.r"], said["text_encoder.r"], said["unet.lora_alpha"]) == (4, 2, 4)


def test_loras_come_and_go_beside_adapters_that_are_trained(oracle_folder, tmp_path):
    first, pipe = (trained(oracle_folder, CONFIGS["LoRA"]) for _ in range(2))
    write_adapter(tmp_path / "x.safetensors", both(first))
    base = Pipeline.from_pretrained(oracle_folder, "cpu")
    base.load_lora(tmp_path / "x.safetensors", weight=2.0)
    pipe.load_lora(tmp_path / "x.safetensors")
    assert_same(outputs(pipe.unet, pipe.text_encoder), outputs(base.unet, base.text_encoder))
    for network in (pipe.unet, pipe.text_encoder):
        remove_adapters_(network)
    base.loras.set_weight("x", 1.0)
    assert_same(outputs(pipe.unet, pipe.text_encoder), outputs(base.unet, base.text_encoder))
    pipe.loras.remove("x")
    base.loras.remove("x")
    expected = base.unet.state_dict()
    assert all(torch.equal(one, expected[name]) for name, one in pipe.unet.state_dict().items())


def test_what_a_layout_cannot_hold_is_refused_and_writes_nothing(oracle_folder, tmp_path):
    pipe = Pipeline.from_pretrained(oracle_folder, "cpu")
    file = tmp_path / "x.safetensors"

    def refusal(networks: dict, layout: str) -> str:
        with pytest.raises(UsageError) as error:
            write_adapter(file, networks, layout)
        assert not list(tmp_path.iterdir())
        return str(error.value)

    unet, text_encoder = {"unet": pipe.unet}, {"text_encoder": pipe.text_encoder}
    assert refusal(unet, "kohya") == "this UNet has no adapters: add them first, with add_adapters_"
    add_adapters_(pipe.unet, AdapterConfig(kind="loha"))
    add_adapters_(pipe.text_encoder, AdapterConfig(kind="lora"))
    for layout in ("peft", "diffusers"):
        assert refusal(unet, layout) == (
            f"the layout '{layout}' holds no LoHa: write it in the layout 'kohya', which is LyCORIS'"
        )
    assert refusal({**unet, **text_encoder}, "kohya").startswith("the adapters are loha and lora: give one or two")
    assert refusal(text_encoder, "peft").startswith("the layout 'peft' holds a U-Net's adapter alone, and not text_enc")
    assert refusal(unet, "comfyui") == "layout is 'comfyui': give one of 'kohya', 'diffusers', 'peft'"
    assert refusal({"vae": pipe.vae}, "kohya") == "networks has 'vae': give unet and text_encoder"
    assert refusal({}, "kohya").startswith("the adapters are none")
