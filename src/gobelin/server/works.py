"""Works: the parsed requests that jobs hold, checked against the model before they wait."""

import secrets
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

from PIL import Image

from gobelin.captioned_images import LOOK_TIMESTEPS, fitted_size
from gobelin.control import AnyControl, Region, regional_attention, reweight, suppress
from gobelin.control.ablations import Ablation, ablate
from gobelin.errors import UsageError
from gobelin.images import open_image
from gobelin.painting import EditPainting, Painting
from gobelin.pipeline import Pipeline
from gobelin.plan import latent_size
from gobelin.server.data_urls import EncodedImage
from gobelin.server.jobs import JobKind
from gobelin.server.limits import ServerLimits
from gobelin.server.schemas import ControlBody, RegionsControl, ReweightControl
from gobelin.settings import EditSettings, Settings
from gobelin.text_conditioning import Chunks, chunk_prompt
from gobelin.validation import shown
from gobelin.words import Word

_MOST_DRAWN = 2**31
_MOST_WORDS = 300  # of a caption
_MOST_SHARES = 16_000_000  # of words at every step: 64 MB
_IMAGES_OF_AN_EDIT = 3  # the first, and both again while one becomes the other
_IMAGES = ("init_image", "mask")


def make_controls(bodies: Sequence[ControlBody]) -> list[AnyControl]:
    """Make the controls that a request names."""
    controls: list[AnyControl] = []
    for body in bodies:
        if isinstance(body, ReweightControl):
            words: dict[Word, float] = {**body.words}
            controls.append(reweight(words))
        elif isinstance(body, RegionsControl):
            controls.append(regional_attention({word: Region.box(*box) for word, box in body.regions.items()}))
        else:
            controls.append(suppress(body.word))
    return controls


@dataclass(frozen=True, kw_only=True)
class _PromptWork:
    """A work of a prompt: options are those of settings, with images as they came in."""

    prompt: str
    options: dict[str, Any]
    controls: Sequence[ControlBody] = ()

    @property
    def size(self) -> int:
        """Bytes of the images that came with it, and of its prompt."""
        images = [self.options.get(name) for name in _IMAGES]
        return 1000 + len(self.prompt) + sum(len(one.content) for one in images if isinstance(one, EncodedImage))

    def _with_seed(self) -> Self:
        """Draw the seed where none is given, so that it is known before anything is painted."""
        drawn = {} if self.options.get("seed") is not None else {"seed": secrets.randbelow(_MOST_DRAWN)}
        return replace(self, options={**self.options, **drawn})

    @property
    def _opened(self) -> dict[str, Any]:
        """The options with their images opened."""
        return {
            name: value.open() if isinstance(value, EncodedImage) else value for name, value in self.options.items()
        }


@dataclass(frozen=True, kw_only=True)
class PaintWork(_PromptWork):
    """Painting of a prompt, ``count`` times, from a seed that is known."""

    kind: JobKind = field(default="paint", init=False)
    trace: bool = False
    broken: Ablation | None = None
    site: str | None = None
    height: int = 0
    width: int = 0
    most_at_once: int = 1

    def checked(self, pipeline: Pipeline, limits: ServerLimits) -> tuple[Self, list[str]]:
        """Check the work against model and limits, draw its seed, find its size; with notes on what is left out."""
        self._check_site(pipeline)
        work = self._with_seed()
        settings = work.settings()
        height, width = _checked_size(pipeline, limits, settings)
        painting = pipeline.start(work.prompt, **settings)
        if work.trace:
            _check_trace(painting, work.image_count)
        most = max(1, min(limits.batch_images, limits.batch_pixels // (height * width)))
        return replace(work, height=height, width=width, most_at_once=most), _notes(painting)

    def _check_site(self, pipeline: Pipeline) -> None:
        """Raise :class:`UsageError` for a site that there is not, or that nothing is to be done at."""
        if self.site is None:
            return
        if self.broken != "silence_site":
            raise UsageError("site is given, and broken is not silence_site: leave it out")
        if self.site not in [site.name for site in pipeline.unet.attention_sites]:
            raise UsageError(f"site is {shown(self.site)}: /v1/info lists the sites that there are")

    @property
    def image_count(self) -> int:
        """Number of images."""
        return self.options.get("count", 1)

    @property
    def seeds(self) -> list[int]:
        """The seed of each image."""
        seed = self.options["seed"]
        return list(seed) if isinstance(seed, Sequence) else [seed + index for index in range(self.image_count)]

    @property
    def batch_key(self) -> Hashable | None:
        """Settings that all jobs of a batch share; None for a job that is painted by itself.

        Prompts and seeds may differ. Controls look for their words in every prompt of a batch, and images are one for
        all, so jobs with them are painted by themselves.
        """
        if self.controls or self.broken or any(name in self.options for name in _IMAGES):
            return None
        shared = {name: value for name, value in self.options.items() if name not in ("seed", "count")}
        return (self.trace, self.height, self.width, *sorted(shared.items()))

    def settings(self) -> Settings:
        """Make the settings; raises :class:`UsageError` as they do."""
        controls = make_controls(self.controls)
        if self.broken is not None:
            controls.append(ablate(self.broken, self.site))
        return Settings(**self._opened, control=controls)

    def start_one(self, pipeline: Pipeline, index: int) -> Painting:
        """Start the painting of one of its images by itself."""
        return pipeline.start(self.prompt, **replace(self.settings(), count=1, seed=self.seeds[index]))


@dataclass(frozen=True, kw_only=True)
class EditWork(_PromptWork):
    """Edit of a prompt's image, or of one that is given."""

    kind: JobKind = field(default="edit", init=False)
    to: str
    image_count: int = 1
    batch_key: Hashable | None = None

    def start(self, pipeline: Pipeline) -> EditPainting:
        """Start the edit."""
        settings = EditSettings(**self._opened, control=make_controls(self.controls), trace="sharp")
        return pipeline.start_edit(self.prompt, self.to, **settings)

    def checked(self, pipeline: Pipeline, limits: ServerLimits) -> tuple[Self, list[str]]:
        """Check the work against model and limits, and draw its seed; with notes on what is left out."""
        work = self._with_seed()
        settings = EditSettings(**work._opened, control=make_controls(work.controls))
        if settings.count != 1 or isinstance(settings.seed, Sequence):
            raise UsageError("an edit is of one image: leave out count, and give one seed")
        _checked_size(pipeline, limits, settings, images=_IMAGES_OF_AN_EDIT)
        names = ("height", "width", "steps", "sampler", "init_image", "mask", "weights")
        plain = {name: settings[name] for name in names}
        painting = pipeline.start([work.prompt, work.to], **Settings(**plain))
        if settings.init_image is None:  # else its latents are needed, and only the model's thread encodes
            work.start(pipeline)
        return work, _notes(painting)


@dataclass(frozen=True, kw_only=True)
class LookWork:
    """Look at an image with a caption."""

    kind: JobKind = field(default="look", init=False)
    image: EncodedImage
    caption: str
    timesteps: Sequence[int] = LOOK_TIMESTEPS
    seed: int = 0
    image_count: int = 1
    batch_key: Hashable | None = None

    @property
    def size(self) -> int:
        """Bytes of its image."""
        return 1000 + len(self.caption) + len(self.image.content)

    def checked(self, pipeline: Pipeline, limits: ServerLimits) -> tuple[Self, list[str]]:
        """Check the work against the model; with notes on what is left out."""
        if not self.caption.strip():
            raise UsageError("the caption is empty: say in a few words what is to be seen in the image")
        syntax = pipeline.recommended.weights or "a1111"
        chunks = chunk_prompt(pipeline.tokenizer, self.caption, syntax)  # as a look does
        last = pipeline.schedule.config.num_train_timesteps - 1
        if max(self.timesteps) > last:
            raise UsageError(f"timesteps are {list(self.timesteps)}: give whole numbers from 0 to {last}")
        height, width = fitted_size(pipeline.model, self.image.open().size)
        limits.check(Settings(steps=len(self.timesteps)), (height, width))
        if len(chunks.words) > _MOST_WORDS:
            raise UsageError(f"caption has {len(chunks.words)} words: give {_MOST_WORDS} at most")
        return self, _cut_notes([chunks])


def _checked_size(pipeline: Pipeline, limits: ServerLimits, settings: Settings, images: int = 1) -> tuple[int, int]:
    """Find the height and width of what would be painted; raises :class:`UsageError` for too much of it."""
    filled, factor = settings.filled(pipeline.recommended), pipeline.vae.config.factor
    init_image = filled.init_image
    given = open_image(init_image, "init_image").size if isinstance(init_image, Image.Image) else None
    h, w = latent_size(pipeline.model, filled.height, filled.width, given)
    limits.check(filled, (h * factor, w * factor), images)
    return h * factor, w * factor


def _notes(painting: Painting) -> list[str]:
    """Say what is left out: the end of a prompt that is too long, everything where a mask is black."""
    plan = painting.plan
    notes = _cut_notes([*{id(one): one for one in (*plan.texts, plan.negative)}.values()])
    if plan.init_image is not None and plan.init_image.mask is not None and not plan.init_image.mask.any():
        notes.append("nothing in the mask is white, so nothing is painted: white is inpainted")
    return notes


def _cut_notes(prompts: Sequence[Chunks]) -> list[str]:
    """Say which ends do not fit this model."""
    return [
        f"the prompt is longer than this model takes, so its end is left out: {chunks.cut[:200]!r}"
        for chunks in prompts
        if chunks.cut
    ]


def _check_trace(painting: Painting, images: int) -> None:
    """Raise :class:`UsageError` for a trace whose words' shares at all steps would take too much memory."""
    words, (h, w) = len(painting.plan.texts[0].words), painting.plan.latent_size
    if words * len(painting) * h * w * images > _MOST_SHARES:
        raise UsageError(
            f"trace is asked for of {words} words at {len(painting)} steps in {images} images, which takes too much "
            "memory: give a shorter prompt, fewer steps or fewer images"
        )
