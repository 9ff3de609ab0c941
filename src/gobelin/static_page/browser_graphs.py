"""Graphs for the browser: a model's networks as ONNX, for one image of its own size, with its maps as outputs."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gobelin.attention import Trace, choose_sites
from gobelin.checkpoint import Model
from gobelin.checkpoint.onnx_files import CalledNetwork, OnnxFile, require_onnx, write_onnx
from gobelin.look.sharp_maps import sharp_trace
from gobelin.plan import latent_size

if TYPE_CHECKING:
    from onnx import ModelProto

TEXT_ENCODER, UNET, DECODER = "text_encoder.onnx", "unet.onnx", "decoder.onnx"


def write_graphs(model: Model, folder: Path) -> list[Path]:
    """Write the three graphs into a folder; returns their paths.

    The text encoder takes ``token_ids`` [2, L], of what to steer away from and of the prompt, and gives
    ``text_embeddings`` [2, L, D]. The U-Net takes these, ``latents`` [1, C, h, w] and ``timestep`` [1], and gives
    ``prediction`` [2, C, h, w], and of the prompt's the attention that sharp maps are made of, means over heads:
    ``cross`` [sites, patches, L] to words, ``own`` [patches, patches] to patches, a mean over sites. The decoder takes
    ``latents`` and gives ``levels`` [H, W, 4], bytes of red, green, blue and opacity.

    Weights that half precision holds exactly are stored in it; everything is computed in float32. Raises
    :class:`UsageError` where ONNX is not installed, and :class:`ModelError` for what cannot be exported.
    """
    require_onnx()
    paths = [write_onnx(file, folder) for file in (_text_encoder(model), _unet(model), _decoder(model))]
    for path in paths:
        _make_smaller(path)
    return paths


def page_size(model: Model) -> tuple[int, int]:
    """Compute height and width of the latents that the page paints: those that the model recommends, or its own."""
    return latent_size(model, model.recommended.height, model.recommended.width)


def page_trace(model: Model) -> Trace:
    """Choose the maps that the page shows: those that point best."""
    return sharp_trace(model.unet.attention_sites, page_size(model))


def _text_encoder(model: Model) -> OnnxFile:
    text_encoder, clip_skip = model.text_encoder, model.recommended.clip_skip or 0

    def encode(token_ids: Tensor) -> Tensor:
        return text_encoder(token_ids, clip_skip)

    ids = torch.zeros(2, model.tokenizer.max_length, dtype=torch.int32)
    return OnnxFile(TEXT_ENCODER, CalledNetwork(text_encoder, encode), {"token_ids": (ids, ())}, ("text_embeddings",))


def _unet(model: Model) -> OnnxFile:
    unet = model.unet
    text = torch.zeros(2, model.tokenizer.max_length, unet.config.cross_attention_dim)
    sites = choose_sites(unet.attention_sites, page_trace(model).sites)

    def predict(latents: Tensor, timestep: Tensor, text_embeddings: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        prediction, maps = unet.trace(latents, timestep, text_embeddings, sites=sites, rows=slice(1, 2))
        cross = [maps[site] for site in sites if site.kind == "cross"]
        own = [maps[site] for site in sites if site.kind == "self"]
        return prediction, torch.cat(cross), torch.cat(own).mean(dim=0)

    inputs = {"latents": (_latents(model), ()), "timestep": (torch.zeros(1), ()), "text_embeddings": (text, ())}
    return OnnxFile(UNET, CalledNetwork(unet, predict), inputs, ("prediction", "cross", "own"))


def _decoder(model: Model) -> OnnxFile:
    vae = model.vae

    def decode(latents: Tensor) -> Tensor:
        images = vae.latents_to_images(latents)[0].permute(1, 2, 0)
        return F.pad(((images.clamp(-1, 1) + 1) * 127.5).round(), (0, 1), value=255).to(torch.uint8)

    return OnnxFile(DECODER, CalledNetwork(vae, decode), {"latents": (_latents(model), ())}, ("levels",))


def _latents(model: Model) -> Tensor:
    return torch.zeros(1, model.vae.config.latent_channels, *page_size(model))


def _make_smaller(path: Path) -> None:
    """Leave out what a file says beside its graph, such as where in our code a node came from, and store in half."""
    import onnx

    proto = onnx.load(path)
    for part in (proto, proto.graph, *proto.graph.node):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    proto.graph.ClearField("value_info")  # shapes of what lies between, which runtimes infer themselves
    store_in_half(proto)
    onnx.save(proto, path)


def store_in_half(proto: "ModelProto") -> None:
    """Store weights in half precision where none of their numbers changes by it, each with a cast to float32."""
    import onnx
    from onnx import numpy_helper

    graph, casts = proto.graph, []
    for weight in graph.initializer:
        if weight.data_type != onnx.TensorProto.FLOAT or not weight.dims:
            continue
        whole = numpy_helper.to_array(weight)
        with np.errstate(over="ignore"):  # what is too large is not equal
            half = whole.astype(np.float16)
        if not (half.astype(np.float32) == whole).all():
            continue
        name, stored = weight.name, f"{weight.name}_half"
        weight.CopyFrom(numpy_helper.from_array(half, stored))
        casts.append(onnx.helper.make_node("Cast", [stored], [name], to=onnx.TensorProto.FLOAT))
    for number, cast in enumerate(casts):
        graph.node.insert(number, cast)
