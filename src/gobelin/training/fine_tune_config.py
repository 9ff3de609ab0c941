"""Configuration of training from a model; its settings of stages, data and run are :mod:`gobelin.training.config`'s."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from gobelin.adapters.adapter_settings import AdapterConfig, AdapterLayout
from gobelin.errors import UsageError
from gobelin.formats.files import share_files
from gobelin.training.config import DiffusionConfig, RunConfig, VAELossConfig, check_prompts, refuse_empty_path
from gobelin.validation import Count, PositiveNumber, validate_fields


@dataclass(frozen=True, kw_only=True)
class NewWordConfig:
    """The new word that textual inversion trains: token embeddings, and nothing else."""

    word: str = "<new>"
    """How prompts and captions call it."""
    begin: str = ""
    """A word of the model that it begins as; without one, the mean of all."""
    vectors: Count = 1
    """Token embeddings of the word: each takes a place of the prompt."""

    def __post_init__(self) -> None:
        validate_fields(self)
        if not self.word or any(letter.isspace() for letter in self.word):
            raise UsageError(f"word is {self.word!r}: give one word without spaces")


@dataclass(frozen=True, kw_only=True)
class PriorConfig:
    """DreamBooth's prior preservation: images of what is to be kept, learned beside one's own.

    They are painted by the model itself from ``prompts``, or read from ``path``; without either there is no prior.
    """

    prompts: Annotated[tuple[str, ...], "a list of prompts"] = ()
    """Prompts of what is to be kept: "a dog" for one's own dog, or many."""
    count: Count = 64
    """Images that the model paints from the prompts before it trains."""
    path: Annotated[str | None, "a folder"] = None
    """A folder or tars of captioned images that are there already: regularization images, in other tools."""
    caption_column: Annotated[str | None, "the name of a column"] = None
    """The column of its metadata with the captions; without it, text, caption or prompt, whichever is there."""
    weight: PositiveNumber = 1.0
    """Weight of their loss beside that of one's own images."""

    @property
    def is_given(self) -> bool:
        """Tell whether there is a prior."""
        return bool(self.prompts) or self.path is not None

    def __post_init__(self) -> None:
        validate_fields(self)
        check_prompts("prior.prompts", self.prompts)
        refuse_empty_path(self.path)
        if self.prompts and self.path is not None:
            raise UsageError("prior.prompts and prior.path are both given: the prior is painted, or read from a folder")
        if self.path is None and self.caption_column is not None:
            raise UsageError(f"prior.caption_column is {self.caption_column!r}, and there is no prior.path to read it")
        if self.path is not None and self.count != PriorConfig.count:
            raise UsageError(f"prior.count is {self.count}: with prior.path, all of its images are the prior")


@dataclass(frozen=True, kw_only=True)
class FineTuneConfig(RunConfig):
    """The complete configuration of training from a model, apart from the folder that it is written to.

    Start from a preset: ``dataclasses.replace(find_preset("lora"), model="runs/mine")``.
    """

    model: Annotated[str | None, "the name of a model"] = None
    """The model to start from: a folder or file, or a name on the Hub; without one, the model that ships."""
    method: Literal["full", "adapter", "textual_inversion", "inpainting", "vae"] = "full"
    """full: all of the U-Net's weights; adapter: a LoRA or its like beside them; textual_inversion: a new word alone;
    inpainting: the whole U-Net, with channels for a mask; vae: the autoencoder's decoder alone."""
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    """Kind and size of the adapter that the method adapter trains."""
    layout: AdapterLayout = "kohya"
    """Whose layout the adapter is written in: kohya (also AUTOMATIC1111's and ComfyUI's), diffusers, peft."""
    new_word: NewWordConfig = field(default_factory=NewWordConfig)
    prior: PriorConfig = field(default_factory=PriorConfig)
    vae: VAELossConfig
    unet: DiffusionConfig

    def __post_init__(self) -> None:
        super().__post_init__()
        method, joint = self.method, self.unet.train_text_encoder
        if joint and method in ("textual_inversion", "vae"):
            raise UsageError(f"unet.train_text_encoder is True: the method {method} trains no text encoder")
        if joint and method == "adapter" and self.layout == "peft":
            raise UsageError("layout is 'peft', which holds a U-Net alone: give kohya or diffusers, or freeze the text")
        if self.prior.is_given and method not in ("full", "adapter"):
            raise UsageError(f"a prior is given: the method {method} has none, leave it out")
        if self.prior.path is not None and self.data.path is not None and share_files(self.prior.path, self.data.path):
            raise UsageError(
                f"prior.path is {self.prior.path!r} and data.path {self.data.path!r}: give two folders apart"
            )
        if self.prior.is_given and self.data.buckets:
            raise UsageError("data.buckets is True: beside a prior, whose images are square, one's own are too")
        if method == "adapter" and self.adapter.kind != "lora" and self.layout != "kohya":
            raise UsageError(f"layout is {self.layout!r}: a {self.adapter.kind} is written in kohya's alone")
        if self.data.buckets and method == "vae":
            raise UsageError("data.buckets is True: the VAE is trained on squares")
        if self.sample_prompts and method == "vae":
            raise UsageError("sample_prompts are given: the method vae shows images and their reconstructions")
        self._refuse_unused()

    def _refuse_unused(self) -> None:
        """Raise :class:`UsageError` for a section that is filled in and that the method does not read."""
        own = (
            ("adapter", "adapter", AdapterConfig()),
            ("layout", "adapter", "kohya"),
            ("new_word", "textual_inversion", NewWordConfig()),
        )
        for name, method, unset in own:
            if self.method != method and getattr(self, name) != unset:
                raise UsageError(f"{name} is given, and the method is {self.method}: {method} alone reads it")
        if not self.prior.is_given and self.prior != PriorConfig():
            raise UsageError(
                "prior is given without prior.prompts or prior.path: say what its images are of, such as 'a dog', or "
                "where they are"
            )
