"""What the tests of controls share."""

import pytest
import torch
from torch import Tensor

from gobelin.attention import AttentionSite, choose_sites
from gobelin.control import AnyControl, Batch
from gobelin.control.batch import attach_controls
from gobelin.pipeline import Pipeline
from gobelin.tokenizer import Tokenizer
from gobelin.words import Words

SITE = AttentionSite(name="up.attn2", kind="cross", downscale=1, heads=2)
COARSE = AttentionSite(name="mid.attn2", kind="cross", downscale=2, heads=2)
SELF = AttentionSite(name="mid.attn1", kind="self", downscale=2, heads=2)
SIZE = (4, 6)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """One that knows "red" and "ring", and splits what it does not know."""
    return Tokenizer.train(["a red ring of blue and a red ring"] * 9, vocab_size=530, max_length=20)


@pytest.fixture(scope="session")
def pipe(trained) -> Pipeline:
    return Pipeline.from_pretrained(trained)


def batch_of(*words: Words, size: tuple[int, int] = SIZE) -> Batch:
    """A batch of these prompts, at the longest one's length."""
    length = max(one.length for one in words)
    return Batch(
        words=tuple(one.at_length(length) for one in words),
        latent_size=size,
        channels=4,
        sites=(SITE, COARSE, SELF),
    )


def probabilities(batch: Batch, site: AttentionSite = SITE) -> Tensor:
    """Random attention probabilities of a site, nothing for what is masked."""
    rows, columns = batch.grid(site)
    keys = batch.words[0].length if site.kind == "cross" else rows * columns
    logits = torch.randn(len(batch), site.heads, rows * columns, keys)
    if site.kind == "cross":
        for row, words in enumerate(batch.words):
            logits[row, ..., list(words.part("masked"))] = -torch.inf
    return logits.softmax(dim=-1)


def changed(control: AnyControl, batch: Batch, probs: Tensor, site: AttentionSite = SITE) -> Tensor:
    """What a control makes of a site's probabilities at the start of the way."""
    for edit in attach_controls([control], batch).edits:
        if site in choose_sites(batch.sites, edit.sites) and edit.holds(0.0):
            probs = edit.change(site, probs)
    return probs
