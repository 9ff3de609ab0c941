"""What the tests of edits and wishes share."""

import pytest

from gobelin.attention import AttentionSite
from gobelin.pipeline import Pipeline
from gobelin.tokenizer import Tokenizer

SITE = AttentionSite(name="up.attn2", kind="cross", downscale=1, heads=2)
COARSE = AttentionSite(name="mid.attn2", kind="cross", downscale=2, heads=2)
SIZE = (4, 6)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """One that knows "red" and "ring", and splits what it does not know."""
    return Tokenizer.train(["a red ring of blue and a red ring"] * 9, vocab_size=530, max_length=20)


@pytest.fixture(scope="session")
def pipe(trained) -> Pipeline:
    return Pipeline.from_pretrained(trained)
