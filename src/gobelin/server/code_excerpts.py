"""Code excerpts: the functions that "How it works" on the page speaks of, as they run here, their key lines marked."""

import inspect
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gobelin
from gobelin.attention import attention, attention_probs
from gobelin.control.ablations import remove_bos, shuffle_words, silence_site
from gobelin.layers import Attention
from gobelin.look.sharp_maps import sharpen
from gobelin.samplers.first_order import ddim
from gobelin.tokenizer import Tokenizer
from gobelin.unet import BasicTransformerBlock

# A part's function, and how the lines begin that are marked in it.
_PARTS: dict[str, tuple[Callable[..., Any], tuple[str, ...]]] = {
    "tokens": (Tokenizer.padded, ("return [self.vocab[BOS]",)),
    "step": (ddim, ("output = denoise", "latents = math.sqrt")),
    "query": (Attention.forward, ("for projected in (self.to_q",)),
    "softmax": (attention_probs, ("logits = query", "return torch.softmax")),
    "mix": (attention, ("return F.scaled_dot_product_attention",)),
    "block": (BasicTransformerBlock.forward, ("attended = self._attend_to_patches", "hidden = hidden + self.attn2")),
    "sharpen": (sharpen, ("gathered = own", "return share")),
    "shuffle_words": (shuffle_words, ("changed[row, ..., tokens] =",)),
    "silence_site": (silence_site, ("return AttentionEdit",)),
    "remove_bos": (remove_bos, ("kept[row, ..., tokens] = 0", "return kept /")),
}


def code_excerpts() -> dict[str, dict[str, Any]]:
    """Return each part's ``name``, ``file`` and ``source``, the ``line`` that this begins at, and those ``marked``."""
    return {part: _excerpt(function, marks) for part, (function, marks) in _PARTS.items()}


def _excerpt(function: Callable[..., Any], marks: tuple[str, ...]) -> dict[str, Any]:
    lines, first = inspect.getsourcelines(function)
    file = Path(inspect.getsourcefile(inspect.unwrap(function)) or "")
    return {
        "name": function.__qualname__,
        "file": file.relative_to(Path(gobelin.__file__).parents[1]).as_posix(),
        "line": first,
        "source": textwrap.dedent("".join(lines)).rstrip(),
        "marked": [first + place for place, line in enumerate(lines) if line.strip().startswith(marks)],
    }
