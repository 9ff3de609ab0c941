"""Shape and type checks at run time for every test, and the helpers that several test files share.

The oracles are diffusers and transformers: each network is compared with theirs over the same random weights.
"""

import dataclasses
import json
import os
import pkgutil
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self, TypeVar

import hypothesis
import jaxtyping
import pytest
import torch
from beartype import BeartypeConf, FrozenDict, beartype
from rich.console import Console
from torch import Tensor, nn

# Functions are decorated one by one, where beartype cannot know what Self is; an int may stand for a float (PEP 484).
_beartype = beartype(conf=BeartypeConf(hint_overrides=FrozenDict({Self: Any}), is_pep484_tower=True))


# These are given what people write, and say what is wrong with it in sentences of their own.
_WRITTEN_BY_PEOPLE = re.compile(
    r"\w*(Config|Settings|Trace|AttentionEdit|AttentionPatch|Guidance|FlowEdit|LocalBlend|Region)\.__init__"
    r"|Pipeline\.(__call__|start|edit|_start|_encoded|words|encode_text|to|from_pretrained|use|look|features|presence|erase)"
    r"|erase_words|find_device|find_dtype|choose_sites|choose_layers|look_at_images|features_of_images|presence_in_images"
    r"|_check_timesteps|LookOptions\.of|_open_images|cluster_patches|correspond"
    r"|similarity_map|PatchFeatures\.at"
    r"|make_plan|control_list|_prompts|_images|_one_each|find_trace|chunk_prompts|caption_list|fitted_size"
    r"|open_image|open_mask|_opened|attach_controls|_attached|Batch\.rows|Words\.(find|has|tokens|part)|HeatMaps\.(part|__getitem__)|parse_weights"
    r"|reweight|suppress|regional_attention|listed_regions|Region\.box|prompt_to_prompt|attend_and_excite|box_guidance"
    r"|classifier_free_guidance|guidance_interval|adaptive_projected_guidance|cfg_zero_star"
    r"|perturbed_attention_guidance|ablate|silence_site|_adapter|look_into|PipelineLook\.\w+|_unet_of"
)


def type_checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """Beartype, except for what people write into: its own checks are to be seen."""
    return function if _WRITTEN_BY_PEOPLE.fullmatch(function.__qualname__) else _beartype(function)


# Before anything imports gobelin: every annotated type and shape in it is checked at every call. Not where
# many small functions hold no tensors: a scene takes 2 ms, and with the checks 11; names are mapped 10⁶ times.
_UNCHECKED = {"adapters", "formats", "scenes", "tokenizer", "words", "prompt_weighting", "settings", "validation"}
_package = Path(__file__).parents[1] / "src" / "gobelin"
jaxtyping.install_import_hook(
    [f"gobelin.{module.name}" for module in pkgutil.iter_modules([str(_package)]) if module.name not in _UNCHECKED],
    f"{__name__}.{type_checked.__name__}",
)

# Whole runs of what the tests of single modules run with the checks: without them they take a quarter less time.
_REPEATS = (
    *("test_combinations.py", "test_modes.py", "test_lora.py", "test_compatibility.py", "test_from_scratch.py"),
    *("test_loading.py", "test_hostile_models.py", "test_opens_in_diffusers.py", "test_pipeline_edit.py"),
    *("test_generate.py", "test_evaluate.py", "test_edit.py", "test_look.py", "test_cli.py", "test_models.py"),
    *("test_graph_engines.py", "test_onnx_files.py"),
    *("test_jobs_api.py", "test_queue.py", "test_requests.py", "test_security.py", "test_other_apis.py"),
    *("test_api_fuzz.py", "test_serve.py"),
)


@pytest.fixture(autouse=True)
def _check_types(request: pytest.FixtureRequest) -> Iterator[None]:
    """Check types and shapes at run time, but in tests of combinations and in trials of many cases."""
    jaxtyping.config.update("jaxtyping_disable", request.path.name in _REPEATS or "GOBELIN_TRIALS" in os.environ)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


os.environ.setdefault("HF_HUB_OFFLINE", "1")
# The oracles log what they miss (torchvision, accelerate), which no test needs.
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

torch.set_num_threads(1)  # for tensors this small, and on shared cores, more are many times slower

Network = TypeVar("Network", bound=nn.Module)

# A busy machine is not a bug; and the same cases in every run, but for trials of many (tests/trials.py).
hypothesis.settings.register_profile("gobelin", deadline=None, derandomize="GOBELIN_TRIALS" not in os.environ)
hypothesis.settings.load_profile("gobelin")


def pytest_configure(config: pytest.Config) -> None:
    # diffusers' own affair with NumPy 2
    for method in ("__array__ implementation", "__array_wrap__ must accept"):
        config.addinivalue_line("filterwarnings", f"ignore:{method}:DeprecationWarning")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if "GOBELIN_TRIALS" in os.environ:
        from tests.trials import summary

        for line in summary():
            terminalreporter.write_line(line)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def fill_(module: Network, seed: int = 0) -> Network:
    """Give every parameter, zero-initialised or on the meta device, random values of a useful size."""
    generator = torch.Generator().manual_seed(seed)
    values = {}
    for name, tensor in module.state_dict().items():
        fan_in = tensor[0].numel() if tensor.ndim > 1 else 10
        values[name] = torch.randn(tensor.shape, generator=generator).mul_(fan_in**-0.5)
        if tensor.ndim == 1 and name.endswith("weight"):  # a norm's
            values[name] += 1
    module.load_state_dict(values, assign=True)
    return module.eval()


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """max |a − b| / max |b|."""
    assert ours.shape == theirs.shape
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def sentence_of(call: Callable[[], object]) -> str | None:
    """The one sentence by which a call refuses, None where it does not; any other error is not caught."""
    from gobelin.errors import GobelinError

    said = None
    try:
        call()
    except GobelinError as error:
        said = str(error)
    assert said is None or (said and "\n" not in said and len(said) < 600), said
    return said


def norm_eps(module: nn.Module) -> dict[str, float]:
    """The ε of every norm by its name: too small a number to show in outputs of ordinary size."""
    return {name: norm.eps for name, norm in module.named_modules() if isinstance(norm, nn.GroupNorm | nn.LayerNorm)}


def edit_config(folder: Path, **fields: object) -> None:
    """Change fields of a saved component's ``config.json``."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


@pytest.fixture(scope="session")
def micro():
    """Makes a training configuration that takes seconds: every stage, a few steps, the smallest networks.

    Half precision is many times slower on processors without instructions for it: one test asks for it.
    """
    from gobelin.training import find_preset
    from gobelin.training.config import DataConfig

    def make(steps: int = 4, precision: str = "float32", **changes):
        preset = find_preset("nano")
        optim = {"steps": steps, "batch_size": 8, "warmup_steps": 2}
        half = {**optim, "precision": precision}
        config = dataclasses.replace(
            preset,
            save_every=2,
            sample_every=2,
            device="cpu",
            data=DataConfig(count=32, validation=4),
            samples=4,
            text=dataclasses.replace(preset.text, width=32, optim=dataclasses.replace(preset.text.optim, **half)),
            vae=dataclasses.replace(preset.vae, optim=dataclasses.replace(preset.vae.optim, **optim)),
            unet=dataclasses.replace(preset.unet, optim=dataclasses.replace(preset.unet.optim, **half)),
            recommended=dataclasses.replace(preset.recommended, steps=2),
        )
        return dataclasses.replace(config, **changes)

    return make


@pytest.fixture(scope="session")
def trained(micro, tmp_path_factory) -> Path:
    """The folder of a model that was trained for a moment."""
    from gobelin.training.train_model import train

    return train(micro(), tmp_path_factory.mktemp("trained") / "model", console=Console(quiet=True))


@pytest.fixture(scope="session")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tokenizer."""
    from gobelin.tokenizer import Tokenizer

    folder = tmp_path_factory.mktemp("words")
    Tokenizer.train(["a red circle left of a blue square"], vocab_size=560, max_length=16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def small_clip(words: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small CLIP with random weights, as transformers writes it."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    tokenizer = CLIPTokenizer.from_pretrained(words)
    tokens = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = {**sizes, **tokens, "vocab_size": len(tokenizer), "max_position_embeddings": 16}
    vision = {**sizes, "image_size": 32, "patch_size": 8}
    folder = tmp_path_factory.mktemp("clip")
    fill_(CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12))).save_pretrained(folder)
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(image_processor=images, tokenizer=tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def make_oracle(words: Path) -> Callable[..., Any]:
    """Makes diffusers' pipeline of a small model with random weights, always the same ones."""
    from tests.oracles import small_pipeline

    return lambda in_channels=4: small_pipeline(words, in_channels)


@pytest.fixture(scope="session")
def oracle(make_oracle: Callable[..., Any]) -> Any:
    return make_oracle()


@pytest.fixture(scope="session")
def oracle_folder(oracle: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its folder, as diffusers writes it."""
    folder = tmp_path_factory.mktemp("model")
    oracle.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def clip_model() -> Callable[..., Any]:
    """Makes small models of Stable Diffusion 1.x's kind, with random weights and CLIP's vocabulary of 77 tokens."""
    from importlib.util import find_spec

    from gobelin.checkpoint import Model
    from gobelin.checkpoint.clip_tokenizer import read_bpe_merges
    from gobelin.clip import TextEncoder, TextEncoderConfig
    from gobelin.schedule import NoiseSchedule
    from gobelin.unet import UNet
    from gobelin.unet_config import UNetConfig
    from gobelin.vae import VAE, VAEConfig

    found = find_spec("open_clip")
    assert found is not None
    assert found.origin is not None
    tokenizer = read_bpe_merges(Path(found.origin).with_name("bpe_simple_vocab_16e6.txt.gz"))
    attention = (True, True, True, False)

    def make(in_channels: int = 4) -> Model:
        unet = UNetConfig.of(
            *(32, 64, 64, 64), attention=attention, layers_per_block=1, cross_attention_dim=32, norm_num_groups=8
        )
        with torch.device("meta"):
            networks = (
                UNet(dataclasses.replace(unet, sample_size=8, in_channels=in_channels)),
                VAE(VAEConfig(block_out_channels=(8, 8, 8, 8), norm_num_groups=4, layers_per_block=1, sample_size=64)),
                TextEncoder(TextEncoderConfig.of(32, layers=2, heads=2, vocab_size=len(tokenizer.vocab))),
            )
        unet, vae, text_encoder = (fill_(network, number) for number, network in enumerate(networks))
        with torch.no_grad():
            unet.conv_out.weight.mul_(0.3)
        schedule = NoiseSchedule()
        return Model(
            unet=unet,
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            schedule=schedule,
            name="small",
        )

    return make
