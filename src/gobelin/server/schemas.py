"""Bodies of requests as pydantic models, made of the fields of :class:`gobelin.settings.Settings`.

A new setting is in the API with its type, range and text, and nothing is to be added here.
"""

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from annotated_types import Interval, Le, Len, MaxLen
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, create_model
from pydantic.config import JsonDict

from gobelin.control.ablations import Ablation
from gobelin.errors import UsageError
from gobelin.server.limits import ServerLimits
from gobelin.settings import MAX_SEED, EditSettings, Settings
from gobelin.validation import OnCommandLine, field_docs, field_hints, refuse_unknown

_MOST_WORDS = 100  # of one control
_MOST_CONTROLS = 8
_MOST_TIMESTEPS = 10  # of a look: each is a pass of the U-Net
_WORD_CHARACTERS = 200


def _refuse_surrogates(text: str) -> str:
    """Refuse text that is no Unicode, such as JSON's ``"\\ud800"``."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("give text without lone surrogates") from None
    return text


Text = Annotated[str, AfterValidator(_refuse_surrogates)]
_WordText = Annotated[Text, Len(1, _WORD_CHARACTERS)]
_Seed = Annotated[int, Interval(ge=0, le=MAX_SEED)]
_Share = Annotated[float, Interval(ge=0, le=1)]


class Body(BaseModel):
    """A request's body: strict types, and no field that is not known."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, arbitrary_types_allowed=True)


def or_none(hint: Any) -> Any:
    """Let a field be null too."""
    return hint | None


def settings_model(settings: type[Settings], limits: ServerLimits) -> type[Body]:
    """Make the model of settings that a request may give: those that are not Python's alone, bounded by ``limits``."""
    docs, hints = field_docs(settings), field_hints(settings)
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(settings):
        hint = _in_json(hints[field.name], limits)
        if hint is not None:
            bounded = _bounded(field.name, hint, limits)
            fields[field.name] = (bounded, Field(default=field.default, description=docs.get(field.name)))
    return create_model(settings.__name__, __base__=Body, **fields)


def _in_json(hint: Any, limits: ServerLimits) -> Any:
    """Return a setting's type as JSON has it; None where only Python code can give it."""
    kinds = [one.kind for one in getattr(hint, "__metadata__", ()) if isinstance(one, OnCommandLine)]
    if not kinds:
        return hint
    image = Annotated[str, MaxLen(limits.body)]
    forms: dict[Any, Any] = {
        None: None,
        int: or_none(_Seed | Annotated[list[_Seed], MaxLen(limits.count)]),
        float: or_none(float),
        "path": or_none(image),
        "words": or_none(Annotated[list[_WordText], MaxLen(_MOST_WORDS)]),
        "weights": or_none(Annotated[dict[_WordText, float], MaxLen(_MOST_WORDS)]),
    }
    return forms[kinds[0]]


def _bounded(name: str, hint: Any, limits: ServerLimits) -> Any:
    """Add the server's own bound to a setting's type."""
    if name in ("steps", "count"):
        return Annotated[hint, Le(getattr(limits, name))]
    if name in ("height", "width"):
        return Annotated[hint, Le(limits.pixels)]
    if name == "negative_prompt":
        return or_none(Annotated[Text, MaxLen(limits.prompt_characters)])
    return hint


class ReweightControl(Body):
    """Words, and how many times as much they are attended to."""

    kind: Literal["reweight"]
    words: Annotated[dict[_WordText, Annotated[float, Interval(ge=0, le=100)]], Len(1, _MOST_WORDS)]


class SuppressControl(Body):
    """A word that nothing attends to."""

    kind: Literal["suppress"]
    word: _WordText


class RegionsControl(Body):
    """Words, and the boxes that they belong into: left, top, right and bottom as shares of the image."""

    kind: Literal["regions"]
    regions: Annotated[dict[_WordText, Annotated[list[_Share], Len(4, 4)]], Len(1, 16)]


ControlBody = Annotated[ReweightControl | SuppressControl | RegionsControl, Field(discriminator="kind")]
Controls = Annotated[list[ControlBody], MaxLen(_MOST_CONTROLS)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RequestModels:
    """The models of requests, bounded by a server's limits."""

    job: Any
    look: type[Body]
    settings: type[Body]
    prompt: Any
    image: Any


def request_models(limits: ServerLimits) -> RequestModels:
    """Make the models of requests."""
    prompt = Annotated[Text, Len(1, limits.prompt_characters)]
    image = Annotated[str, Len(1, limits.body)]
    paint_settings, edit_settings = (settings_model(one, limits) for one in (Settings, EditSettings))
    example: JsonDict = {
        "kind": "paint",
        "prompt": "a red circle left of a blue square",
        "settings": {"seed": 3, "steps": 8},
    }
    paint = create_model(
        "PaintRequest",
        __base__=Body,
        kind=(Literal["paint"], ...),
        prompt=(prompt, ...),
        settings=(paint_settings, Field(default_factory=paint_settings)),
        controls=(Controls, Field(default_factory=list)),
        trace=(bool, Field(default=False, description="Keep attention maps, and what an explanation needs.")),
        previews=(bool, Field(default=False, description="Send previews with the steps.")),
        broken=(Ablation | None, Field(default=None, description="Break the run on purpose.")),
        site=(
            or_none(Annotated[str, MaxLen(200)]),
            Field(default=None, description="Site that is silenced, for silence_site."),
        ),
    )
    paint.model_config["json_schema_extra"] = {"examples": [example]}
    edit = create_model(
        "EditRequest",
        __base__=Body,
        kind=(Literal["edit"], ...),
        prompt=(prompt, ...),
        to=(prompt, ...),
        settings=(edit_settings, Field(default_factory=edit_settings)),
        controls=(Controls, Field(default_factory=list)),
        previews=(bool, False),
    )
    looked: dict[str, Any] = {
        "image": (image, ...),
        "caption": (prompt, ...),
        "timesteps": (
            or_none(Annotated[list[Annotated[int, Interval(ge=0, le=999)]], Len(1, _MOST_TIMESTEPS)]),
            Field(default=None, description="Timesteps at which the image is noised and looked at."),
        ),
        "seed": (_Seed, 0),
    }
    look = create_model("LookBody", __base__=Body, **looked)
    look_job = create_model("LookRequest", __base__=Body, kind=(Literal["look"], ...), **looked)
    return RequestModels(
        job=Annotated[paint | edit | look_job, Field(discriminator="kind")],
        look=look,
        settings=paint_settings,
        prompt=prompt,
        image=image,
    )


class ExplainRequest(Body):
    """One query of one run: image, step, site, head and pixel."""

    image: Annotated[int, Interval(ge=0, le=10_000)] = 0
    step: Annotated[int, Interval(ge=0, le=10_000)] = 0
    site: Annotated[str, MaxLen(200)] | None = None
    head: Annotated[int, Interval(ge=0, le=10_000)] = 0
    x: Annotated[int, Interval(ge=0, le=100_000)] = 0
    y: Annotated[int, Interval(ge=0, le=100_000)] = 0
    broken: Annotated[Ablation | None, Field(alias="break")] = None


class ErrorDetail(BaseModel):
    """An error: one sentence, its kind, and the field that it is about, if any."""

    message: str
    type: Literal["usage", "token", "busy", "not_found", "cancelled", "failed"]
    field: str | None = None


class ErrorBody(BaseModel):
    """The one shape of every error."""

    error: ErrorDetail


class JobImage(BaseModel):
    """An image of a finished job."""

    url: str
    width: int
    height: int
    settings: dict[str, Any]


class JobView(BaseModel):
    """A job as its owner sees it."""

    id: str
    kind: Literal["paint", "edit", "look"]
    state: Literal["queued", "running", "done", "failed", "cancelled"]
    position: int | None = None
    step: int = 0
    steps: int = 0
    seconds: float | None = None
    error: ErrorDetail | None = None
    images: list[JobImage] = []
    maps: list[str] = []
    notes: list[str] = []


def given(body: BaseModel) -> dict[str, Any]:
    """List the fields that a body gives, without those left at their defaults."""
    return {name: getattr(body, name) for name in body.model_fields_set}


def refuse_misspelt(names: Sequence[str], known: Sequence[str]) -> str:
    """Write the sentence about a field that is not known, with the nearest one that is."""
    try:
        refuse_unknown(names, known, what="field")
    except UsageError as error:
        return str(error)
    return f"unknown field {names[0]!r}"
