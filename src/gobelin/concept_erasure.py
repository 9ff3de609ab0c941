"""Concept erasure in closed form: cross-attention reads a word as it reads what stands in its place.

Unified concept editing (UCE, Gandikota et al. 2023, arXiv 2308.14761, equation 7): keys and values of cross-attention
are linear in the text embeddings, so the weights that map some of these elsewhere, and others to what they were, are
those of a ridge regression. Nothing is trained, and no image is needed.
"""

from collections.abc import Sequence
from typing import Annotated

import torch
from annotated_types import Gt, Len
from jaxtyping import Float
from torch import Tensor, nn

from gobelin.checkpoint import Model
from gobelin.errors import UsageError
from gobelin.layers import Attention
from gobelin.text_conditioning import chunk_prompt, encode_chunks
from gobelin.unet import UNet
from gobelin.validation import validated
from gobelin.words import WordSpan

_TEMPLATES = ("{}", "a {}", "the {}", "an image of a {}", "a photo of a {}", "a {} and something else")
_Texts = Annotated[Sequence[str], "a list of texts"]
_Embeddings = Float[Tensor, "tokens width"]


def erase_words(
    model: Model, words: Sequence[str], instead: str, prompts: Sequence[str], preserve: Sequence[str], ridge: float
) -> None:
    """Do as :meth:`gobelin.pipeline.Pipeline.erase`."""
    validated("words", words, Annotated[Sequence[str], Len(1), "a word, or a list of words"])
    validated("instead", instead, str)
    validated("prompts", prompts, _Texts)
    validated("preserve", preserve, _Texts)
    validated("ridge", ridge, Annotated[float, Gt(0)])
    contexts = [(word, text) for word in words for text in (*(one.format(word) for one in _TEMPLATES), *prompts)]
    said = [(word, text) for word, text in contexts if chunk_prompt(model.tokenizer, text, "none").words.has(word)]
    if unsaid := [word for word in words if not any(word == one for one, _ in said)]:
        raise UsageError(f"{unsaid[0]!r} is no word that a prompt can have: give a word, or several beside each other")
    pairs = [_moved_embeddings(model, word, instead, text) for word, text in said]
    kept = [_embed(model, text) for text in preserve]
    erase_from_cross_attention(
        model.unet,
        concept=torch.cat([concept for concept, _, _ in pairs]),
        target=torch.cat([target for _, target, _ in pairs]),
        preserved=torch.cat([*(before for _, _, before in pairs), *kept]),
        ridge=ridge,
    )


@torch.no_grad()
def erase_from_cross_attention(
    unet: UNet, *, concept: _Embeddings, target: _Embeddings, preserved: Float[Tensor, "others width"], ridge: float
) -> None:
    """Change the weights W of every attn2's keys and values, in place, so that W c ≈ W_old c* and W p ≈ W_old p.

    ``concept`` are the embeddings c, ``target`` those that they are to be read as, c*, row by row, and ``preserved``
    the embeddings p. ``ridge``, in units of the embeddings' mean square, holds the weights where they were.
    """
    c, p = concept.double(), preserved.double()
    gram = c.T @ c + p.T @ p
    gram += ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    moved = target.double() - c
    for module in unet.modules():
        if isinstance(module, Attention) and module.site is not None and module.site.kind == "cross":
            for layer in (module.to_k, module.to_v):
                _regress(layer, moved.to(layer.weight.device), c.to(layer.weight.device), gram)


def _regress(layer: nn.Linear, moved: Tensor, concept: Tensor, gram: Tensor) -> None:
    """Solve (W − W_old) (Σ c cᵀ + Σ p pᵀ + λ 1) = Σ W_old (c* − c) cᵀ for W, and write it into the layer."""
    weight = layer.weight.double()
    change = torch.linalg.solve(gram.to(weight.device), (weight @ moved.T @ concept).T).T
    layer.weight.copy_(weight + change)


def _moved_embeddings(model: Model, word: str, instead: str, prompt: str) -> tuple[Tensor, Tensor, Tensor]:
    """Embed a prompt from its word on, the same with ``instead`` in the word's place, and what stands before it.

    Tokens before the word are the same in both, as a text encoder looks back alone. The word's tokens go with those of
    the replacement, the last of which serves for all beyond it, or with the token before if there is none; what comes
    after goes with what comes after, and the last padding with what is beyond the end.
    """
    words = chunk_prompt(model.tokenizer, prompt, "none").words
    spans = words.find((word, 0))
    other = f"{prompt[: spans[0].start]}{instead}{prompt[spans[-1].end :]}"
    here, there = _embed(model, prompt), _embed(model, other)
    first, after = spans[0].tokens[0], spans[-1].tokens[-1] + 1
    put = _tokens_between(chunk_prompt(model.tokenizer, other, "none").words.spans, spans[0].start, len(instead))
    end = put[-1] + 1 if put else first
    places = [put[min(place, len(put) - 1)] if put else first - 1 for place in range(after - first)]
    places += [end + place for place in range(len(here) - after)]
    return here[first:], there[[min(place, len(there) - 1) for place in places]], here[:first]


def _tokens_between(spans: Sequence[WordSpan], start: int, length: int) -> list[int]:
    """List the tokens of the words that begin within so many characters."""
    return [token for span in spans if start <= span.start < start + length for token in span.tokens]


def _embed(model: Model, text: str) -> _Embeddings:
    """Embed a text, its padding included."""
    chunks = chunk_prompt(model.tokenizer, text, "none")
    return encode_chunks(model.text_encoder, model.tokenizer, chunks, "none", model.recommended.clip_skip or 0)
