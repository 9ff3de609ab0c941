"""Settings: every option of an image, in one list.

The call of a pipeline, the command line, what a model recommends, and what a PNG remembers are all made of
:class:`Settings`: a new option is one more field. Annotations in quotes name types that only Python code gives and that
import PyTorch, which takes longer than the whole help of a command.
"""

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    Concatenate,
    Literal,
    ParamSpec,
    Protocol,
    Self,
    TypeVar,
    cast,
    overload,
    runtime_checkable,
)

from annotated_types import Ge, Interval

from gobelin.errors import UsageError
from gobelin.prompt_weighting import PromptSyntax
from gobelin.validation import Fraction, OnCommandLine, field_docs, refuse_unknown, validate_fields
from gobelin.words import Word

if TYPE_CHECKING:
    from torch import Tensor

    from gobelin.attention import Trace
    from gobelin.control.batch import AnyControl
    from gobelin.guidance import Predictions
    from gobelin.images import ImageSource
    from gobelin.types import Latents

MAX_SEED = 2**63 - 1  # of PyTorch's generators
DEFAULT_STRENGTH = 0.8  # diffusers' for image-to-image
LORAS, LEARNED_WORDS = "loras", "learned_words"
"""Keys beside the settings of an image that name what was loaded for it."""
NOT_REPEATABLE = "control"
"""In an image's settings where controls, latents or a guidance of one's own took part, which they do not hold."""
_WITH_KARRAS = ("euler", "heun", "lms", "dpm_2", "dpm_2_ancestral", "dpmpp_2m", "dpmpp_2m_sde", "uni_pc", "deis")
OWN_SAMPLERS = (
    *("ddpm", "ddim", "pndm", "lcm", "euler_ancestral"),
    *_WITH_KARRAS,
    *(f"{name}_karras" for name in _WITH_KARRAS),
)
"""Gobelin's own samplers, known without PyTorch; others may be added to :data:`gobelin.samplers.SAMPLERS`."""

Prompts = str | Sequence[str]
"""One prompt, or several to be painted in one batch."""
Seed = Annotated[int, Interval(ge=0, le=MAX_SEED)]


_PYTHON_ONLY = OnCommandLine(None)


class _FieldsSignature:
    """The signature of a settings class: its fields, where Python 3.11 would show what ``__new__`` takes."""

    def __get__(self, instance: object, cls: type) -> inspect.Signature:
        _, *parameters = inspect.signature(cls.__init__).parameters.values()
        return inspect.Signature(parameters)


@dataclass(frozen=True, kw_only=True, repr=False)
class Settings:
    """Settings of images: what is left out is what the model recommends, or this list's default.

    Subclasses are dataclasses with ``frozen=True, kw_only=True, repr=False``.

    Raises :class:`UsageError` in one sentence for a wrong type, a number out of range, or a name that is not here.
    """

    negative_prompt: str | None = None
    """Text to steer away from; without it, none."""
    seed: Annotated[
        Seed | Sequence[Seed] | None, OnCommandLine(int), "a whole number of 0 or more, or one for each image"
    ] = None
    """Seed of the first image, the others count up from it; without it, drawn, and recorded in the image."""
    steps: Annotated[int, Interval(ge=1, le=1000)] | None = None
    """Denoising steps; without it, what the model recommends."""
    guidance: Annotated[
        float | Callable[["Predictions"], "Latents"] | None,
        OnCommandLine(float),
        "a number, or a function of gobelin.guidance",
    ] = None
    """Classifier-free guidance scale, 1 for none; without it, what the model recommends."""
    guidance_rescale: Fraction | None = None
    """Guidance rescale, 0 to 1: take back the contrast that guidance adds; without it, what the model recommends."""
    sampler: str | None = None
    """Sampler: ddpm, ddim, pndm, lcm, euler, euler_ancestral, heun, lms, dpm_2, dpm_2_ancestral, dpmpp_2m,
    dpmpp_2m_sde, uni_pc or deis, most also with _karras; without it, what the model recommends."""
    height: Annotated[int, Ge(1)] | None = None
    """Height in pixels; without it, the init image's or the model's own."""
    width: Annotated[int, Ge(1)] | None = None
    """Width in pixels; without it, the init image's or the model's own."""
    count: Annotated[int, Interval(ge=1, le=10_000)] = 1
    """Images for each prompt."""
    clip_skip: Annotated[int, Ge(0)] | None = None
    """Last layers of the text encoder to leave out; without it, none."""
    weights: PromptSyntax | None = None
    """Tool in whose meaning (word:1.2) is read: a1111, comfyui, or none to read it as text; without it, a1111."""
    init_image: Annotated["ImageSource | Sequence[ImageSource] | None", OnCommandLine("path")] = None
    """Image to begin from (image-to-image), or to inpaint: turned as its EXIF says, white where it is transparent."""
    strength: Fraction | None = None
    """How much of the init image to paint anew, 0 to 1; without it, 0.8."""
    mask: Annotated["ImageSource | Sequence[ImageSource] | None", OnCommandLine("path")] = None
    """Mask of the init image: inpaint where it is white (128 or more of 255), and change no pixel elsewhere."""
    tile: Annotated[int, Ge(16)] | None = None
    """Decode large images in tiles of so many latents a side; without it, whole."""
    cache_interval: Annotated[int, Interval(ge=1, le=100)] = 1
    """Run all of the U-Net at one of so many steps, and its shallow layers at the others: approximate; 1 is exact."""
    merge_tokens: Annotated[float, Interval(ge=0, le=0.75)] = 0.0
    """Share of the finest patches, 0 to 0.75, that attend to patches as one with another: approximate; 0 is exact."""
    latents: Annotated["Tensor | None", _PYTHON_ONLY] = None
    """Start noise of your own, [batch, channels, h, w]."""
    trace: Annotated["bool | Literal['sharp'] | Trace", _PYTHON_ONLY] = False
    """Attention maps: True for a mean over all cross-attention, "sharp" for maps that point best, or a Trace."""
    control: Annotated["AnyControl | Sequence[AnyControl] | None", _PYTHON_ONLY] = ()
    """Controls of gobelin.control, or a function (site, probs) -> probs; several compose."""

    if not TYPE_CHECKING:  # a misspelt name is a sentence here too, and the constructor's signature stays the fields

        def __new__(cls, **options: Any) -> Self:
            refuse_unknown(options, _names(cls), what="setting")
            return super().__new__(cls)

        __signature__ = _FieldsSignature()

    def __post_init__(self) -> None:
        validate_fields(self, but=_OPENED_LATER)
        if self.sampler is not None and self.sampler not in OWN_SAMPLERS:
            from gobelin.samplers import SAMPLERS  # with PyTorch

            refuse_unknown([self.sampler], SAMPLERS, what="sampler")

    def keys(self) -> Iterator[str]:
        """List the settings that are not at their default, so that ``pipe(prompt, **settings)`` works."""
        return (field.name for field in dataclasses.fields(self) if not _same(getattr(self, field.name), field.default))

    def __getitem__(self, name: str) -> Any:
        return getattr(self, name)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={_shown(self[name])}' for name in self.keys())})"

    def filled(self, recommended: "Settings") -> "Settings":
        """Fill in what goes unsaid from what a model recommends."""
        said = set(self.keys())
        unsaid = {name: value for name, value in dict(recommended).items() if name not in said}
        return dataclasses.replace(self, **unsaid)


@dataclass(frozen=True, kw_only=True, repr=False)
class EditSettings(Settings):
    """Settings of an edit: those of an image, and how it is changed."""

    strength: Annotated[float, Interval(gt=0, le=1)] | None = None
    """How far back towards noise the change begins, 0 to 1: less changes less; without it, 1."""
    method: Literal["flowedit", "prompt_to_prompt"] = "flowedit"
    """flowedit changes a finished image; prompt_to_prompt paints both at once, from the same noise."""
    cross_replace: Fraction | None = None
    """Fraction of the way in which words keep the attention of those they stand for; without it, 0.8, and where a
    number or a place changes 0.3 or 0.15, as things come or move then."""
    self_replace: Fraction | None = None
    """Fraction of the way in which patches attend to each other as in the first image; without it, 0.6, or 0 then."""
    edit_guidance: float | None = None
    """How strongly to push from the first prompt's words to the changed ones, beside the guidance, 0 for not at all;
    without it, 2, or 1 then."""
    local_blend: Annotated[Sequence[Word] | None, OnCommandLine("words")] = None
    """Words outside of whose pixels nothing changes, or none; without it, what the changed words belong to, or none
    then."""
    reweight: Annotated[Mapping[Word, float] | None, OnCommandLine("weights")] = None
    """Words of the changed prompt, and how many times as much they are attended to."""

    def filled_for_edit(self, moves: Literal["number", "place"] | None) -> Self:
        """Fill in how an edit goes where that is unsaid: freely where FlowEdit has to move things, or to add some."""
        # Measured by words' kinds (docs/decisions.md, "Numbers and places are edited more freely").
        chosen: dict[str, Any] = {"cross_replace": 0.8, "self_replace": 0.6, "edit_guidance": 2.0}
        if moves is not None:
            kept = 0.3 if moves == "number" else 0.15
            chosen = {"cross_replace": kept, "self_replace": 0.0, "edit_guidance": 1.0, "local_blend": ()}
        return dataclasses.replace(self, **{name: value for name, value in chosen.items() if self[name] is None})


# Their types are many; what they hold is checked where it is opened, with a sentence of its own.
_OPENED_LATER = ("init_image", "mask", "latents", "trace", "control")

P = ParamSpec("P")
S = TypeVar("S", bound=Settings)
S_co = TypeVar("S_co", bound=Settings, covariant=True)
Owner = TypeVar("Owner")
First = TypeVar("First")
Second = TypeVar("Second")
Returned = TypeVar("Returned")


@runtime_checkable
class _TakesSettings(Protocol[P, S_co]):
    """A decorator that gives a method the fields of a settings class as keywords."""

    @overload
    def __call__(
        self, method: Callable[[Owner, First, S_co], Returned], /
    ) -> Callable[Concatenate[Owner, First, P], Returned]: ...
    @overload
    def __call__(
        self, method: Callable[[Owner, First, Second, S_co], Returned], /
    ) -> Callable[Concatenate[Owner, First, Second, P], Returned]: ...


def takes_settings(settings: Callable[P, S]) -> _TakesSettings[P, S]:
    """Give a method ``(prompt, settings)`` the fields of a settings class as keywords, typed and documented.

    The method is called with the prompt and keywords; :class:`UsageError` names a keyword that is no setting.
    """

    make = cast(Callable[..., S], settings)

    def decorate(method: Callable[..., Returned]) -> Callable[..., Returned]:
        *leading, _ = inspect.signature(method).parameters.values()
        names = [parameter.name for parameter in leading]

        @wraps(method)
        def called(*args: Any, **changes: Any) -> Returned:
            if len(args) > len(names):
                raise UsageError("settings are given by name, as in steps=20")
            named = {name: changes.pop(name) for name in names[len(args) :] if name in changes}
            if missing := [name for name in names[len(args) :] if name not in named]:
                raise UsageError(f"{missing[0]} is missing: say in a few words what to paint")
            return method(*args, **named, settings=make(**changes))

        options = list(inspect.signature(settings).parameters.values())
        cast(Any, called).__signature__ = inspect.Signature([*leading, *options])
        listed = "\n".join(f"    {name}: {text}" for name, text in field_docs(settings).items())
        called.__doc__ = f"{inspect.getdoc(method)}\n\nSettings, all by name:\n\n{listed}\n"
        return called

    return decorate


def _names(cls: type) -> list[str]:
    return [field.name for field in dataclasses.fields(cls)]


def _same(value: Any, default: Any) -> bool:
    """Compare a setting with its default, where tensors and images compare by element."""
    plain = type(value) is type(default) and isinstance(value, bool | int | float | str | tuple)
    return value is default or (plain and value == default)


def _shown(value: Any) -> str:
    return f"<{type(value).__name__}>" if hasattr(value, "shape") or hasattr(value, "size") else repr(value)
