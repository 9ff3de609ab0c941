"""An audit of a model: its keys, shapes and numbers, its schedule, a round trip; and how far it is from another one."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from gobelin.checkpoint import Model, open_model
from gobelin.checkpoint.diffusers_folder import save_folder
from gobelin.checkpoint.single_file import save_single_file
from gobelin.formats.weights import parameter_count

PARTS = ("unet", "vae", "text_encoder")
SIDE = 8  # of the latents on which two models are compared: so many at the coarsest level, times its downscale


@dataclass(frozen=True, kw_only=True)
class Part:
    """What is known of one network."""

    tensors: int
    parameters: int
    dtypes: dict[str, int]
    largest: float
    """The largest number of all, without its sign."""
    sha256: str
    """Of all names, shapes and numbers in float32."""


@dataclass(frozen=True, kw_only=True)
class Audit:
    """What is known of a model that opened, and so has all its tensors, each of its shape and of finite numbers.

    It is ``sound`` where it comes back whole when it is written, and holds nothing that has no place.
    """

    name: str
    parts: dict[str, Part]
    schedule: dict[str, Any]
    tokens: int
    """Of the vocabulary."""
    warnings: list[str] = field(default_factory=list)
    round_trips: dict[str, bool] = field(default_factory=dict)
    """Whether every tensor and the schedule came back from a folder, and from a single file, as they were."""

    @property
    def sound(self) -> bool:
        return not self.warnings and all(self.round_trips.values())

    def json(self) -> dict[str, Any]:
        """All of it, as JSON."""
        return {**asdict(self), "sound": self.sound}


def audit(model: Model, warnings: list[str], round_trips: bool = True) -> Audit:
    """Look through a model that was opened, with the ``warnings`` that this gave."""
    alphas = model.schedule.alphas_cumprod
    return Audit(
        name=model.name,
        parts={name: _part(getattr(model, name)) for name in PARTS},
        schedule={
            **asdict(model.schedule.config),
            "first_alpha_cumprod": alphas[0].item(),
            "last_alpha_cumprod": alphas[-1].item(),
            "falls": bool((alphas.diff() < 0).all()),
        },
        tokens=len(model.tokenizer.vocab),
        warnings=warnings,
        round_trips=_round_trips(model) if round_trips else {},
    )


@torch.no_grad()
def differences(one: Model, other: Model) -> dict[str, dict[str, float]]:
    """How far each block of two models' networks is apart on the same input: the largest difference, as a share of the
    largest number there; by network and block, in the order in which they run. Infinity for networks of other shapes.
    """
    found = {}
    for name in PARTS:
        run = _runner(name, one)
        shapes = [{key: one.shape for key, one in getattr(model, name).state_dict().items()} for model in (one, other)]
        if shapes[0] != shapes[1]:
            found[name] = {"output": float("inf")}
            continue
        ours, theirs = (_outputs(getattr(model, name), run) for model in (one, other))
        found[name] = {block: _apart(ours[block], theirs[block]) for block in ours}
    return found


def _part(network: nn.Module) -> Part:
    state = network.state_dict()
    digest = sha256()
    dtypes: dict[str, int] = {}
    for name in sorted(state):
        tensor = state[name]
        digest.update(repr((name, tuple(tensor.shape))).encode())
        digest.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
        kind = str(tensor.dtype).removeprefix("torch.")
        dtypes[kind] = dtypes.get(kind, 0) + 1
    return Part(
        tensors=len(state),
        parameters=parameter_count(network),
        dtypes=dtypes,
        largest=max(tensor.abs().max().item() for tensor in state.values()),
        sha256=digest.hexdigest(),
    )


def _round_trips(model: Model) -> dict[str, bool]:
    before = {name: getattr(model, name).state_dict() for name in PARTS}
    came_back = {}
    with TemporaryDirectory() as folder:
        there = Path(folder)
        for name, write, where in (
            ("folder", save_folder, there / "folder"),
            ("single file", save_single_file, there / "model.safetensors"),
        ):
            write(model, where)
            again = open_model(where, torch.device("cpu"), None, tokenizer=_tokenizer_folder(model, there))
            whole = all(_equal(before[part], getattr(again, part).state_dict()) for part in PARTS)
            came_back[name] = whole and again.schedule.config == model.schedule.config
    return came_back


def _tokenizer_folder(model: Model, folder: Path) -> Path:
    model.tokenizer.save_pretrained(folder / "tokenizer")
    return folder / "tokenizer"


def _equal(before: dict[str, Tensor], after: dict[str, Tensor]) -> bool:
    return before.keys() == after.keys() and all(
        before[name].dtype == after[name].dtype and torch.equal(before[name].cpu(), after[name]) for name in before
    )


def _runner(part: str, model: Model) -> Callable[[Any], Tensor]:
    """What runs all of such a network, on inputs of this model's sizes."""
    generator = torch.Generator().manual_seed(0)
    side = SIDE * 2 ** (len(model.unet.config.block_out_channels) - 1)
    channels, text = model.unet.config.in_channels, model.text_encoder.config
    latents = torch.randn(1, channels, side, side, generator=generator)
    embeddings = torch.randn(1, text.max_position_embeddings, text.hidden_size, generator=generator)
    images = torch.rand(1, 3, 64, 64, generator=generator) * 2 - 1
    ids = torch.randint(text.vocab_size, (1, text.max_position_embeddings), generator=generator)
    match part:
        case "unet":
            return lambda unet: unet(latents.to(unet.dtype), torch.tensor([500.0]), embeddings.to(unet.dtype))
        case "vae":
            return lambda vae: vae.decode(vae.encode(images.to(vae.dtype)).mean)
        case _:
            return lambda encoder: encoder(ids)


def _outputs(network: nn.Module, run: Callable[[Any], Tensor]) -> dict[str, Tensor]:
    """What each block of a network gives, a block being a layer of no deeper than two levels of names."""
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def kept(module: nn.Module, inputs: Any, output: Any) -> None:
            outputs[name] = (output[0] if isinstance(output, tuple) else output).float()

        return kept

    with _hooked(network, keep):
        outputs["output"] = run(network).float()
    return outputs


@contextmanager
def _hooked(network: nn.Module, keep: Callable[[str], Any]) -> Iterator[None]:
    blocks = [
        (name, module)
        for name, module in network.named_modules()
        if name and not isinstance(module, nn.ModuleList) and len(_own_levels(name)) <= 2
    ]
    handles = [module.register_forward_hook(keep(name)) for name, module in blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _own_levels(name: str) -> list[str]:
    return [part for part in name.split(".") if not part.isdigit()]


def _apart(one: Tensor, other: Tensor) -> float:
    return ((one - other).abs().max() / other.abs().max().clamp(min=1e-12)).item()
