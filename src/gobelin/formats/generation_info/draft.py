"""Generation info: the settings that an image was made with, collected from the words of the program that made it."""

import json
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import PureWindowsPath
from typing import Any

from gobelin.errors import DataError
from gobelin.prompt_weighting import MAX_CHARACTERS, PromptSyntax, find_foreign_syntax

GOBELIN = "Gobelin"
"""The ``source`` of an image that Gobelin painted."""

EXTRA_NETWORKS = re.compile(r"<(?:lora|lyco|hypernet):[^<>]*>")
"""A LoRA, LyCORIS or hypernetwork as AUTOMATIC1111 and SwarmUI load it in a prompt."""

_DEFAULT_SCHEDULES = ("", "automatic", "uniform", "normal")  # each sampler's own noise levels
_OWN_SCHEDULES = {"ddim": "ddim_uniform"}  # ComfyUI's name for what is a sampler's own
# Samplers whose σ are k-diffusion's, and so AUTOMATIC1111's and ComfyUI's, for any number of steps. DPM2 leaves its
# last σ but one out there; multistep samplers begin at other timesteps, unless Karras' formula gives them.
_AS_K_DIFFUSION = (
    *("euler", "euler_karras", "euler_ancestral", "heun", "heun_karras", "lms", "lms_karras", "ddim"),
    *("dpmpp_2m_karras", "dpmpp_2m_sde_karras"),
)
_EMBEDDING = re.compile(r"\bembedding:([^\s,:()\[\]]+)")
_EMPTY: tuple[Any, ...] = (None, False, "", "None", "none", "False", [], {})
_MAX_SHOWN = 200  # characters of one thing that is missing
_MAX_MISSING = 50
_MAX_LISTED = 1000
_MAX_DIGITS = 40


@dataclass(frozen=True, kw_only=True)
class GenerationInfo:
    """The settings that an image was made with, as a pipeline takes them.

    ``source`` is the name of the program that made it; ``missing`` lists in words what Gobelin cannot repeat. ``loras``
    are the tags of LoRAs that stood in its prompt, each with its sentence in ``missing``: they can be repeated where
    the files are there.
    """

    settings: dict[str, Any]
    source: str
    missing: list[str] = field(default_factory=list)
    loras: dict[str, str] = field(default_factory=dict)


@dataclass(kw_only=True)
class Draft:
    """The settings that are read of an image so far, and in words what Gobelin cannot repeat of it.

    ``syntax`` is the meaning of the program's prompts, ``samplers`` the names that Gobelin has,
    ``diffusers`` whether the program samples with diffusers, as Gobelin does, and not with k-diffusion. What is taken
    may be of any type: what is no text or number where one belongs is listed, and never guessed.
    """

    source: str
    syntax: PromptSyntax
    samplers: Collection[str]
    diffusers: bool = False
    settings: dict[str, Any] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    loras: dict[str, str] = field(default_factory=dict)

    def say(self, name: str, value: Any = None) -> None:
        """List a thing that Gobelin cannot repeat, with its value unless that is None."""
        if len(self.missing) < _MAX_LISTED:
            self.missing.append(shortened(name if value is None else f"{name}: {in_words(value)}"))

    def say_network(self, tag: str) -> None:
        """List a network that a prompt loads; that of a LoRA can be loaded here too."""
        sentence = shortened(f"the added network {tag}")
        self.say(sentence)
        if tag.startswith("<lora:") and len(self.loras) < _MAX_MISSING:
            self.loras[tag] = sentence

    def take_number(self, ours: str, value: Any, named: str) -> None:
        """Take a number for a setting of ours: whole for steps, seed, sizes; what is none is listed as ``no named``."""
        number = as_number(value, float if ours.startswith("guidance") else int)
        if number is None:
            self.say(f"no {named}" if value is None else f"{named} {in_words(value)}, which is no number to use")
        else:
            self.settings[ours] = number

    def take_sampler(self, name: str, schedule: str) -> None:
        """Take a sampler by our name, at the noise levels that its schedule names; what we do not have is listed."""
        if name not in self.samplers:
            self.say(f"the sampler {name}" if name else "no sampler")
            return
        karras = schedule.lower() == "karras" and f"{name}_karras" in self.samplers
        ours = self.settings["sampler"] = f"{name}_karras" if karras else name
        if not karras and schedule.lower() not in (*_DEFAULT_SCHEDULES, _OWN_SCHEDULES.get(name)):
            self.say(f"the schedule {schedule} of {name}")
        elif not self.diffusers and ours not in _AS_K_DIFFUSION:
            self.say(f"the noise levels of {name}, which Gobelin spaces as diffusers does")

    def take_model(self, name: Any) -> None:
        """Take the name of a model's file, without folders and suffix."""
        if isinstance(name, str) and name:
            self.settings["model"] = model_name(name)
        else:
            self.say("no model")

    def say_others(self, values: Mapping[str, Any], known: Collection[str]) -> None:
        """List every value that is not known and not empty."""
        for name, value in values.items():
            if name not in known and not is_empty(value):
                self.say(name, value)

    def finished(self) -> GenerationInfo:
        """Add what the prompts ask for that Gobelin cannot do; raises :class:`DataError` for one that is too long."""
        self.settings["weights"] = self.syntax
        for name in ("prompt", "negative_prompt"):
            text = self.settings.get(name, "")
            if len(text) > MAX_CHARACTERS:
                raise DataError(f"its {name} has {len(text):,} characters: Gobelin reads {MAX_CHARACTERS:,} at most")
            if self.syntax == "comfyui":
                for word in _EMBEDDING.findall(text):
                    self.say(f"the embedding {word}")
            for found, what in islice(find_foreign_syntax(text, self.syntax), _MAX_LISTED):
                self.say(what, found)
        missing = list(dict.fromkeys(self.missing))
        if len(missing) > _MAX_MISSING:
            missing = [*missing[:_MAX_MISSING], f"and {len(missing) - _MAX_MISSING} things more"]
        return GenerationInfo(settings=self.settings, source=self.source, missing=missing, loras=self.loras)


def as_number(value: Any, kind: type[int] | type[float]) -> int | float | None:
    """Return a finite number, given as one or as text, of a kind; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    if isinstance(value, str) and len(value) > _MAX_DIGITS:
        return None
    try:
        number = kind(value)
        usable = math.isfinite(number) and (kind is float or isinstance(value, str) or number == value)
    except (ValueError, OverflowError):
        return None
    return number if usable else None


def is_empty(value: Any) -> bool:
    """Say whether a value says nothing: none, false, empty, or a text that says so."""
    return any(type(value) is type(empty) and value == empty for empty in _EMPTY)


def model_name(name: str) -> str:
    """Return the name of a file of any system, without folders and without the suffix of a weight file."""
    return re.sub(r"\.(safetensors|ckpt|pt|bin|pth|gguf)$", "", PureWindowsPath(name).name, flags=re.I)


def in_words(value: Any) -> str:
    """Format a value for a sentence: text as it is, anything else as JSON, on one line."""
    try:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    except (ValueError, TypeError, RecursionError):
        text = f"a {type(value).__name__}"
    return shortened(text)


def shortened(text: str) -> str:
    """Cut a text to what a sentence can hold, on one line."""
    line = " ".join(text[: 2 * _MAX_SHOWN].split())
    line = "".join(one if one.isprintable() else "?" for one in line)  # no control sequences of a stranger's
    return line if len(line) <= _MAX_SHOWN else line[: _MAX_SHOWN - 1] + "…"
