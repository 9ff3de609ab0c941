"""Explanation of one attention query: a pass of the U-Net at the latents of a step, with every tensor of one site.

Queries, keys and values are those of the pass itself: the tensors that :func:`gobelin.attention.attention` got.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from gobelin.attention import AttentionSite, AttentionTensors, choose_sites
from gobelin.errors import UsageError
from gobelin.guidance import ConditionedUNet
from gobelin.look.heatmaps import HeatMaps
from gobelin.painting import Painting
from gobelin.types import Latents
from gobelin.validation import shown


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """The attention of one patch, the query, at one site in one head.

    ``query`` [d]; ``keys`` [keys, d]; ``scores`` are query · key / √d, ``softmax`` of them [keys], ``probs`` what a
    control made of that, equal without one; ``values_norm`` [keys] are the lengths of the values, and ``output`` [d] is
    the sum of the values, weighed by ``probs``. ``row`` and ``column`` are the patch's in the site's ``grid``. Keys are
    tokens in cross-attention, patches in self-attention.
    """

    site: AttentionSite
    head: int
    grid: tuple[int, int]
    row: int
    column: int
    query: Float[Tensor, " width"]
    keys: Float[Tensor, "keys width"]
    scores: Float[Tensor, " keys"]
    softmax: Float[Tensor, " keys"]
    probs: Float[Tensor, " keys"]
    values_norm: Float[Tensor, " keys"]
    output: Float[Tensor, " width"]
    shapes: dict[str, list[int]]


def explain_query(
    painting: Painting, noisy_latents: Latents, timestep: float, site: str, head: int, pixel: tuple[int, int]
) -> Explanation:
    """Explain the query of the patch at a ``pixel`` (x, y) of a painting's one image.

    ``noisy_latents`` [1, C, h, w] and the ``timestep`` are those of a :class:`gobelin.samplers.Step`. The pass sees the
    prompt, and the painting's controls as they hold then. Raises :class:`UsageError` for a site, a head or a pixel that
    there is not.
    """
    (found,) = _sites_named(painting, site)
    factor = painting.model.vae.config.factor
    height, width = (side * factor for side in painting.plan.latent_size)
    x, y = pixel
    if not 0 <= head < found.heads:
        raise UsageError(f"head is {head}: {found.name} has heads 0 to {found.heads - 1}")
    if not (0 <= x < width and 0 <= y < height):
        raise UsageError(f"the pixel {x}, {y} is not in the image of {width}×{height} pixels")
    rows, columns = found.grid(*painting.plan.latent_size)
    row, column = y * rows // height, x * columns // width
    network = painting.network()
    tensors = _tensors_at(network, painting, noisy_latents, timestep, [found])[found]
    there = _seen_keys(network, found, tensors)
    place = row * columns + column
    query, keys = tensors.query[0, head, place].float(), tensors.key[0, head, there].float()
    scores = keys @ query * query.shape[-1] ** -0.5
    return Explanation(
        site=found,
        head=head,
        grid=(rows, columns),
        row=row,
        column=column,
        query=query,
        keys=keys,
        scores=scores,
        softmax=torch.softmax(scores, dim=-1),
        probs=tensors.probs[0, head, place, there],
        values_norm=tensors.value[0, head, there].float().norm(dim=-1),
        output=tensors.output[0, head, place].float(),
        shapes={
            "query": list(tensors.query.shape),
            "keys": [*tensors.key.shape[:2], len(keys), tensors.key.shape[-1]],
            "scores": [*tensors.probs.shape[:3], len(keys)],
            "values": [*tensors.value.shape[:2], len(keys), tensors.value.shape[-1]],
            "output": list(tensors.output.shape),
        },
    )


def maps_at(
    painting: Painting,
    noisy_latents: Latents,
    timesteps: Sequence[float],
    image: Image.Image,
    site: str | None = None,
    head: int | None = None,
) -> HeatMaps:
    """Map a painting's one image again at steps of it: their mean over all cross-attention, or at one ``site``.

    ``noisy_latents`` are [steps, C, h, w], one for each of the ``timesteps``; ``head`` chooses one head.
    """
    sites = choose_sites(painting.model.unet.attention_sites) if site is None else _sites_named(painting, site)
    if any(one.kind != "cross" for one in sites):
        raise UsageError(f"{site} looks at patches and not at words: give a site of attn2")
    if head is not None and head >= min(one.heads for one in sites):
        raise UsageError(f"head is {head}: give 0 to {min(one.heads for one in sites) - 1}")
    network = painting.network()
    sums: dict[AttentionSite, Tensor] = {}
    for latents, timestep in zip(noisy_latents, timesteps, strict=True):
        for at, tensors in _tensors_at(network, painting, latents[None], timestep, sites).items():
            probs = tensors.probs[0].cpu()
            probs = probs.mean(dim=0) if head is None else probs[head]
            sums[at] = sums[at] + probs if at in sums else probs
    return HeatMaps(
        words=painting.plan.texts[0].words.at_length(painting.plan.length),
        maps={at: (total / len(timesteps))[None, None] for at, total in sums.items()},
        latent_size=painting.plan.latent_size,
        image=image,
    )


def token_names(painting: Painting) -> list[str]:
    """Name the tokens of a painting's one prompt: BOS, its text as the vocabulary spells it, EOS, and padding."""
    chunks, tokenizer = painting.plan.texts[0], painting.model.tokenizer
    spelt = {number: token for token, number in tokenizer.vocab.items()}
    marks = {"bos": "<bos>", "eos": "<eos>", "padding": "<pad>"}
    kinds = chunks.words.kinds
    return [
        marks.get(kind, spelt.get(number, "?").replace("</w>", " ").strip())
        for kind, number in zip(kinds, chunks.token_ids.flatten().tolist(), strict=True)
    ]


@torch.no_grad()
def _tensors_at(
    network: ConditionedUNet,
    painting: Painting,
    noisy_latents: Latents,
    timestep: float,
    sites: Sequence[AttentionSite],
) -> dict[AttentionSite, AttentionTensors]:
    """Run a pass of the model's own U-Net with the prompt."""
    unet = painting.model.unet
    latents = network.inputs(noisy_latents.to(unet.device))
    return unet.attention_tensors(
        latents,
        torch.full((len(latents),), timestep, dtype=torch.float32, device=unet.device),
        network.positive.embeddings,
        network.positive.mask,
        sites=sites,
        edits=network.edits_at(timestep),
    )


def _seen_keys(network: ConditionedUNet, site: AttentionSite, tensors: AttentionTensors) -> Tensor:
    """List the keys that may be seen: all, but for tokens beyond the prompt's own."""
    if site.kind == "self" or network.positive.mask is None:
        return torch.arange(tensors.key.shape[2])
    return network.positive.mask[0].nonzero()[:, 0].cpu()


def _sites_named(painting: Painting, name: str) -> tuple[AttentionSite, ...]:
    """Find the site of a name, in a tuple; raises :class:`UsageError` where there is none."""
    found = tuple(site for site in painting.model.unet.attention_sites if site.name == name)
    if not found:
        raise UsageError(f"there is no attention site {shown(name)}: unet.attention_sites lists those that there are")
    return found
