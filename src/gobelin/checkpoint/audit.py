"""Audit a model: tensors, numbers, hashes, schedule and round trips; and compare two models block by block."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import torch
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn

from gobelin.checkpoint.diffusers_folder import save_folder
from gobelin.checkpoint.loading import open_model
from gobelin.checkpoint.model import NETWORKS, Model
from gobelin.checkpoint.single_file import save_single_file
from gobelin.formats.weights import parameter_count

_Network = TypeVar("_Network", bound=nn.Module)

_COARSEST_SIDE = 8  # latents a side at the U-Net's coarsest level: attention there has 64 places to tell apart


@dataclass(frozen=True, kw_only=True)
class NetworkAudit:
    """The tensors of one network in numbers; ``dtypes`` counts tensors by their precision."""

    tensors: int
    parameters: int
    dtypes: dict[str, int]
    largest: float
    """The largest absolute value in any tensor."""
    sha256: str
    """The hash of all names, shapes and values, the values in float32."""


@dataclass(frozen=True, kw_only=True)
class Audit:
    """An audit of a model that opened, so every tensor is there, in its shape and finite.

    The model is ``sound`` if it comes back identical after it is written, and nothing in its files was left over.
    """

    name: str
    networks: dict[str, NetworkAudit]
    schedule: dict[str, Any]
    tokens: int
    """The size of the tokenizer's vocabulary."""
    warnings: list[str] = field(default_factory=list)
    round_trips: dict[str, bool] = field(default_factory=dict)
    """By "folder" and "single file": True if every tensor and the schedule came back identical."""

    @property
    def sound(self) -> bool:
        """True without warnings and with every round trip identical."""
        return not self.warnings and all(self.round_trips.values())

    def json(self) -> dict[str, Any]:
        """Return the audit as JSON, with ``sound``."""
        return {**asdict(self), "sound": self.sound}

    def table(self) -> Table:
        """Lay out the networks as a table, a row each."""
        table = Table(title=escape(self.name))
        for column in ("", "tensors", "parameters", "precision", "largest", "SHA-256"):
            table.add_column(column, justify="left" if column in ("", "precision", "SHA-256") else "right")
        for name, network in self.networks.items():
            table.add_row(
                name,
                f"{network.tensors:,}",
                f"{network.parameters:,}",
                ", ".join(network.dtypes),
                f"{network.largest:.4g}",
                network.sha256[:16],
            )
        return table

    def summary(self) -> list[str]:
        """Describe schedule, round trips and warnings, a line each, and last the verdict."""
        schedule = self.schedule
        return [
            f"schedule: {schedule['prediction_type']}, {schedule['beta_schedule']}, ᾱ from "
            f"{schedule['first_alpha_cumprod']:.6g} to {schedule['last_alpha_cumprod']:.6g}; {self.tokens:,} tokens",
            *(
                f"written as a {target} and read again: {'identical' if identical else 'NOT identical'}"
                for target, identical in self.round_trips.items()
            ),
            *(f"warning: {warning}" for warning in self.warnings),
            "sound" if self.sound else "NOT sound",
        ]


@dataclass(frozen=True, kw_only=True)
class ModelComparison:
    """The largest difference of each block's output between two models on the same input.

    ``differences`` are by network and block, in the order in which blocks run, as shares of the largest absolute value
    of that output; infinity where two networks have other shapes.
    """

    differences: dict[str, dict[str, float]]

    def table(self) -> Table:
        """Lay out the differences as a table, a row each block."""
        table = Table(title="largest difference of each block's output, as a share of its largest value")
        for column in ("network", "block", "difference"):
            table.add_column(column, justify="right" if column == "difference" else "left")
        for network, blocks in self.differences.items():
            for block, difference in blocks.items():
                table.add_row(network, block, f"{difference:.2e}")
        return table


def audit_model(model: Model, warnings: Sequence[str] = (), round_trips: bool = True) -> Audit:
    """Audit an opened model; ``warnings`` are those that opening it gave.

    ``round_trips`` writes it to a temporary folder, as a diffusers folder and as a single file, and reads both again.
    """
    alphas_cumprod = model.schedule.alphas_cumprod
    return Audit(
        name=model.name,
        networks={name: _audit_network(getattr(model, name)) for name in NETWORKS},
        schedule={
            **asdict(model.schedule.config),
            "first_alpha_cumprod": alphas_cumprod[0].item(),
            "last_alpha_cumprod": alphas_cumprod[-1].item(),
            "falls": bool((alphas_cumprod.diff() < 0).all()),
        },
        tokens=len(model.tokenizer.vocab),
        warnings=list(warnings),
        round_trips=_check_round_trips(model) if round_trips else {},
    )


@torch.no_grad()
def compare_models(model: Model, other: Model) -> ModelComparison:
    """Run both models' networks on the same random input and compare the outputs of their blocks."""
    differences = {}
    for name in NETWORKS:
        networks = [_runnable(getattr(one, name)) for one in (model, other)]
        shapes = [{key: tensor.shape for key, tensor in network.state_dict().items()} for network in networks]
        if shapes[0] != shapes[1]:
            differences[name] = {"output": float("inf")}
            continue
        run = _make_run(name, model)
        ours, theirs = (_block_outputs(network, run) for network in networks)
        differences[name] = {block: _relative_difference(ours[block], theirs[block]) for block in ours}
    return ModelComparison(differences=differences)


def _audit_network(network: nn.Module) -> NetworkAudit:
    """Count, hash and measure the tensors of a network."""
    state = network.state_dict()
    digest = sha256()
    dtypes: dict[str, int] = {}
    for name in sorted(state):
        tensor = state[name]
        digest.update(repr((name, tuple(tensor.shape))).encode())
        digest.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
        dtype = str(tensor.dtype).removeprefix("torch.")
        dtypes[dtype] = dtypes.get(dtype, 0) + 1
    return NetworkAudit(
        tensors=len(state),
        parameters=parameter_count(network),
        dtypes=dtypes,
        largest=max(tensor.float().abs().max().item() for tensor in state.values()),
        sha256=digest.hexdigest(),
    )


def _check_round_trips(model: Model) -> dict[str, bool]:
    """Write and read a model as a folder and as a single file; True where it came back identical."""
    before = {name: getattr(model, name).state_dict() for name in NETWORKS}
    identical = {}
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model.tokenizer.save_pretrained(folder / "tokenizer")
        for kind, save, target in (
            ("folder", save_folder, folder / "folder"),
            ("single file", save_single_file, folder / "model.safetensors"),
        ):
            save(model, target)
            again = open_model(target, torch.device("cpu"), None, tokenizer=folder / "tokenizer")
            same_weights = all(_is_identical(before[name], getattr(again, name).state_dict()) for name in NETWORKS)
            identical[kind] = same_weights and again.schedule.config == model.schedule.config
    return identical


def _is_identical(before: dict[str, Tensor], after: dict[str, Tensor]) -> bool:
    """Compare two state dicts: keys, dtypes and values."""
    return before.keys() == after.keys() and all(
        before[name].dtype == after[name].dtype
        and torch.equal(_comparable(before[name].cpu()), _comparable(after[name]))
        for name in before
    )


def _comparable(tensor: Tensor) -> Tensor:
    """Return numbers of one byte as bytes: torch does not compare float8."""
    return tensor.view(torch.uint8) if tensor.dtype.itemsize == 1 else tensor


def _runnable(network: _Network) -> _Network:
    """Return the network, or a copy in float32 of one whose tensors are of several precisions, or of float8."""
    dtypes = {parameter.dtype for parameter in network.parameters()}
    runs = len(dtypes) == 1 and next(iter(dtypes)).itemsize > 1
    return network if runs else deepcopy(network).float()


def _make_run(network: str, model: Model) -> Callable[[Any], Tensor]:
    """Make the function that runs such a network on random inputs of this model's sizes, always the same ones."""
    generator = torch.Generator().manual_seed(0)
    side = _COARSEST_SIDE * 2 ** (len(model.unet.config.block_out_channels) - 1)
    channels, text = model.unet.config.in_channels, model.text_encoder.config
    latents = torch.randn(1, channels, side, side, generator=generator)
    embeddings = torch.randn(1, text.max_position_embeddings, text.hidden_size, generator=generator)
    images = torch.rand(1, 3, 64, 64, generator=generator) * 2 - 1
    ids = torch.randint(text.vocab_size, (1, text.max_position_embeddings), generator=generator)
    match network:
        case "unet":
            return lambda unet: unet(latents.to(unet.dtype), torch.tensor([500.0]), embeddings.to(unet.dtype))
        case "vae":
            return lambda vae: vae.decode(vae.encode(images.to(vae.dtype)).mean)
        case _:
            return lambda encoder: encoder(ids)


def _block_outputs(network: nn.Module, run: Callable[[Any], Tensor]) -> dict[str, Tensor]:
    """Run a network and keep its blocks' outputs; a block's name has at most two parts that are not numbers."""
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            outputs[name] = (output[0] if isinstance(output, tuple) else output).float()

        return hook

    with _forward_hooks(network, keep):
        outputs["output"] = run(network).float()
    return outputs


@contextmanager
def _forward_hooks(network: nn.Module, keep: Callable[[str], Any]) -> Iterator[None]:
    """Register ``keep(name)`` as a forward hook on every block while the context lasts."""
    handles = [
        module.register_forward_hook(keep(name))
        for name, module in network.named_modules()
        if name and not isinstance(module, nn.ModuleList) and sum(not part.isdigit() for part in name.split(".")) <= 2
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _relative_difference(output: Tensor, other: Tensor) -> float:
    """Compute max |a - b| / max |b|."""
    return ((output - other).abs().max() / other.abs().max().clamp(min=1e-12)).item()
