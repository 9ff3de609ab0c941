"""A word that is trained: textual inversion (Gal et al. 2022, arXiv 2208.01618), token embeddings and nothing else."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from safetensors.torch import save_file
from torch import Tensor, nn

from gobelin.clip import TextEncoder
from gobelin.errors import UsageError
from gobelin.formats.files import replacing
from gobelin.tokenizer import LONGEST_ADDED, Tokenizer


class TrainedWordEmbedding(nn.Module):
    """The frozen token embeddings of a text encoder, and after them the trained ``vectors`` of a new word."""

    def __init__(self, base: nn.Embedding, vectors: Float[Tensor, "vectors width"]):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.vectors = nn.Parameter(vectors.clone())

    @property
    def weight(self) -> Float[Tensor, "tokens width"]:
        """All token embeddings."""
        return torch.cat([self.base.weight, self.vectors])

    def forward(self, token_ids: Int[Tensor, "batch length"]) -> Float[Tensor, "batch length width"]:
        """Look up token embeddings."""
        own = self.base.num_embeddings
        new = F.embedding((token_ids - own).clamp(min=0), self.vectors)
        return torch.where((token_ids >= own)[..., None], new, self.base(token_ids.clamp(max=own - 1)).to(new.dtype))


def add_trained_word_(
    text_encoder: TextEncoder, tokenizer: Tokenizer, word: str, begin: str, vectors: int
) -> TrainedWordEmbedding:
    """Add a word of ``vectors`` token embeddings to a text encoder, all else of which is frozen, and to its tokenizer.

    It begins as the word ``begin``, or as the mean of all token embeddings. Raises as :func:`check_new_word`.
    """
    check_new_word(tokenizer, word, begin, vectors)
    table = text_encoder.text_model.embeddings.token_embedding
    known = [token.id for token in tokenizer.tokens(begin)] if begin else []
    first = table.weight.detach()[known].float() if known else table.weight.detach().float().mean(dim=0, keepdim=True)
    start = first[torch.arange(vectors) % len(first)]
    tokenizer.add_word(word, text_encoder.add_vectors(start))
    text_encoder.requires_grad_(False)
    grown: Any = text_encoder.text_model.embeddings.token_embedding
    base = nn.Embedding.from_pretrained(grown.weight.detach()[:-vectors].clone())
    embedding = TrainedWordEmbedding(base, grown.weight.detach()[-vectors:].float())
    text_encoder.text_model.embeddings.token_embedding = embedding  # type: ignore[assignment]
    return embedding


def check_new_word(tokenizer: Tokenizer, word: str, begin: str, vectors: int) -> None:
    """Raise :class:`UsageError` for a word that cannot be added to a tokenizer with ``vectors`` token embeddings."""
    if tokenizer.knows(word):
        raise UsageError(f"new_word.word is {word!r}, which this model has already: give another, such as '<mine>'")
    if len(word) > LONGEST_ADDED:
        raise UsageError(f"new_word.word has {len(word):,} characters: give {LONGEST_ADDED:,} at most")
    if begin and not tokenizer.tokens(begin):
        raise UsageError(f"new_word.begin is {begin!r}: give a word that the model knows, such as 'toy'")
    most = tokenizer.max_length - 2  # beside BOS and EOS
    if vectors > most:
        raise UsageError(f"new_word.vectors is {vectors}: give {most} at most, the places of a prompt of this model")


def count_captioned(tokenizer: Tokenizer, word: str, captions: Iterable[Sequence[str]]) -> int:
    """Count the images that have a new word in one of their captions, found in them as the tokenizer finds it."""
    number = tokenizer.first_free
    tokenizer.add_word(word, [number])
    try:
        return sum(
            any(token.id == number for caption in of_image for token in tokenizer.tokens(caption))
            for of_image in captions
        )
    finally:
        tokenizer.remove_word(word)


def trained_vectors(text_encoder: TextEncoder) -> Float[Tensor, "vectors width"]:
    """Return the token embeddings of the word that is trained in a text encoder."""
    embedding: Any = text_encoder.text_model.embeddings.token_embedding
    assert isinstance(embedding, TrainedWordEmbedding)
    return embedding.vectors.detach()


def write_word(folder: Path, word: str, vectors: Float[Tensor, "vectors width"]) -> Path:
    """Write a word's vectors as diffusers does, the word as their key; returns the file, which is called like it."""
    name = re.sub(r"[^\w.-]+", "-", word).strip("-.") or "word"
    path = folder / f"{name}.safetensors"
    with replacing(path) as temporary:
        save_file({word: vectors.detach().float().cpu().contiguous()}, temporary)
    return path
