"""Text conditioning: prompts of any length to text embeddings, in chunks that a text encoder takes.

A prompt becomes :class:`Chunks` of 77 tokens, each with a BOS, EOS and padding of its own; their embeddings, with their
weights, stand one after the other. In a batch of prompts of other lengths a mask hides what lies beyond a prompt's own,
so that an image does not depend on its neighbours.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from gobelin.attention import ExtraWords
from gobelin.clip import TextEncoder
from gobelin.errors import UsageError
from gobelin.prompt_weighting import PromptSyntax, parse_weights
from gobelin.tokenizer import Tokenizer
from gobelin.types import TextEmbeddings, TextMask
from gobelin.words import Token, Words, list_words

CHUNKED_LENGTH = 77
"""Only models with CLIP's text length are ever shown longer prompts, in several chunks."""
MAX_CHUNKS = 64  # 4,800 tokens; cross-attention's cost grows with them
_BREAK = re.compile(r"(\s*\bBREAK\b\s*)")
_EMBEDDING = re.compile(r"(?<!\w)embedding:\s*([^\s<\[]*)", re.IGNORECASE)
_COMMA_REACH = 20  # tokens: how far back AUTOMATIC1111 looks for a comma to end a chunk after
_LONG_WORD = 8  # tokens: words as long, between spaces, may be cut between ComfyUI's chunks
_Weighed = tuple[Token, float]


@dataclass(frozen=True, kw_only=True)
class Chunks:
    """A prompt's tokens in chunks of the text encoder's length, with each token's weight.

    ``words`` are those of the prompt without its weights; their tokens are numbered through all chunks. ``cut`` is the
    end of the prompt that did not fit.
    """

    token_ids: Int[Tensor, "chunks length"]
    weights: Float[Tensor, "chunks length"]
    words: Words
    cut: str


@dataclass(frozen=True, kw_only=True)
class TextConditioning:
    """Text embeddings of a batch, [B, L, D], and the mask that hides what is beyond a prompt's own length."""

    embeddings: TextEmbeddings
    mask: TextMask | None = None

    def rows(self, rows: slice) -> "TextConditioning":
        """Return a part of the batch."""
        return TextConditioning(embeddings=self.embeddings[rows], mask=None if self.mask is None else self.mask[rows])

    def __add__(self, other: "TextConditioning") -> "TextConditioning":
        """Return both batches as one, this one first."""
        mask = None
        if self.mask is not None or other.mask is not None:
            mask = torch.cat([_whole_mask(one) if one.mask is None else one.mask for one in (self, other)])
        return TextConditioning(embeddings=torch.cat([self.embeddings, other.embeddings]), mask=mask)


def _whole_mask(text: TextConditioning) -> TextMask:
    """Make the mask that hides nothing."""
    return torch.ones(text.embeddings.shape[:2], dtype=torch.bool, device=text.embeddings.device)


def chunk_prompt(tokenizer: Tokenizer, prompt: str, syntax: PromptSyntax = "a1111") -> Chunks:
    """Split a prompt's tokens into chunks, each with its own BOS, EOS and padding; a model of another length has one.

    In AUTOMATIC1111's meaning ``BREAK`` begins a new one, and in ComfyUI's ``embedding:NAME`` is the embedding of that
    file. Raises :class:`UsageError` for more than 64 of them, and for an embedding that is not loaded.
    """
    parts = parse_weights(prompt, syntax)
    if syntax == "comfyui":
        parts = [replace(part, text=_name_embeddings(part.text, tokenizer)) for part in parts]
    text = "".join(part.text for part in parts)
    in_chunks = tokenizer.max_length == CHUNKED_LENGTH
    sections: list[list[_Weighed]] = [[]]
    borders = []
    start = 0
    for part in parts:
        borders.append(start)
        pieces = _BREAK.split(part.text) if in_chunks and syntax == "a1111" else [part.text]
        if not in_chunks and syntax == "a1111" and _BREAK.search(part.text):
            raise UsageError(
                f"the prompt has a BREAK, which begins a new chunk of {CHUNKED_LENGTH} tokens, and this model takes "
                f"one of {tokenizer.max_length}: leave it out, or give weights='none' to draw the word"
            )
        if len(pieces) > 1 and part.weight != 1:
            raise UsageError(
                f"the prompt has a BREAK with a weight of {part.weight:g}: put it outside of the brackets, as a new "
                "chunk has no weight of its own"
            )
        for number, piece in enumerate(pieces):
            if number % 2:
                sections.append([])
            else:
                sections[-1] += [(token.shifted(start), part.weight) for token in tokenizer.tokens(piece)]
            start += len(piece)
    if len(sections) > 1 and not sections[-1]:
        sections.pop()  # a BREAK at the end begins none
    room = tokenizer.max_length - 2
    tokens = [token for section in sections for token in section]
    if len(tokens) > room * MAX_CHUNKS or len(sections) > MAX_CHUNKS:
        raise UsageError(f"the prompt has {len(tokens):,} tokens: give {room * MAX_CHUNKS:,} at most")
    if in_chunks:
        groups = [group for section in sections for group in _split(section, room, text, syntax)]
    else:
        groups = [tokens[:room]]
    kept = sum(map(len, groups))
    return Chunks(
        token_ids=torch.tensor([tokenizer.padded([token.id for token, _ in group]) for group in groups]),
        weights=torch.tensor([_padded([weight for _, weight in group], tokenizer.max_length) for group in groups]),
        words=tokenizer.words_of(text, [[token for token, _ in group] for group in groups], borders),
        cut=text[tokens[kept][0].start :].strip() if kept < len(tokens) else "",
    )


@torch.no_grad()
def encode_chunks(
    text_encoder: TextEncoder, tokenizer: Tokenizer, chunks: Chunks, syntax: PromptSyntax, clip_skip: int = 0
) -> Float[Tensor, "tokens width"]:
    """Encode all chunks of a prompt, one after the other, with their weights applied.

    ComfyUI measures weights from the embeddings of no words (``sd1_clip.py``); AUTOMATIC1111 multiplies, and then
    brings the mean of a chunk back to what it was (``sd_emphasis.py``).
    """
    embeddings = text_encoder(chunks.token_ids.to(text_encoder.device), clip_skip)
    weights = chunks.weights.to(embeddings)[:, :, None]
    if bool((weights != 1).any()):
        if syntax == "comfyui":
            nothing = chunk_prompt(tokenizer, "", "none")
            empty = text_encoder(nothing.token_ids.to(text_encoder.device), clip_skip)
            embeddings = empty + (embeddings - empty) * weights
        else:
            mean = embeddings.mean(dim=(1, 2), keepdim=True)
            embeddings = embeddings * weights
            embeddings = embeddings * (mean / embeddings.mean(dim=(1, 2), keepdim=True))
    return embeddings.flatten(0, 1)


@torch.no_grad()
def encode_words(
    text_encoder: TextEncoder,
    tokenizer: Tokenizer,
    words: Sequence[Chunks],
    syntax: PromptSyntax,
    clip_skip: int,
    dtype: torch.dtype,
) -> ExtraWords | None:
    """Encode words or phrases, each as a text of its own, for attention to them beside another text; None for none.

    BOS, EOS and padding are left out.
    """
    if not words:
        return None
    each = [
        encode_chunks(text_encoder, tokenizer, chunks, syntax, clip_skip)[list(chunks.words.part("text"))]
        for chunks in words
    ]
    return ExtraWords(embeddings=torch.cat(each).to(dtype), lengths=tuple(map(len, each)))


def beside_words(words: Sequence[Chunks]) -> Words | None:
    """List the words that :func:`encode_words` encodes, with their places in its result; None for none."""
    if not words:
        return None
    return list_words([one.words.text for one in words], [len(one.words.part("text")) for one in words])


def batch_texts(embeddings: Sequence[Float[Tensor, "_ width"]]) -> TextConditioning:
    """Batch text embeddings of prompts of any lengths: the shorter ones are padded, and the padding is masked."""
    lengths = torch.tensor([len(one) for one in embeddings], device=embeddings[0].device)
    longest = int(lengths.max())
    mask = torch.arange(longest, device=lengths.device) < lengths[:, None]
    return TextConditioning(
        embeddings=pad_sequence(list(embeddings), batch_first=True), mask=None if bool(mask.all()) else mask
    )


def _name_embeddings(text: str, tokenizer: Tokenizer) -> str:
    """Put words that were learned in the place of ComfyUI's ``embedding:NAME``, which may end in a file's suffix.

    As in ``sd1_clip.py`` (``SDTokenizer._try_get_embedding``) the name goes on to the next space, ``<`` or ``[``, and
    commas around it are none of it; what is not loaded, ComfyUI leaves out with a warning, and here is refused.
    """

    def named(found: re.Match[str]) -> str:
        name = found[1].strip(",")
        return tokenizer.find_by_file(name) + "," * (len(found[1]) - len(found[1].rstrip(",")))

    return _EMBEDDING.sub(named, text)


def _padded(weights: Sequence[float], length: int) -> list[float]:
    return [1.0, *weights, *[1.0] * (length - 1 - len(weights))]


def _split(tokens: list[_Weighed], room: int, text: str, syntax: PromptSyntax) -> list[list[_Weighed]]:
    """Split tokens into groups of at most ``room``, where the tool that is meant splits them."""
    groups, left = [], tokens
    while len(left) > room:
        end = _break(left, room, text, syntax)
        groups.append(left[:end])
        left = left[end:]
    return [*groups, left]


def _break(tokens: list[_Weighed], room: int, text: str, syntax: PromptSyntax) -> int:
    """Count the tokens that go into a full chunk."""
    if syntax == "a1111":
        spoken = [text[token.start : token.end] for token, _ in tokens[: room + 1]]
        commas = [place for place in range(room) if spoken[place] == ","]
        near = commas and spoken[room] != "," and room - commas[-1] <= _COMMA_REACH
        if start := _start_of_word(tokens, room):
            return start
        return commas[-1] + 1 if near else room
    if syntax == "comfyui":
        start = end = room
        while start > 0 and _go_together(tokens, start, text):
            start -= 1
        while end < len(tokens) and _go_together(tokens, end, text):
            end += 1
        return start if start > 0 and end - start < _LONG_WORD else room
    return room


def _start_of_word(tokens: list[_Weighed], room: int) -> int:
    """Find where an added word begins that would be cut; 0 where none is, or only that is in the chunk.

    AUTOMATIC1111 puts such a word into the next chunk (``sd_hijack_clip.py``, ``tokenize_line``).
    """
    cut, _ = tokens[room]
    start = room
    while start and cut.whole and tokens[start - 1][0].start == cut.start:
        start -= 1
    return start if start < room else 0


def _go_together(tokens: list[_Weighed], place: int, text: str) -> bool:
    """Tell whether nothing stands between a token and the one before it, in a part of one weight."""
    (before, weight), (token, own) = tokens[place - 1 : place + 1]
    together = before.start == token.start if before.whole or token.whole else not text[before.end : token.start]
    return weight == own and together
