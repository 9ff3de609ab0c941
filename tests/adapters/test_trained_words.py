"""A word that is trained: its embeddings beside the frozen table, and the captions that have it."""

import dataclasses
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from gobelin.adapters.trained_words import (
    add_trained_word_,
    check_new_word,
    count_captioned,
    trained_vectors,
    write_word,
)
from gobelin.errors import UsageError


@pytest.fixture
def model(clip_model: Any) -> Any:
    """A small model with a tokenizer of its own: the fixture's is shared."""
    made = clip_model()
    return dataclasses.replace(made, tokenizer=deepcopy(made.tokenizer))


def test_only_the_vectors_of_the_word_are_trained(model) -> None:
    ids = model.tokenizer(["a photo of a dog"])
    before = model.text_encoder(ids)
    table = model.text_encoder.text_model.embeddings.token_embedding.weight.detach().clone()
    embedding = add_trained_word_(model.text_encoder, model.tokenizer, "<mine>", "", 2)
    trained = [name for name, one in model.text_encoder.named_parameters() if one.requires_grad]
    assert trained == ["text_model.embeddings.token_embedding.vectors"]
    assert torch.equal(trained_vectors(model.text_encoder), table.mean(dim=0).expand(2, -1)), "the mean of all words"
    assert torch.equal(model.text_encoder(ids), before)
    new = model.tokenizer(["a photo of <mine>"])
    assert (new >= len(table)).sum() == 2, "a place for each vector"
    model.text_encoder(new).square().sum().backward()
    assert embedding.vectors.grad is not None
    assert embedding.vectors.grad.abs().min() > 0
    assert embedding.base.weight.grad is None


def test_a_word_begins_as_others(model) -> None:
    table = model.text_encoder.text_model.embeddings.token_embedding.weight.detach().clone()
    ids = [token.id for token in model.tokenizer.tokens("red circle")]
    embedding = add_trained_word_(model.text_encoder, model.tokenizer, "<mine>", "red circle", 3)
    assert torch.equal(embedding.vectors.detach(), table[[ids[0], ids[1], ids[0]]])
    assert torch.equal(embedding.weight[:-3], table)


def test_captions_with_the_word_are_found_as_the_tokenizer_finds_it(model) -> None:
    tokenizer = model.tokenizer
    captions = [("a zork",), ("a ZORK, red", "other"), ("zorks",), ("other", "zork")]
    assert count_captioned(tokenizer, "zork", captions) == 3
    assert not tokenizer.knows("zork"), "the tokenizer is as it was"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("dog", "", 1), "new_word.word is 'dog', which this model has already: give another"),
        (("<" + "x" * 9999 + ">", "", 1), "new_word.word has 10,001 characters: give"),
        (("<mine>", " ", 1), "new_word.begin is ' ': give a word that the model knows"),
        (("<mine>", "", 76), "new_word.vectors is 76: give 75 at most, the places of a prompt of this model"),
    ],
)
def test_words_that_cannot_be_trained_are_refused(model, arguments, sentence) -> None:
    with pytest.raises(UsageError) as caught:
        check_new_word(model.tokenizer, *arguments)
    assert str(caught.value).startswith(sentence)
    with pytest.raises(UsageError):
        add_trained_word_(model.text_encoder, model.tokenizer, *arguments)
    check_new_word(model.tokenizer, "<mine>", "", 75)


@pytest.mark.parametrize(("word", "file"), [("<mine>", "mine"), ("a/b c", "a-b-c"), ("<>", "word"), ("..", "word")])
def test_the_file_is_called_like_the_word(tmp_path: Path, word: str, file: str) -> None:
    path = write_word(tmp_path, word, torch.ones(2, 4))
    assert path == tmp_path / f"{file}.safetensors"
    assert {name: tuple(one.shape) for name, one in load_file(path).items()} == {word: (2, 4)}
