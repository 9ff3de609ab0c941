"""Prompt to token ids, and the tokens that each word became.

Byte-pair encoding as CLIP has it (Radford et al. 2021, section 2.4), run by the ``tokenizers`` library: lower
case, 256 byte symbols, words that end in ``</w>``, BOS first, then EOS as end and padding.
"""

import json
import re
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal, Self, get_args

import torch
from jaxtyping import Int
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Engine
from torch import Tensor

from gobelin.errors import ModelError, UsageError
from gobelin.formats.files import read_json, write_json, write_text
from gobelin.validation import validated

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"
PIECES = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_BETWEEN_SEPARATORS = re.compile(r"[^\s,;|()\[\]{}<>\"“”„«»，。、；：！？（）「」]+")
UNLIMITED = 10**6  # transformers writes 10³⁰ where no length was set
MIN_VOCABULARY = 2 * 256 + 2
MERGES_HEADER = "#version: 0.2"


@dataclass(frozen=True, kw_only=True)
class WordSpan:
    """A word of a text: its characters ``text[start:end]``, and the positions of its tokens, BOS being 0."""

    word: str
    start: int
    end: int
    tokens: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Token:
    """A token of a text: its id, and its characters ``text[start:end]``."""

    id: int
    start: int
    end: int

    def shifted(self, by: int) -> "Token":
        """Return the token with its characters ``by`` places further on."""
        return replace(self, start=self.start + by, end=self.end + by)


Word = str | int | tuple[str, int]
"""A word or phrase wherever it stands, one occurrence of it, or a word by its number in the prompt."""
_WORD = Annotated[Word, "text, as in 'circle', one occurrence of it, ('circle', 0), or a word's number"]

TokenKind = Literal["bos", "text", "eos", "padding", "masked"]
"""Kinds of positions in a text encoder's input; masked ones stand beyond a prompt's own chunks in a longer batch."""


@dataclass(frozen=True, kw_only=True)
class Words:
    """The words of a prompt, and the tokens that each became.

    ``kinds`` has a :data:`TokenKind` for every position of the text embeddings. A long prompt has several chunks, each
    with a BOS, EOS and padding of its own; positions are numbered through all of them.
    """

    text: str
    spans: tuple[WordSpan, ...]
    kinds: tuple[TokenKind, ...]

    def __len__(self) -> int:
        return len(self.spans)

    @property
    def length(self) -> int:
        """The number of positions."""
        return len(self.kinds)

    def at_length(self, length: int) -> "Words":
        """Return the same words in a batch of longer prompts: positions beyond their own are masked."""
        return replace(self, kinds=(*self.kinds, *("masked",) * (length - self.length)))

    def chunks(self) -> list[range]:
        """List the positions of each chunk, from its BOS on."""
        starts = self.part("bos")
        end = self.length - len(self.part("masked"))
        return [range(start, after) for start, after in zip(starts, (*starts[1:], end), strict=True)]

    def tokens(self, key: Word) -> tuple[int, ...]:
        """Find the positions of a word's tokens: ``"circle"`` and ``"red circle"`` wherever they stand,
        ``("circle", 1)`` the second of them, ``3`` the fourth word.

        Case does not matter. Raises :class:`UsageError` that lists the prompt's words.
        """
        return tuple(dict.fromkeys(token for span in self.find(key) for token in span.tokens))

    def find(self, key: Word) -> list[WordSpan]:
        """Find the words that a key of :meth:`tokens` means, in order; raises as it does."""
        there = ", ".join(dict.fromkeys(span.word for span in self.spans)) or "none"
        validated("a word", key, _WORD)
        if isinstance(key, int):
            if not -len(self) <= key < len(self):
                raise UsageError(f"there is no word number {key}: the prompt has {len(self)}, {there}")
            return [self.spans[key]]
        phrase, occurrence = (key, None) if isinstance(key, str) else key
        wanted = [text.lower() for text, _, _ in split_words(phrase)]
        spoken = [span.word.lower() for span in self.spans]
        starts = [start for start in range(len(self)) if wanted and spoken[start : start + len(wanted)] == wanted]
        if not starts:
            raise UsageError(f"{phrase!r} is not in the prompt, whose words are {there}")
        if occurrence is not None:
            if not -len(starts) <= occurrence < len(starts):
                raise UsageError(
                    f"{phrase!r} occurs {len(starts)} times in the prompt: there is no number {occurrence} of it, "
                    "the first being 0"
                )
            starts = [starts[occurrence]]
        return [span for start in starts for span in self.spans[start : start + len(wanted)]]

    def has(self, key: Word) -> bool:
        """Tell whether the prompt has a word."""
        try:
            return bool(self.find(key))
        except UsageError:
            return False

    def part(self, kind: TokenKind) -> tuple[int, ...]:
        """List the positions of a kind, over all chunks; raises :class:`UsageError` for an unknown one."""
        if kind not in get_args(TokenKind):
            raise UsageError(f"unknown part {kind!r}: the choices are {', '.join(get_args(TokenKind))}")
        return tuple(position for position, there in enumerate(self.kinds) if there == kind)


def split_words(text: str, borders: Collection[int] = ()) -> Iterator[tuple[str, int, int]]:
    """Split a text into words with their (start, end): at spaces, commas and brackets, and at ``borders``.

    Punctuation around a word is not part of it; a hyphen, a dot or an apostrophe inside of one is, and so are
    combining marks.
    """
    for match in _BETWEEN_SEPARATORS.finditer(text):
        cuts = [
            match.start(),
            *(border for border in sorted(borders) if match.start() < border < match.end()),
            match.end(),
        ]
        for start, end in pairwise(cuts):
            while start < end and not _is_spoken(text[start]):
                start += 1
            while end > start and not _is_spoken(text[end - 1]):
                end -= 1
            if start < end:
                yield text[start:end], start, end


def _is_spoken(character: str) -> bool:
    """Tell letters, marks and numbers from punctuation and symbols; emoji count as words."""
    return unicodedata.category(character)[0] in "LMN" or unicodedata.category(character) == "So"


class Tokenizer:
    """A byte-pair tokenizer of CLIP's kind, loaded from ``vocab.json`` and ``merges.txt`` or trained on texts."""

    def __init__(self, vocab: dict[str, int], merges: Sequence[tuple[str, str]], max_length: int = 77):
        if missing := [token for token in (BOS, EOS) if token not in vocab]:
            raise ModelError(f"the vocabulary lacks {missing[0]!r}: it is not a CLIP tokenizer's")
        self.vocab = vocab
        self.merges = list(merges)
        self.max_length = max_length
        try:
            self._engine = _engine(models.BPE(vocab, self.merges, end_of_word_suffix=WORD_END, unk_token=EOS))
        except Exception as error:  # the library's own, of no particular type
            raise ModelError(f"the vocabulary and the merges do not make a tokenizer: {error}") from error
        self._engine.add_special_tokens([AddedToken(token, normalized=False) for token in (BOS, EOS)])
        self._meanings: dict[int, tuple[int, ...]] = {}

    @property
    def eos(self) -> int:
        """The id of the token that ends a text and pads it."""
        return self.vocab[EOS]

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int = 2048, max_length: int = 77) -> Self:
        """Learn the merges from texts; the vocabulary is laid out as CLIP's and holds ``vocab_size`` at most.

        All 256 byte symbols and their word-end forms are in it, so that no text is ever unknown.
        """
        engine = _engine(models.BPE(end_of_word_suffix=WORD_END))
        if vocab_size < MIN_VOCABULARY:
            raise UsageError(f"vocab_size is {vocab_size}: give {MIN_VOCABULARY} (bytes and markers) or more")
        symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
        alphabet = symbols + [symbol + WORD_END for symbol in symbols]
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - 2,
            show_progress=False,
            initial_alphabet=symbols,
            end_of_word_suffix=WORD_END,
        )
        engine.train_from_iterator(texts, trainer)
        merges = [(left, right) for left, right in json.loads(engine.to_str())["model"]["merges"]]
        merges = merges[: vocab_size - len(alphabet) - 2]
        tokens = dict.fromkeys([*alphabet, *("".join(pair) for pair in merges), BOS, EOS])
        return cls({token: index for index, token in enumerate(tokens)}, merges, max_length)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Read ``vocab.json``, ``merges.txt`` and, for the length, ``tokenizer_config.json``.

        Without the first two, ``tokenizer.json`` is read, which is all that newer transformers write.
        """
        folder = Path(folder)
        config = folder / "tokenizer_config.json"
        length = read_json(config).get("model_max_length", 77) if config.is_file() else 77
        if not isinstance(length, int) or length < 3:
            raise ModelError(f"{config}: model_max_length is {length!r}, expected 3 tokens or more")
        length = length if length < UNLIMITED else 77
        if not (folder / "merges.txt").exists() and (folder / "tokenizer.json").exists():
            return cls(*_from_tokenizer_json(folder / "tokenizer.json"), length)
        merges_file = folder / "merges.txt"
        try:
            lines = merges_file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ModelError(f"{merges_file} cannot be read: {error}") from error
        lines = [line for line in lines if line.strip() and not line.startswith("#version")]
        if bad := [line for line in lines if len(line.split()) != 2]:
            raise ModelError(f"{merges_file}: {bad[0]!r} is not a pair of symbols")
        merges = [(left, right) for left, right in map(str.split, lines)]
        return cls(read_json(folder / "vocab.json"), merges, length)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the files that transformers' ``CLIPTokenizer`` reads."""
        if self._meanings:
            raise UsageError("words were added to this tokenizer, which its files have no place for: save without them")
        folder = Path(folder)
        write_json(folder / "vocab.json", self.vocab)
        lines = [MERGES_HEADER, *(" ".join(pair) for pair in self.merges)]
        write_text(folder / "merges.txt", "\n".join(lines) + "\n")
        special = {"bos_token": BOS, "eos_token": EOS, "unk_token": EOS, "pad_token": EOS}
        write_json(folder / "special_tokens_map.json", special)
        config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": self.max_length}
        write_json(folder / "tokenizer_config.json", {**config, **special})

    def add_word(self, word: str, token_ids: Sequence[int]) -> None:
        """From now on ``word``, wherever it stands in a text, is these tokens; they are all of that word.

        Raises :class:`UsageError` for a word that the tokenizer has already.
        """
        self.refuse_known(word)
        self._engine.add_special_tokens([AddedToken(word, single_word=True, normalized=False)])
        spoken = self._engine.token_to_id(word)
        assert spoken is not None
        self._meanings[spoken] = tuple(token_ids)

    def refuse_known(self, word: str) -> None:
        """Raise :class:`UsageError` for a word that cannot be added."""
        known = any(self._engine.token_to_id(one) is not None for one in (word, f"{word.lower()}{WORD_END}"))
        if not word.strip() or known:
            raise UsageError(f"{word!r} is a token already, or nothing: give another word for what is added")

    def __call__(self, texts: str | Sequence[str]) -> Int[Tensor, "batch length"]:
        """Token ids, each text cut or padded to ``max_length``: BOS, the text, EOS, and EOS as padding."""
        texts = [texts] if isinstance(texts, str) else list(texts)
        rows = [self.padded([token.id for token in self.tokens(text)]) for text in texts]
        return torch.tensor(rows, dtype=torch.int64).reshape(len(texts), self.max_length)

    def padded(self, token_ids: Sequence[int]) -> list[int]:
        """Ids of a text between BOS and EOS, cut or padded with EOS to ``max_length``."""
        kept = list(token_ids)[: self.max_length - 2]
        return [self.vocab[BOS], *kept, *[self.eos] * (self.max_length - 1 - len(kept))]

    def tokens(self, text: str) -> list[Token]:
        """The tokens of a text, without BOS and EOS, however many there are."""
        encoding = self._engine.encode(text)
        return [
            Token(id=token_id, start=start, end=end)
            for spoken, (start, end) in zip(encoding.ids, encoding.offsets, strict=True)
            for token_id in self._meanings.get(spoken, (spoken,))
        ]

    def words(self, text: str) -> Words:
        """Find the words of a plain text, and their tokens, in one chunk.

        A prompt as people write it, long or with weights, has its words in :meth:`gobelin.Pipeline.words`.
        """
        return self.words_of(text, [self.tokens(text)[: self.max_length - 2]])

    def words_of(self, text: str, chunks: Sequence[Sequence[Token]], borders: Collection[int] = ()) -> Words:
        """Find the words of a text whose tokens were put into chunks of ``max_length`` each.

        Words end at ``borders`` too, where weights change. A word without a token is left out.
        """
        kinds: list[TokenKind] = []
        placed: list[tuple[Token, int]] = []
        for number, chunk in enumerate(chunks):
            placed += [(token, number * self.max_length + 1 + place) for place, token in enumerate(chunk)]
            kinds.append("bos")
            kinds.extend("text" for _ in chunk)
            kinds.append("eos")
            kinds.extend("padding" for _ in range(self.max_length - 2 - len(chunk)))
        spans, first = [], 0
        for word, start, end in split_words(text, borders):
            while first < len(placed) and placed[first][0].end <= start:
                first += 1
            last = first
            while last < len(placed) and placed[last][0].start < end:
                last += 1
            if positions := tuple(place for _, place in placed[first:last]):
                spans.append(WordSpan(word=word, start=start, end=end, tokens=positions))
        return Words(text=text, spans=tuple(spans), kinds=tuple(kinds))


def _from_tokenizer_json(file: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges of a file of the ``tokenizers`` library."""
    content = read_json(file)
    try:
        model, added = content["model"], content.get("added_tokens", [])
        pairs = [pair.split() if isinstance(pair, str) else pair for pair in model["merges"]]
        vocab = {**model["vocab"], **{token["content"]: token["id"] for token in added}}
        return vocab, [(left, right) for left, right in pairs]
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{file} is not a byte-pair tokenizer's: {error!r}") from error


def _engine(model: models.BPE) -> Engine:
    engine = Engine(model)
    engine.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    engine.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return engine
