"""Scaled dot-product attention: the one operation by which words reach pixels, and its probabilities.

Every attention in Gobelin, in the U-Net, the VAE and the text encoder, goes through :func:`attention`. That is a fused
kernel, which never returns its probabilities. :func:`attention_probs` computes them beside it, when a :class:`Probe`
asks for them.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from gobelin import kernels
from gobelin.errors import UsageError
from gobelin.head_weights import HeadWeights
from gobelin.validation import Fraction, shown, validate_fields

Reduction = Literal["none", "heads"]


def attention(
    query: Float[Tensor, "batch heads queries width"],
    key: Float[Tensor, "batch heads keys width"],
    value: Float[Tensor, "batch heads keys width"],
    mask: Bool[Tensor, "#batch #heads #queries keys"] | None = None,
    causal: bool = False,
) -> Float[Tensor, "batch heads queries width"]:
    """Scaled dot-product attention, softmax(Q Kᵀ / √width) V, per head (Vaswani et al. 2017, equation 1).

    ``mask`` is True where a query may attend to a key: the field's convention, and the opposite of a
    ``masked_fill(mask, -inf)``. ``causal`` lets a query attend to itself and to what stands before it.

    On a CPU a kernel of ours may compute it: in bfloat16, with first derivatives alone; in float32, where no gradients
    are wanted.
    """
    # Kernels are imported where they are used: the import of one takes time, and its first use compiles it.
    if _may_be_ours(query, key, value) and not causal:
        if query.requires_grad or key.requires_grad or value.requires_grad:
            if query.dtype == torch.bfloat16 and query.requires_grad and mask is None:
                from gobelin.kernels import fused_attention

                if fused_attention.takes_training(query, key, value):
                    return fused_attention.fused_attention(query, key, value)
                return torch.softmax(query * query.shape[-1] ** -0.5 @ key.transpose(-1, -2), dim=-1) @ value
        elif query.dtype == torch.bfloat16:
            from gobelin.kernels import tiled_attention as tiled
            from gobelin.kernels import vector_attention as vectors

            if tiled.takes_painting(query, key, value, mask):
                attend = tiled.tiled_attention if torch.compiler.is_compiling() else tiled.attend
                return attend(query, key, value, mask)
            if vectors.takes_bfloat16(query, key, value, mask):
                attend = vectors.vector_attention if torch.compiler.is_compiling() else vectors.attend_in_bfloat16
                return attend(query, key, value, mask)
        elif query.dtype == torch.float32:
            from gobelin.kernels import vector_attention as vectors

            if vectors.takes_float32(query, key, value, mask):
                attend = vectors.vector_attention if torch.compiler.is_compiling() else vectors.attend_in_float32
                return attend(query, key, value, mask)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal)


def training_attention() -> Literal["fused", "plain"]:
    """Name what :func:`attention` is while it trains in bfloat16 on this CPU: a kernel of ours, or plain products."""
    from gobelin.kernels.fused_attention import is_available

    return "fused" if is_available() else "plain"


def attention_probs(
    query: Float[Tensor, "batch heads queries width"],
    key: Float[Tensor, "batch heads keys width"],
    mask: Bool[Tensor, "#batch #heads #queries keys"] | None = None,
) -> Float[Tensor, "batch heads queries keys"]:
    """Attention probabilities, softmax(Q Kᵀ / √width), in float32; rows sum to 1, ``mask`` as in :func:`attention`."""
    logits = query.float() * query.shape[-1] ** -0.5 @ key.float().transpose(-1, -2)
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf)
    return torch.softmax(logits, dim=-1)


@dataclass(frozen=True, kw_only=True)
class ExtraWords:
    """Words beside a text, as what patches would attend to if one of them stood there too.

    ``embeddings`` are the text embeddings of their tokens, a word's after the other's, and ``lengths`` say how many
    tokens each has.
    """

    embeddings: Float[Tensor, "extra text_width"]
    lengths: tuple[int, ...]


def extra_shares(
    query: Float[Tensor, "batch heads queries width"],
    key: Float[Tensor, "batch heads keys width"],
    mask: Bool[Tensor, "#batch #heads #queries keys"] | None,
    extra: Float[Tensor, "heads extra width"],
    lengths: Sequence[int],
) -> Float[Tensor, "batch heads queries extra"]:
    """Shares of attention that extra words would take, each if it alone stood beside all keys: float32.

    A word of the tokens W takes Σ_W exp(l) / (Σ_keys exp(l) + Σ_W exp(l)), l being query · key / √width, and its tokens
    share that out. So a word's share depends on no other extra word, and one that says little to a patch is small
    beside what the keys say. The keys' own probabilities stay as they are.
    """
    query = query.float() * query.shape[-1] ** -0.5
    logits = query @ key.float().transpose(-1, -2)
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf)
    beside = query @ extra.float().transpose(-1, -2) - logits.logsumexp(dim=-1, keepdim=True)
    shares = []
    for word in beside.split(list(lengths), dim=-1):
        odds = word.logsumexp(dim=-1, keepdim=True)
        shares.append((word - odds).exp() * odds.sigmoid())
    return torch.cat(shares, dim=-1)


@dataclass(frozen=True, kw_only=True)
class AttentionSite:
    """Name one attention of a U-Net.

    ``name`` is its state-dict prefix; ``kind`` is "self" (attn1: patches to patches) or "cross" (attn2: patches to
    words); a patch of it covers ``downscale`` × ``downscale`` latents.
    """

    name: str
    kind: Literal["self", "cross"]
    downscale: int
    heads: int

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Count rows and columns of its patches, for latents of that height and width: every halving rounds up."""
        return -(-height // self.downscale), -(-width // self.downscale)


AttentionMaps = dict[AttentionSite, Tensor]
"""Probabilities by site: [B, patches, keys], a mean over heads, or [B, heads, patches, keys].

Where extra words are looked for, their tokens' shares (:func:`extra_shares`) follow the keys of cross-attention.
"""

AttentionChange = Callable[[AttentionSite, Tensor], Tensor]
"""``change(site, probs) -> probs``, both [B, heads, patches, keys]; returning equal ones changes no bit."""

Sites = str | Callable[[AttentionSite], bool] | Sequence[AttentionSite] | None
"""A choice of sites: a pattern of names, a predicate, the sites themselves, or None for all cross-attention."""


def choose_sites(there: Sequence[AttentionSite], choice: Sites = None) -> tuple[AttentionSite, ...]:
    """Choose among the sites that are ``there``, keeping their order.

    A pattern has ``*`` for anything: ``"*attn2"``, ``"up_blocks.1.*"``. Raises :class:`UsageError` that lists what
    there is for a choice that matches none; an empty sequence chooses none on purpose.
    """
    if choice is None:
        return tuple(site for site in there if site.kind == "cross")
    if isinstance(choice, str):
        chosen = tuple(site for site in there if fnmatchcase(site.name, choice))
    elif callable(choice):
        chosen = tuple(site for site in there if choice(site))
    elif not isinstance(choice, Sequence):
        raise UsageError(f"sites is {shown(choice)}: give a pattern such as '*attn2', a function of a site, or sites")
    elif not choice:
        return ()
    else:
        chosen = tuple(site for site in there if site in choice)
    if not chosen:
        what = f"the pattern {choice!r}" if isinstance(choice, str) else "the choice of sites"
        raise UsageError(
            f"{what} matches no attention of this U-Net, which has {', '.join(site.name for site in there) or 'none'}"
        )
    return chosen


def choose_layers(there: Sequence[str], layers: str | Sequence[str]) -> tuple[str, ...]:
    """Choose layers by their names, or by patterns of them as in :func:`choose_sites`, keeping their order.

    Raises :class:`UsageError`, with a list of the layers, for a name or a pattern that matches none.
    """
    patterns = [layers] if isinstance(layers, str) else layers
    if not isinstance(patterns, Sequence) or not patterns or not all(isinstance(one, str) for one in patterns):
        raise UsageError(f"layers is {shown(layers)}: give a name, as in 'up_blocks.1.attentions.0', or several")
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in there):
            raise UsageError(f"{pattern!r} matches no layer of this U-Net, which has {', '.join(there)}")
    return tuple(name for name in there if any(fnmatchcase(name, pattern) for pattern in patterns))


@dataclass(frozen=True, kw_only=True)
class Trace:
    """Choose which attention maps to keep while sampling: of which ``sites`` (:func:`choose_sites`), heads and steps.

    Maps are means over heads and steps, unless ``per_head`` or ``per_step`` keeps each apart. Only steps from the share
    ``start`` (0 to 1) of the way from noise to image on are kept, measured in timesteps, and always the last one.
    ``sharp`` chooses sites and start itself, for maps that point best, with ``head_weights`` where the model has such:
    heads are kept apart then. ``also`` are words or phrases that the prompt need not have: their maps are computed
    beside (:func:`extra_shares`), and change nothing. ``negative`` keeps the maps of the negative prompt too.
    """

    sites: Sites = None
    per_head: bool = False
    per_step: bool = False
    start: Fraction = 0.0
    sharp: bool = False
    also: Annotated[Sequence[str], "words or phrases, as in ('dog', 'a shadow')"] = ()
    negative: bool = False
    head_weights: HeadWeights | None = None

    def __post_init__(self) -> None:
        validate_fields(self, but=("sites", "head_weights"))
        if not all(word.strip() for word in self.also):
            raise UsageError("also has an empty word: leave it out")
        object.__setattr__(self, "also", tuple(dict.fromkeys(word.strip() for word in self.also)))


@dataclass(frozen=True, kw_only=True)
class _PartOfPainting:
    """Part of a painting in which attention is changed: some ``sites`` (:func:`choose_sites`), for a part of the way.

    It holds from the share ``start`` of the way from noise to image, measured in timesteps, until the share ``end``:
    0 is never, 1 until the image is done.
    """

    sites: Sites = None
    start: float = 0.0
    end: float = 1.0

    def holds(self, progress: float) -> bool:
        """Tell whether it holds at this share of the way."""
        return self.start <= progress and (progress < self.end or self.end >= 1)


@dataclass(frozen=True, kw_only=True)
class AttentionEdit(_PartOfPainting):
    """Change attention probabilities at some ``sites`` (:func:`choose_sites`), for a part of the way.

    It holds from the share ``start`` of the way from noise to image, measured in timesteps, until the share ``end``:
    0 is never, 1 until the image is done. One that only ``observes`` is left out of the passes that a guidance makes
    beside the painting's own.
    """

    change: AttentionChange
    observes: bool = False


@dataclass(frozen=True, kw_only=True)
class AttentionPatch(_PartOfPainting):
    """Activation patching: at some ``sites``, image ``target`` of the batch gets what image ``source`` has there.

    ``part`` "text" takes keys and values of the other prompt's words, mask included, at cross-attention: what this site
    is told. "output" takes what the heads return: what this site says. ``heads`` None are all of them. Both images
    are painted in one batch; sites and part of the way are as in :class:`AttentionEdit`.
    """

    source: int
    target: int
    part: Literal["text", "output"] = "text"
    heads: Sequence[int] | None = None

    observes: ClassVar[bool] = False

    def apply(self, rows: Tensor) -> Tensor:
        """Copy the source's heads of [rows, heads, …] into the target's place; other rows and heads stay."""
        heads = list(range(rows.shape[1])) if self.heads is None else list(self.heads)
        patched = rows.clone()
        patched[self.target, heads] = rows[self.source, heads]
        return patched


AnyAttentionEdit = AttentionEdit | AttentionPatch
"""What changes attention: its probabilities, or what one image takes from another."""


@dataclass(frozen=True, kw_only=True)
class Probe:
    """Record attention maps in one forward pass, and change attention on the way.

    ``sites`` are recorded into ``maps``, as means over heads or, with ``reduce`` "none", head by head; ``edits`` change
    a site's attention, one after the other. Both concern the ``rows`` of the ``batch`` alone, and edits not the first
    ``unedited`` of these. Where that still repeats fewer rows, these alone attend, and all are returned only where an
    edit makes them differ. Shares of ``also`` are recorded behind those of the text. What the ``layers`` of those names
    return is kept as ``features``.
    """

    sites: Sequence[AttentionSite]
    reduce: Reduction
    batch: int
    rows: slice
    edits: Mapping[AttentionSite, Sequence[AnyAttentionEdit]]
    unedited: int = 0
    also: ExtraWords | None = None
    layers: Collection[str] = ()
    maps: AttentionMaps = field(default_factory=dict)
    features: dict[str, Tensor] = field(default_factory=dict)

    def attend(
        self,
        site: AttentionSite,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        key_of: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """Attend as :func:`attention` does, by the same kernel wherever no probability changes, and record the maps.

        ``key_of`` is the site's projection of text embeddings [tokens, D] to keys.
        """
        edits = self.edits.get(site, ())
        for patch in _patches(edits, "text"):
            key, value = (self._patched(operand, patch) for operand in (key, value))
            # A mask is the same for all heads, until some take another prompt's.
            mask = None if mask is None else self._patched(mask.expand(-1, query.shape[1], -1, -1), patch)
        attended = attention(query, key, value, mask)
        if site not in self.sites and not edits:
            return attended
        rows = self.rows_among(query.shape[0])
        mask = None if mask is None else mask[rows]
        probs = attention_probs(query[rows], key[rows], mask)
        changed = seen = probs[self.unedited :]
        for edit in edits:
            if isinstance(edit, AttentionEdit):
                changed = edit.change(site, changed.clone())
                if not isinstance(changed, Tensor) or changed.shape != seen.shape:
                    what = list(changed.shape) if isinstance(changed, Tensor) else type(changed).__name__
                    raise UsageError(
                        f"a control returned {what} at {site.name}: expected probabilities {list(seen.shape)}"
                    )
        if changed is not seen and not torch.equal(changed, seen):
            attended = self._repeated(attended)
            attended[self.rows][self.unedited :] = changed.to(value.dtype) @ value[rows][self.unedited :]
            probs = torch.cat([probs[: self.unedited], changed])
        for patch in _patches(edits, "output"):
            attended = self._patched(self._repeated(attended), patch)
        if site in self.sites:
            self.maps[site] = self._reduced(probs)
            if self.also is not None and site.kind == "cross":
                extra = key_of(self.also.embeddings).unflatten(-1, (site.heads, -1)).transpose(0, 1)
                beside = extra_shares(query[rows], key[rows], mask, extra, self.also.lengths)
                self.maps[site] = torch.cat([self.maps[site], self._reduced(beside)], dim=-1)
        return attended

    def keep(self, layer: str, features: Tensor) -> None:
        """Keep what a layer returns, where it is one of the layers."""
        if layer in self.layers:
            self.features[layer] = features

    def _reduced(self, probs: Tensor) -> Tensor:
        return probs.mean(dim=1) if self.reduce == "heads" else probs

    def rows_among(self, count: int) -> slice | list[int]:
        """Find the probe's rows among as many as the batch repeats."""
        return self.rows if count == self.batch else [row % count for row in range(self.batch)[self.rows]]

    def _repeated(self, rows: Tensor) -> Tensor:
        """Repeat rows to the whole batch, in a tensor of their own."""
        return torch.cat([rows] * (self.batch // rows.shape[0]))

    def _patched(self, operand: Tensor, patch: AttentionPatch) -> Tensor:
        """Patch the probe's rows of an operand or an output, which has those of the whole batch."""
        patched = operand.clone()
        patched[self.rows][self.unedited :] = patch.apply(operand[self.rows][self.unedited :])
        return patched


def _patches(edits: Sequence[AnyAttentionEdit], part: str) -> list[AttentionPatch]:
    return [edit for edit in edits if isinstance(edit, AttentionPatch) and edit.part == part]


@dataclass(frozen=True, kw_only=True)
class AttentionTensors:
    """The tensors of one attention in one pass, by rows of the batch: ``query`` and ``output`` [B, heads, patches, d],
    ``key`` and ``value`` [B, heads, keys, d], ``probs`` [B, heads, patches, keys] in float32.

    ``probs`` are those after every change, and ``output`` is what came of them, before the heads are joined.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    probs: Tensor
    output: Tensor


@dataclass(frozen=True, kw_only=True)
class TensorProbe(Probe):
    """A probe of a whole batch that keeps every tensor of the recorded sites, head by head."""

    tensors: dict[AttentionSite, AttentionTensors] = field(default_factory=dict)

    def attend(
        self,
        site: AttentionSite,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        key_of: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """Attend as :class:`Probe` does, and keep the tensors."""
        attended = super().attend(site, query, key, value, mask, key_of)
        if site in self.sites:
            self.tensors[site] = AttentionTensors(
                query=query, key=key, value=value, probs=self.maps[site], output=attended
            )
        return attended


def _may_be_ours(*tensors: Tensor) -> bool:
    """Tell whether a kernel of ours may be used: on a CPU, not in what is recorded for others, nor inside vmap."""
    if tensors[0].device.type != "cpu" or kernels.leave_gobelin():
        return False
    if torch.compiler.is_compiling():
        return True
    return not any(torch._C._functorch.is_functorch_wrapped_tensor(each) for each in tensors)  # pyright: ignore
