"""Emoji judge: networks that recognise the concept and the style of a picture, and find what it looks like.

They learn from true pictures alone, moved, turned and blurred, and never from painted ones. A twentieth of the pictures
is kept from them, on which their own error is measured.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, UInt8
from safetensors.torch import save_file
from torch import Tensor, nn

from gobelin.clip import ImageEncoder, ImageEncoderConfig, contrastive_loss
from gobelin.data.emoji import fraction_of_names
from gobelin.data.emoji_set import EmojiSet
from gobelin.errors import ModelError
from gobelin.evaluate.intervals import Share
from gobelin.formats.files import replacing
from gobelin.formats.tensor_file import SafetensorsFile
from gobelin.images import images_to_tensor

_UNTOUCHED_SHARE = 0.05
_EVALUATED_AT_ONCE = 256
_FEATURES = 256
_TOP = 5


@dataclass(frozen=True, kw_only=True)
class JudgeConfig:
    """A judge's widths, and its training: optimizer steps, pictures in each, the highest learning rate, the seed."""

    widths: tuple[int, ...] = (32, 64, 128)
    steps: int = 1500
    batch_size: int = 128
    learning_rate: float = 2e-3
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Recognition:
    """Shares of pictures whose concept is right, at first or among five of all there are, and whose style is."""

    top1: Share
    top5: Share
    style: Share

    @classmethod
    def of(
        cls,
        scores: tuple[Float[Tensor, "images concepts"], Float[Tensor, "images styles"]],
        concept: Int[np.ndarray, " images"],
        style: Int[np.ndarray, " images"],
    ) -> "Recognition":
        """Compare scores with the truth."""
        concepts, styles = scores
        best = concepts.topk(min(_TOP, concepts.shape[1]), dim=1).indices.numpy()
        return cls(
            top1=Share.of((best[:, 0] == concept).tolist()),
            top5=Share.of((best == concept[:, None]).any(axis=1).tolist()),
            style=Share.of((styles.argmax(dim=1).numpy() == style).tolist()),
        )


class EmojiJudge(nn.Module):
    """A classifier of concepts and styles, and an encoder in whose space pictures that look alike are near.

    The two share nothing, so that what one overlooks the other need not.
    """

    def __init__(self, concepts: int, styles: int, widths: tuple[int, ...]):
        super().__init__()
        config = ImageEncoderConfig(block_out_channels=widths, text_width=1, projection_dim=_FEATURES)
        self.classifier = ImageEncoder(config)
        self.concepts = nn.Linear(_FEATURES, concepts, bias=False)
        self.styles = nn.Linear(_FEATURES, styles, bias=False)
        self.likeness = ImageEncoder(config)

    def forward(
        self, images: Float[Tensor, "batch 3 height width"]
    ) -> tuple[Float[Tensor, "batch concepts"], Float[Tensor, "batch styles"]]:
        """Score concepts and styles: cosines to each one's vector, times the classifier's scale."""
        features = self.classifier(images)
        scale = self.classifier.logit_scale.exp().clamp(max=100)
        scored = [scale * F.linear(features, F.normalize(head.weight, dim=1)) for head in (self.concepts, self.styles)]
        return scored[0], scored[1]

    def loss(
        self,
        images: Float[Tensor, "batch 3 height width"],
        concept: Int[Tensor, " batch"],
        style: Int[Tensor, " batch"],
        generator: torch.Generator,
    ) -> Float[Tensor, ""]:
        """Add the errors of both on two augmentations of a batch: cross-entropies, and the contrastive loss.

        The encoder learns to find a picture's other augmentation among those of all others of the batch (Chen et al.
        2020, SimCLR, arXiv 2002.05709).
        """
        first, second = augmented(images, generator), augmented(images, generator)
        concepts, styles = self(first)
        told = F.cross_entropy(concepts.float(), concept, label_smoothing=0.1)
        told = told + F.cross_entropy(styles.float(), style, label_smoothing=0.1)
        found = self.likeness.similarity(self.likeness(first), self.likeness(second))
        return told + contrastive_loss(found)

    @torch.inference_mode()
    def recognise(
        self, images: UInt8[np.ndarray, "images size size 3"]
    ) -> tuple[Float[Tensor, "images concepts"], Float[Tensor, "images styles"]]:
        """Score the concepts and styles of pictures."""
        scored = [self(batch) for batch in _batches(images)]
        return torch.cat([one[0] for one in scored]), torch.cat([one[1] for one in scored])

    @torch.inference_mode()
    def encode(self, images: UInt8[np.ndarray, "images size size 3"]) -> Float[Tensor, "images features"]:
        """Encode pictures to unit vectors, whose cosine says how much two look alike."""
        return torch.cat([self.likeness(batch) for batch in _batches(images)])


def untouched(pictures: EmojiSet) -> Bool[np.ndarray, " images"]:
    """Choose the pictures that a judge is not trained on, by their names; of each concept one is left, at least."""
    chosen = np.array([fraction_of_names("untouched", *pair) < _UNTOUCHED_SHARE for pair in pictures.pairs])
    for concept in np.unique(pictures.concept[chosen]):
        members = pictures.concept == concept
        if chosen[members].all():
            chosen[members] = False
    return chosen


def train_judge(
    pictures: EmojiSet, config: JudgeConfig | None = None, advance: Callable[[int], None] = lambda steps: None
) -> EmojiJudge:
    """Train a judge; ``advance`` is called with each step."""
    config = config or JudgeConfig()
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        judge = EmojiJudge(len(pictures.concept_names), len(pictures.styles), config.widths)
    generator = torch.Generator().manual_seed(config.seed)
    rows = torch.from_numpy(np.flatnonzero(~untouched(pictures)))
    concept, style = torch.from_numpy(pictures.concept), torch.from_numpy(pictures.style)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=config.learning_rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=config.learning_rate, total_steps=config.steps, pct_start=0.1
    )
    for _ in range(config.steps):
        batch = rows[torch.randint(len(rows), (config.batch_size,), generator=generator)]
        images = images_to_tensor(pictures.images[batch.numpy()])
        optimizer.zero_grad()
        judge.loss(images, concept[batch], style[batch], generator).backward()
        nn.utils.clip_grad_norm_(judge.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        advance(1)
    return judge.eval()


def open_judge(
    pictures: EmojiSet,
    file: Path,
    config: JudgeConfig | None = None,
    advance: Callable[[int], None] = lambda step: None,
) -> EmojiJudge:
    """Read the judge of a data set from a file, or train it and write it there.

    A file of other pictures, or trained otherwise, is trained and written anew.
    """
    config = config or JudgeConfig()
    fingerprint = _fingerprint(pictures, config)
    if file.is_file():
        try:
            kept = SafetensorsFile(file)
            if kept.metadata.get("fingerprint") == fingerprint:
                judge = EmojiJudge(len(pictures.concept_names), len(pictures.styles), config.widths)
                judge.load_state_dict(kept.read())
                return judge.eval()
        except (ModelError, RuntimeError):
            pass  # a damaged file is written anew, as one of other pictures is
    judge = train_judge(pictures, config, advance)
    with replacing(file) as temporary:
        save_file(judge.state_dict(), temporary, metadata={"fingerprint": fingerprint})
    return judge


def augmented(
    images: Float[Tensor, "batch 3 height width"], generator: torch.Generator
) -> Float[Tensor, "batch 3 height width"]:
    """Move, turn and scale each picture a little on its white ground, change its light and colours, and blur some."""
    count = len(images)

    def drawn(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=generator)

    angle, scale = drawn(-0.2, 0.2), drawn(0.85, 1.2)
    cosine, sine = scale * angle.cos(), scale * angle.sin()
    shift = drawn(-0.12, 0.12, 2)
    matrix = torch.stack(
        [torch.stack([cosine, -sine, shift[:, 0]], dim=1), torch.stack([sine, cosine, shift[:, 1]], dim=1)], dim=1
    )
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    moved = F.grid_sample(images - 1, grid, align_corners=False) + 1  # what comes in is white, which is 1
    moved = moved * drawn(0.85, 1.1, 3, 1, 1) + drawn(-0.1, 0.1, 1, 1, 1)
    blurred = F.avg_pool2d(F.pad(moved, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    softness = drawn(-1.0, 1.0, 1, 1, 1).clamp(min=0)
    noise = drawn(0.0, 0.05, 1, 1, 1) * torch.randn(images.shape, generator=generator)
    return (moved + softness * (blurred - moved) + noise).clamp(-1, 1)


def _batches(images: UInt8[np.ndarray, "images size size 3"]) -> Sequence[Tensor]:
    return [
        images_to_tensor(images[start : start + _EVALUATED_AT_ONCE])
        for start in range(0, len(images), _EVALUATED_AT_ONCE)
    ]


def _fingerprint(pictures: EmojiSet, config: JudgeConfig) -> str:
    """Hash everything that a judge follows from."""
    digest = hashlib.sha256(repr((pictures.pairs, sorted(asdict(config).items()))).encode())
    digest.update(pictures.images.tobytes())
    return digest.hexdigest()
