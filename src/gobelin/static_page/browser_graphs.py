"""Graphs for the browser: a model's networks as ONNX, for one image of its own size, with its maps as outputs."""

import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gobelin.attention import Reduction, Trace, choose_sites
from gobelin.checkpoint import Model
from gobelin.checkpoint.onnx_files import CalledNetwork, OnnxFile, require_onnx, write_onnx
from gobelin.look.sharp_maps import sharp_trace, sharpen
from gobelin.plan import latent_size

if TYPE_CHECKING:
    from onnx import ModelProto

TEXT_ENCODER, UNET, DECODER, WORD_MAPS = "text_encoder.onnx", "unet.onnx", "decoder.onnx", "word_maps.onnx"


def write_graphs(model: Model, folder: Path) -> list[Path]:
    """Write the four graphs into a folder; returns their paths.

    The text encoder takes ``token_ids`` [2, L], of what to steer away from and of the prompt, and gives
    ``text_embeddings`` [2, L, D]. The U-Net takes these, ``latents`` [1, C, h, w] and ``timestep`` [1], and gives
    ``prediction`` [2, C, h, w], and of the prompt's the attention that sharp maps are made of: ``cross``
    [maps, patches, L] to tokens and ``own`` [own maps, patches, patches] to patches, of each head where the model has
    head weights, else means over heads, and ``own`` over sites too. Of their means over steps and of ``words`` [W, L],
    1 for a word's tokens, 0 for others, the word maps are made: ``shares`` [W, patches]. The decoder takes ``latents``
    and gives ``levels`` [H, W, 4], bytes of red, green, blue and opacity.

    Weights that half precision holds exactly are stored in it; everything is computed in float32. Raises
    :class:`UsageError` where ONNX is not installed, and :class:`ModelError` for what cannot be exported.
    """
    require_onnx()
    paths = [write_onnx(made(model), folder) for made in (_text_encoder, _unet, _word_maps, _decoder)]
    for path in paths:
        _make_smaller(path)
    return paths


def page_size(model: Model) -> tuple[int, int]:
    """Compute height and width of the latents that the page paints: those that the model recommends, or its own."""
    return latent_size(model, model.recommended.height, model.recommended.width)


def page_trace(model: Model) -> Trace:
    """Choose the maps that the page shows: those that point best."""
    return sharp_trace(model.unet.attention_sites, page_size(model), model.head_weights)


def _text_encoder(model: Model) -> OnnxFile:
    text_encoder, clip_skip = model.text_encoder, model.recommended.clip_skip or 0

    def encode(token_ids: Tensor) -> Tensor:
        return text_encoder(token_ids, clip_skip)

    ids = torch.zeros(2, model.tokenizer.max_length, dtype=torch.int32)
    return OnnxFile(TEXT_ENCODER, CalledNetwork(text_encoder, encode), {"token_ids": (ids, ())}, ("text_embeddings",))


def _unet(model: Model) -> OnnxFile:
    unet, trace = model.unet, page_trace(model)
    text = torch.zeros(2, model.tokenizer.max_length, unet.config.cross_attention_dim)
    sites = choose_sites(unet.attention_sites, trace.sites)
    weights = trace.head_weights
    reduction: Reduction = "heads" if weights is None else "none"
    kinds = {kind: [site.name for site in sites if site.kind == kind] for kind in ("cross", "self")}
    cross_names, own_names = (kinds["cross"], kinds["self"]) if weights is None else (weights.cross, weights.own)

    def predict(latents: Tensor, timestep: Tensor, text_embeddings: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        prediction, maps = unet.trace(
            latents, timestep, text_embeddings, sites=sites, reduce=reduction, rows=slice(1, 2)
        )
        by_name = {site.name: probs.flatten(0, -3) for site, probs in maps.items()}  # [maps, patches, keys]
        cross, own = (torch.cat([by_name[name] for name in names]) for names in (cross_names, own_names))
        return prediction, cross, own if weights is not None else own.mean(dim=0, keepdim=True)

    inputs = {"latents": (_latents(model), ()), "timestep": (torch.zeros(1), ()), "text_embeddings": (text, ())}
    return OnnxFile(UNET, CalledNetwork(unet, predict), inputs, ("prediction", "cross", "own"))


def _word_maps(model: Model) -> OnnxFile:
    trace, length = page_trace(model), model.tokenizer.max_length
    sites = choose_sites(model.unet.attention_sites, trace.sites)
    weights = trace.head_weights
    if weights is None:
        cross_maps, own_maps = sum(site.kind == "cross" for site in sites), 1
    else:
        cross_maps, own_maps = sum(weights.cross.values()), sum(weights.own.values())
    patches = math.prod(sites[0].grid(*page_size(model)))

    def word_maps(cross: Tensor, own: Tensor, words: Tensor) -> Tensor:
        share = torch.einsum("mpl,wl->wmp", cross, words)
        if weights is None:
            return sharpen(share, own[0]).mean(dim=1).clamp(0, 1)
        bos = cross[None, ..., 0]  # the first token
        return weights.logits(share, bos, own).sigmoid()

    inputs = {
        "cross": (torch.rand(cross_maps, patches, length), ()),
        "own": (torch.rand(own_maps, patches, patches), ()),
        "words": (torch.zeros(3, length), (0,)),
    }
    return OnnxFile(WORD_MAPS, CalledNetwork(torch.nn.Identity(), word_maps), inputs, ("shares",))


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
