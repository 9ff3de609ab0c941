"""Learned words (textual inversions, Gal et al. 2022) of a model: added to text encoder and tokenizer, and removed."""

from dataclasses import dataclass, field
from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from gobelin.clip import TextEncoder
from gobelin.errors import UsageError
from gobelin.tokenizer import Tokenizer


@dataclass(repr=False)
class LearnedWords:
    """The words that were added to a model; each is one or several token embeddings after the text encoder's own."""

    tokenizer: Tokenizer
    text_encoder: TextEncoder
    _own: int = field(init=False)

    def __post_init__(self) -> None:
        self._own = self.text_encoder.config.vocab_size

    def add(
        self, vectors_by_word: dict[str, Float[Tensor, "_ width"]], source: Path, file_name: str | None = None
    ) -> None:
        """Add the words of the file ``source``; ComfyUI calls a word by ``file_name``, or by itself.

        Raises :class:`UsageError` for a word that is known and for vectors of another width; nothing is then added.
        """
        added: list[str] = []
        try:
            for word, vectors in vectors_by_word.items():
                self.tokenizer.refuse_known(word)
                self.tokenizer.add_word(word, self.text_encoder.add_vectors(vectors), file_name)
                added.append(word)
        except UsageError as error:
            self.remove(added)
            raise UsageError(f"{source}: {error}") from error

    def add_file_name(self, word: str, file_name: str) -> None:
        """Let a word's file name be found in prompts too, as in AUTOMATIC1111's web UI, unless it is known."""
        if not self.tokenizer.knows(file_name):
            self.tokenizer.add_word(file_name, [token.id for token in self.tokenizer.tokens(word)])

    def remove(self, words: list[str]) -> None:
        """Remove words; the text encoder is as it was before where none is left that came after them."""
        for word in words:
            self.tokenizer.remove_word(word)
        self.text_encoder.keep_vectors(max(self._own, self.tokenizer.first_free))
