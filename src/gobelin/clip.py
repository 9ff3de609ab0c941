"""The CLIP text encoder, tokens to text embeddings, and the image encoder that it is trained against.

CLIP (Radford et al. 2021, arXiv 2103.00020): :class:`TextEncoder` is its text transformer at any size, keys and
numbers as in transformers' ``CLIPTextModel``; :class:`ImageEncoder` is a small convolutional counterpart of our
own; :func:`contrastive_loss` trains the two.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from gobelin.attention import attention
from gobelin.errors import UsageError
from gobelin.formats.component import Component
from gobelin.layers import Downsample2D, ResnetBlock2D
from gobelin.operations import LayerNorm
from gobelin.validation import Count, PositiveNumber, WholeNumber, validate_fields


@dataclass(frozen=True, kw_only=True)
class TextEncoderConfig:
    """The configuration of a text encoder; fields as in transformers' ``text_encoder/config.json``.

    Raises :class:`UsageError` for one that cannot be built.
    """

    vocab_size: Count
    hidden_size: Count
    intermediate_size: Count
    num_hidden_layers: Count
    num_attention_heads: Count
    max_position_embeddings: Count = 77
    hidden_act: Literal["quick_gelu", "gelu"] = "quick_gelu"
    layer_norm_eps: PositiveNumber = 1e-5
    bos_token_id: WholeNumber
    eos_token_id: WholeNumber
    pad_token_id: WholeNumber

    fixed: ClassVar[dict[str, Any]] = {"attention_dropout": 0.0}

    def __post_init__(self) -> None:
        validate_fields(self)
        if self.hidden_size % self.num_attention_heads:
            raise UsageError(
                f"hidden_size {self.hidden_size} must divide into {self.num_attention_heads} heads "
                "(num_attention_heads)"
            )

    @classmethod
    def sd15(cls) -> Self:
        """Configure Stable Diffusion 1.5's text encoder, of CLIP ViT-L/14: 123,060,480 parameters."""
        return cls.of(768, layers=12, heads=12, vocab_size=49408)

    @classmethod
    def of(cls, width: int, *, layers: int, heads: int, vocab_size: int, max_position_embeddings: int = 77) -> Self:
        """Configure an encoder by width, depth and heads, for a vocabulary that ends with its BOS and EOS tokens."""
        return cls(
            vocab_size=vocab_size,
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            max_position_embeddings=max_position_embeddings,
            bos_token_id=vocab_size - 2,
            eos_token_id=vocab_size - 1,
            pad_token_id=vocab_size - 1,
        )


def _quick_gelu(hidden: Tensor) -> Tensor:
    """Approximate GELU by x · sigmoid(1.702 x), as CLIP was trained (OpenAI's ``QuickGELU``)."""
    return hidden * torch.sigmoid(1.702 * hidden)


# What a file of CLIP has beside its text encoder.
_BESIDE_TEXT = re.compile(
    r"(vision_model\.|visual_projection\.|text_projection\.|logit_scale$|(text_model\.)?embeddings\.position_ids$)"
)
# Of the text encoders that other families have, or have beside one of 768.
_FAMILY_BY_WIDTH = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 1280: "Stable Diffusion XL"}
_ACTIVATIONS = {"quick_gelu": _quick_gelu, "gelu": F.gelu}


class CLIPAttention(nn.Module):
    """Causal multi-head self-attention, with the names of CLIP's weights."""

    def __init__(self, config: TextEncoderConfig):
        super().__init__()
        width = config.hidden_size
        self.heads = config.num_attention_heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, hidden: Float[Tensor, "batch length width"]) -> Float[Tensor, "batch length width"]:
        query, key, value = (
            rearrange(projection(hidden), "b length (heads d) -> b heads length d", heads=self.heads)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        attended = attention(query, key, value, causal=True)
        return self.out_proj(rearrange(attended, "b heads length d -> b length (heads d)"))


class CLIPMLP(nn.Module):
    """Feed-forward layer of the transformer."""

    def __init__(self, config: TextEncoderConfig):
        super().__init__()
        self.activation = _ACTIVATIONS[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden: Float[Tensor, "batch length width"]) -> Float[Tensor, "batch length width"]:
        return self.fc2(self.activation(self.fc1(hidden)))


class CLIPEncoderLayer(nn.Module):
    """Pre-norm transformer layer: attention, then feed-forward, each added to a residual."""

    def __init__(self, config: TextEncoderConfig):
        super().__init__()
        self.self_attn = CLIPAttention(config)
        self.layer_norm1 = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = CLIPMLP(config)
        self.layer_norm2 = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, hidden: Float[Tensor, "batch length width"]) -> Float[Tensor, "batch length width"]:
        hidden = hidden + self.self_attn(self.layer_norm1(hidden))
        return hidden + self.mlp(self.layer_norm2(hidden))


class CLIPTextEmbeddings(nn.Module):
    """Token embedding plus position embedding."""

    def __init__(self, config: TextEncoderConfig):
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def forward(self, token_ids: Int[Tensor, "batch length"]) -> Float[Tensor, "batch length width"]:
        return self.token_embedding(token_ids) + self.position_embedding.weight[: token_ids.shape[1]]


class CLIPEncoder(nn.Module):
    """The transformer's layers, one after the other."""

    def __init__(self, config: TextEncoderConfig):
        super().__init__()
        self.layers = nn.ModuleList(CLIPEncoderLayer(config) for _ in range(config.num_hidden_layers))

    def forward(self, hidden: Float[Tensor, "batch length width"], count: int) -> Float[Tensor, "batch length width"]:
        """Run the first ``count`` layers."""
        for layer in self.layers[:count]:
            hidden = layer(hidden)
        return hidden


class CLIPTextTransformer(nn.Module):
    """Embeddings, layers, final norm: ``text_model`` in CLIP's files."""

    def __init__(self, config: TextEncoderConfig):
        super().__init__()
        self.embeddings = CLIPTextEmbeddings(config)
        self.encoder = CLIPEncoder(config)
        self.final_layer_norm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)


class TextEncoder(Component[TextEncoderConfig]):
    """CLIP's text transformer; its last hidden state, after the final norm, is the U-Net's text embeddings."""

    config_class = TextEncoderConfig
    class_name = "CLIPTextModel"
    weights_name = "model.safetensors"

    def __init__(self, config: TextEncoderConfig):
        super().__init__(config)
        self.text_model = CLIPTextTransformer(config)

    def forward(
        self, token_ids: Int[Tensor, "batch length"], clip_skip: int = 0
    ) -> Float[Tensor, "batch length width"]:
        """Encode padded token ids, leaving out the last ``clip_skip`` layers.

        Raises :class:`UsageError` for a ``clip_skip`` that leaves no layer.
        """
        depth = self.config.num_hidden_layers
        if not 0 <= clip_skip < depth:
            raise UsageError(f"clip_skip is {clip_skip}: give a number from 0 to {depth - 1}")
        hidden = self.text_model.embeddings(token_ids)
        return self.text_model.final_layer_norm(self.text_model.encoder(hidden, depth - clip_skip))

    def pooled(
        self, token_ids: Int[Tensor, "batch length"], text_embeddings: Float[Tensor, "batch length width"]
    ) -> Float[Tensor, "batch width"]:
        """Pool text embeddings: take the one at the first EOS token, which alone has attended to the whole text.

        In older configurations of CLIP ``eos_token_id`` is 2 and the EOS token is the largest id (transformers,
        ``modeling_clip.py``).
        """
        eos = self.config.eos_token_id
        ends = (token_ids if eos == 2 else (token_ids == eos).int()).argmax(dim=1)
        return text_embeddings[torch.arange(len(token_ids), device=token_ids.device), ends]

    @torch.no_grad()
    def add_vectors(self, vectors: Float[Tensor, "count width"]) -> list[int]:
        """Add token embeddings, such as a textual inversion's, after the last one; return their new ids.

        Raises :class:`UsageError` for vectors of another width.
        """
        table, config = self.text_model.embeddings.token_embedding, self.config
        if vectors.shape[-1] != config.hidden_size:
            of = _FAMILY_BY_WIDTH.get(vectors.shape[-1], "another model")
            raise UsageError(
                f"the vectors are {vectors.shape[-1]} wide, and this text encoder's {config.hidden_size}: they were "
                f"made for {of}"
            )
        grown = torch.cat([table.weight, vectors.to(table.weight)])
        self.text_model.embeddings.token_embedding = nn.Embedding.from_pretrained(grown, freeze=False)
        self.config = replace(config, vocab_size=len(grown))
        return list(range(config.vocab_size, len(grown)))

    def keep_vectors(self, count: int) -> None:
        """Keep the first ``count`` token embeddings, and drop those after them."""
        table = self.text_model.embeddings.token_embedding
        if count < len(table.weight):
            kept = table.weight.detach()[:count].clone()
            self.text_model.embeddings.token_embedding = nn.Embedding.from_pretrained(kept, freeze=False)
            self.config = replace(self.config, vocab_size=count)

    def init_(self) -> Self:
        """Draw initial weights for training from scratch (CLIP's code, ``CLIP.initialize_parameters``)."""
        width, depth = self.config.hidden_size, self.config.num_hidden_layers
        nn.init.normal_(self.text_model.embeddings.token_embedding.weight, std=0.02)
        nn.init.normal_(self.text_model.embeddings.position_embedding.weight, std=0.01)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=width**-0.5)
                nn.init.zeros_(module.bias)
        for layer in self.text_model.encoder.layers:
            assert isinstance(layer, CLIPEncoderLayer)
            nn.init.normal_(layer.self_attn.out_proj.weight, std=(2 * depth * width) ** -0.5)
            nn.init.normal_(layer.mlp.fc1.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(layer.mlp.fc2.weight, std=(2 * depth * width) ** -0.5)
        return self

    @classmethod
    def map_names(cls, names: Iterable[str]) -> dict[str, str]:
        """Map the names of a file to keys, with the prefix that newer transformers leaves out.

        Older versions of transformers save position ids, and a file of a whole CLIP has its image encoder too.
        """
        return {
            name: name if name.startswith("text_model.") else f"text_model.{name}"
            for name in names
            if not _BESIDE_TEXT.match(name)
        }

    def config_json(self) -> dict[str, Any]:
        """Write the fields of transformers' ``config.json``.

        ``dtype`` is what transformers computes in, whatever the precision of the weights: from version 5 on it would
        keep the stored one where none is named, while diffusers loads U-Net and VAE in float32.
        """
        content = super().config_json()
        del content["_class_name"], content["_diffusers_version"]
        return {"architectures": [self.class_name], "model_type": "clip_text_model", "dtype": "float32", **content}


# Pooled features and few channels with places told shapes apart better than flattened features (decisions, "The text
# encoder learns at a tenth of the rate").
_PLACE_CHANNELS = 16
IMAGE_ENCODER = "image_encoder"
"""The folder of an :class:`ImageEncoder` in that of its model."""


@dataclass(frozen=True, kw_only=True)
class ImageEncoderConfig:
    """The configuration of the image encoder, and of the space that it shares with the text encoder.

    Raises :class:`UsageError` for an ``image_size`` that does not halve once a level.
    """

    image_size: Count = 64
    block_out_channels: tuple[Count, ...] = (32, 64, 96)
    norm_num_groups: Count = 8
    text_width: Count
    projection_dim: Count

    def __post_init__(self) -> None:
        validate_fields(self)
        if self.image_size % 2 ** (len(self.block_out_channels) + 1):
            raise UsageError(
                f"image_size is {self.image_size}: give a multiple of {2 ** (len(self.block_out_channels) + 1)}"
            )


class ImageEncoder(Component[ImageEncoderConfig]):
    """A small convolutional image encoder, with the projections of image and text into a shared space.

    It serves training and scoring, and is kept beside the model; generating images does not need it.
    """

    config_class = ImageEncoderConfig
    class_name = "GobelinImageEncoder"
    weights_name = "model.safetensors"

    def __init__(self, config: ImageEncoderConfig):
        super().__init__(config)
        widths, groups = config.block_out_channels, config.norm_num_groups
        self.stem = nn.Sequential(
            nn.Conv2d(3, widths[0] // 2, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(widths[0] // 2, widths[0], 3, stride=2, padding=1),
        )
        blocks: list[nn.Module] = []
        for width, next_width in pairwise(widths):
            blocks += [ResnetBlock2D(width, next_width, groups=groups, eps=1e-5), Downsample2D(next_width, padding=1)]
        self.blocks = nn.Sequential(*blocks, ResnetBlock2D(widths[-1], widths[-1], groups=groups, eps=1e-5))
        self.places = nn.Conv2d(widths[-1], _PLACE_CHANNELS, 1)
        side = config.image_size // 2 ** (len(widths) + 1)
        self.image_projection = nn.Linear(2 * widths[-1] + _PLACE_CHANNELS * side**2, config.projection_dim)
        self.text_projection = nn.Linear(config.text_width, config.projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(1 / 0.07).log())  # CLIP's, section 2.5

    def forward(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch projection_dim"]:
        """Encode images in [-1, 1], resized to ``config.image_size``, to unit vectors."""
        size = self.config.image_size
        if images.shape[-2:] != (size, size):
            images = F.interpolate(images, size=(size, size), mode="bilinear", antialias=True)
        hidden = F.silu(self.blocks(self.stem(images)))
        pooled = (hidden.mean(dim=(2, 3)), hidden.amax(dim=(2, 3)))
        places = self.places(hidden).flatten(1)
        return F.normalize(self.image_projection(torch.cat([*pooled, places], dim=1)), dim=-1)

    def project_text(self, pooled: Float[Tensor, "batch text_width"]) -> Float[Tensor, "batch projection_dim"]:
        """Project pooled text embeddings to unit vectors of the shared space."""
        return F.normalize(self.text_projection(pooled), dim=-1)

    def similarity(
        self, images: Float[Tensor, "images projection_dim"], texts: Float[Tensor, "texts projection_dim"]
    ) -> Float[Tensor, "images texts"]:
        """Compute cosine similarities times the learned scale, which is held at 100 or less (CLIP, section 2.5)."""
        with torch.autocast(images.device.type, enabled=False):  # up to 100: bfloat16 would round them to ± 0.25
            return self.logit_scale.exp().clamp(max=100) * images.float() @ texts.float().T


def contrastive_loss(
    logits: Float[Tensor, "images texts"], same: Bool[Tensor, "images images"] | None = None
) -> Float[Tensor, ""]:
    """Compute CLIP's contrastive loss: each image finds its text among all, and each text its image (figure 3).

    ``logits`` are those of :meth:`ImageEncoder.similarity`. Texts beyond the number of images are hard negatives.
    ``same`` is True for pairs of the batch with equal captions, which share the target; by default none are equal.
    """
    count = len(logits)
    positives = torch.eye(count, device=logits.device) if same is None else same.float()
    positives = positives / positives.sum(dim=1, keepdim=True)
    find_text = -(F.pad(positives, (0, logits.shape[1] - count)) * logits.log_softmax(dim=1)).sum(dim=1)
    find_image = -(positives * logits[:, :count].T.log_softmax(dim=1)).sum(dim=1)
    return (find_text.mean() + find_image.mean()) / 2
