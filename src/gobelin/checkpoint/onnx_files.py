"""ONNX: the networks of a model as files for other runtimes, with the names of inputs and outputs that optimum has."""

import logging
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.export import Dim

from gobelin.checkpoint.model import Model
from gobelin.errors import ModelError, UsageError


class CalledNetwork(nn.Module):
    """A function of a network, as a module that can be exported; its parameters' names are the inputs'."""

    def __init__(self, network: nn.Module, forward: Callable[..., Tensor | tuple[Tensor, ...]]):
        super().__init__()
        self.network = network
        self.forward = forward


class OnnxFile(NamedTuple):
    """A file to write: a module, example inputs by name with the axes that are free, and the outputs' names."""

    name: str
    module: nn.Module
    inputs: dict[str, tuple[Tensor, tuple[int, ...]]]
    outputs: tuple[str, ...]


def save_onnx(model: Model, folder: Path) -> None:
    """Write ``unet.onnx``, ``vae_decoder.onnx`` and ``text_encoder.onnx`` into a folder that is not there yet.

    Batch, height, width and the text's length are free. The U-Net takes ``sample``, ``timestep`` (one for each of the
    batch) and ``encoder_hidden_states`` and gives ``out_sample``; the decoder takes raw latents, those of Gobelin
    divided by the scaling factor, as ``latent_sample`` and gives ``sample``; the text encoder takes ``input_ids`` and
    gives ``last_hidden_state``. Weights of more than 2 GB are in a file beside their graph. Raises :class:`UsageError`
    where ONNX is not installed, and :class:`ModelError` for what cannot be exported; nothing is written then.
    """
    require_onnx()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
        made = Path(temporary) / folder.name
        made.mkdir()
        for file in _files(model):
            write_onnx(file, made)
        if folder.is_dir():  # an empty one
            folder.rmdir()
        shutil.move(made, folder)


def require_onnx() -> None:
    """Raise :class:`UsageError` where ONNX is not installed."""
    if missing := [name for name in ("onnx", "onnxscript") if find_spec(name) is None]:
        raise UsageError(f"writing ONNX needs {' and '.join(missing)}: pip install 'gobelin[onnx]'")


def write_onnx(file: OnnxFile, folder: Path) -> Path:
    """Write one file into a folder; raises :class:`ModelError` for what cannot be exported."""
    try:
        _export(file, folder / file.name)
    except (RuntimeError, ValueError, TypeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"{file.name} cannot be written: {reason}") from error
    return folder / file.name


def _files(model: Model) -> Iterator[OnnxFile]:
    unet, vae, text_encoder = model.unet, model.vae, model.text_encoder
    # Sizes of two different even numbers: a free axis must not look like another one, or like 1.
    latents = torch.zeros(2, unet.config.in_channels, 12, 20, dtype=unet.dtype)
    text = torch.zeros(2, 7, unet.config.cross_attention_dim, dtype=unet.dtype)

    def predict(sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        return unet(sample, timestep, encoder_hidden_states)

    def decode(latent_sample: Tensor) -> Tensor:
        return vae.decode(latent_sample)

    def encode(input_ids: Tensor) -> Tensor:
        return text_encoder(input_ids)

    unet_inputs = {
        "sample": (latents, (0, 2, 3)),
        "timestep": (torch.zeros(2), (0,)),
        "encoder_hidden_states": (text, (0, 1)),
    }
    raw = torch.zeros(2, vae.config.latent_channels, 6, 10, dtype=vae.dtype)
    ids = torch.zeros(2, model.tokenizer.max_length, dtype=torch.int64)
    yield OnnxFile("unet.onnx", CalledNetwork(unet, predict), unet_inputs, ("out_sample",))
    yield OnnxFile("vae_decoder.onnx", CalledNetwork(vae, decode), {"latent_sample": (raw, (0, 2, 3))}, ("sample",))
    text_inputs = {"input_ids": (ids, (0,))}
    yield OnnxFile("text_encoder.onnx", CalledNetwork(text_encoder, encode), text_inputs, ("last_hidden_state",))


def _export(file: OnnxFile, path: Path) -> None:
    """Export a module and write it, its weights beside it where they have more than 2 GB."""
    free: dict[str, Any] = {name: dict.fromkeys(axes, Dim.DYNAMIC) for name, (_, axes) in file.inputs.items()}
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns of packages that nothing here needs
    with torch.no_grad(), warnings.catch_warnings(action="ignore"):
        program = torch.onnx.export(
            file.module,
            tuple(tensor for tensor, _ in file.inputs.values()),
            dynamo=True,
            input_names=list(file.inputs),
            output_names=list(file.outputs),
            dynamic_shapes=tuple(free.values()),
            verbose=False,
        )
    assert program is not None
    program.save(path)
