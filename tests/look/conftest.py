"""What the tests of looking share."""

import numpy as np
import pytest
from PIL import Image

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


def holds(sheet: Image.Image, part: Image.Image) -> bool:
    """Tell whether an image is somewhere on a sheet, pixel for pixel."""
    large, small = np.asarray(sheet), np.asarray(part.convert("RGB"))
    first = (large == small[0, 0]).all(axis=-1)
    height, width = small.shape[:2]
    return any(
        np.array_equal(large[y : y + height, x : x + width], small)
        for y, x in np.argwhere(first[: 1 - height or None, : 1 - width or None])
    )
