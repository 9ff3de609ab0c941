"""ComfyUI's graph of nodes: the settings of the sampler that begins an image, and every node that changes it besides.

Layout: ComfyUI's ``nodes.py`` (the classes of nodes, their inputs and the order of their outputs), and
``execution.py``: a link is ``[name of a node, number of its output]``.
"""

from collections.abc import Collection, Iterator
from itertools import chain, islice
from typing import Any

from gobelin.errors import DataError
from gobelin.formats.generation_info.draft import Draft, GenerationInfo, as_number, in_words

_SAMPLERS = ("KSampler", "KSamplerAdvanced")
_LOADERS = ("CheckpointLoaderSimple", "CheckpointLoader")
_CLIP_SKIP = "CLIPSetLastLayer"
_EMPTY_LATENTS = "EmptyLatentImage"
_ZERO_OUT = "ConditioningZeroOut"
# Nodes with one value in an input of this name: ComfyUI's own, KJNodes', rgthree's, Comfyroll's, Easy-Use's.
_CONSTANTS = {
    "PrimitiveInt": "value",
    "PrimitiveFloat": "value",
    "PrimitiveString": "value",
    "PrimitiveStringMultiline": "value",
    "INTConstant": "value",
    "FloatConstant": "value",
    "StringConstant": "string",
    "StringConstantMultiline": "string",
    "Int Literal": "int",
    "Float Literal": "float",
    "String Literal": "string",
    "Seed (rgthree)": "seed",
    "CR Seed": "seed",
    "CR Text": "text",
    "CR Prompt Text": "prompt",
    "easy seed": "seed",
    "easy int": "value",
    "easy float": "value",
    "easy string": "value",
}
# Nodes that change no image, or whose every input is read.
_HARMLESS = {
    *("SaveImage", "PreviewImage", "SaveAnimatedWEBP", "SaveImageWebsocket", "VAEDecode", "CLIPTextEncode"),
    *("Reroute", _CLIP_SKIP, _ZERO_OUT),
    *_CONSTANTS,
}
# Nodes whose first two outputs are the conditionings of their inputs "positive" and "negative": ComfyUI's own, and
# Advanced-ControlNet's. Others have them in another order.
_TWO_SIDED = {
    *("ControlNetApplyAdvanced", "ControlNetApplySD3", "ControlNetInpaintingAliMamaApply", "InpaintModelConditioning"),
    *("InstructPixToPixConditioning", "PairConditioningSetProperties", "PairConditioningSetDefaultCombine"),
    *("ACN_AdvancedControlNetApply", "ACN_AdvancedControlNetApply_v2", "ACN_ControlNet++ApplyAdvanced"),
}
_SIDES = {0: "positive", 1: "negative"}  # their outputs
# Configurations of CheckpointLoader that say what every Stable Diffusion 1.x model is.
_USUAL_CONFIGS = ("v1-inference.yaml", "v1-inference_fp16.yaml", "v1-inpainting-inference.yaml")
# Inputs that a conditioning goes through, in the order in which they are followed.
_CONDITIONING = ("conditioning", "conditioning_1", "conditioning_to")
_PROMPTS = {"positive": "prompt", "negative": "negative_prompt"}
_NUMBERS = {"steps": "steps", "cfg": "guidance"}
_MAX_NODES = 10_000  # graphs of people have some hundred
_MAX_ENDS = 16  # each is followed by itself
_MAX_INPUTS = 8  # said of a node
_MAX_FOLLOWED = 1_000  # nodes in a row
_USUAL = {"denoise": 1, "start_at_step": 0, "add_noise": "enable", "return_with_leftover_noise": "disable"}
_SAVED = ("images", "image")
_PICTURES = ("images", "image", "samples", "latent_image", "latent", "pixels", "samples_to", "samples_from")


def parse_comfyui_graph(graph: dict[str, Any], samplers: Collection[str]) -> GenerationInfo:
    """Parse ComfyUI's graph: the settings of the sampler that begins the image, and what else leads to the image.

    Raises :class:`DataError` for a graph without a KSampler that leads to the image, for one that saves images of
    several such, and for one of more than 10,000 nodes.
    """
    return _Graph(graph).read(samplers)


def list_comfyui_nodes(graph: dict[str, Any], samplers: Collection[str]) -> list[str]:
    """List in words the nodes of a graph that change the image, samplers included, where its settings are unread."""
    found = _Graph(graph)
    draft = Draft(source="ComfyUI", syntax="comfyui", samplers=samplers)
    for name in found.execution(found.ends()):
        found.say_node(draft, name)
    return draft.missing


def is_comfyui_graph(content: dict[str, Any]) -> bool:
    """Say whether an object is a graph of nodes."""
    return any(isinstance(node, dict) and "class_type" in node for node in content.values())


class _Graph:
    """The nodes of a graph by their names: of each its class and its inputs. A cycle ends where it began."""

    def __init__(self, graph: dict[str, Any]):
        nodes = {name: node for name, node in graph.items() if isinstance(node, dict)}
        if len(nodes) > _MAX_NODES:
            raise DataError(f"its ComfyUI graph has {len(nodes):,} nodes: Gobelin reads {_MAX_NODES:,} at most")
        self.kinds = {name: in_words(node.get("class_type") or "node without a class") for name, node in nodes.items()}
        self.inputs: dict[str, dict[str, Any]] = {
            name: inputs if isinstance(inputs := node.get("inputs"), dict) else {} for name, node in nodes.items()
        }

    def read(self, samplers: Collection[str]) -> GenerationInfo:
        """Read the graph, in which ``samplers`` are the names of those that Gobelin has."""
        draft = Draft(source="ComfyUI", syntax="comfyui", samplers=samplers)
        draft.say("ComfyUI draws other noise for a seed: the layout may differ")
        ends = self.ends()
        first = self._first_sampler(ends)
        inputs = self.inputs[first]
        if len(ends) > 1:
            draft.say(f"the graph ends in {len(ends)} nodes, {self._named(ends)}: which of their images it is")
        self._take_sampler(draft, inputs)
        layers = [self._take_prompt(draft, inputs, name, ours) for name, ours in _PROMPTS.items()]
        self._take_clip_skip(draft, {layer for layer in layers if layer is not None})
        size = self._take_size(draft, inputs)
        loader = self._follow(inputs.get("model"), ("model",), _LOADERS)
        if loader is not None:
            draft.take_model(self._plain(self.inputs[loader].get("ckpt_name")))
            config = self._plain(self.inputs[loader].get("config_name", _USUAL_CONFIGS[0]))
            if config not in _USUAL_CONFIGS:
                draft.say("the configuration", config)
        for name in self.execution(ends):
            if name not in (first, size, loader):
                self.say_node(draft, name)
        return draft.finished()

    def ends(self) -> list[str]:
        """Find the nodes that may have saved the image: those that take one, and that no other takes from.

        A node with "save" in its class comes before others, and "preview" after; without any, all that no other takes
        from are ends.
        """
        taken = {linked for name in self.kinds for _, linked in self._links(name)}
        loose = [name for name in self.kinds if name not in taken]
        ends = [name for name in loose if any(one in _SAVED for one, _ in self._links(name))]
        for fits in (lambda kind: "save" in kind, lambda kind: "preview" not in kind, lambda kind: True):
            if found := [name for name in ends if fits(self.kinds[name].lower())]:
                sources = {in_words([self.inputs[name].get(one) for one in _SAVED]): name for name in reversed(found)}
                return list(reversed(sources.values()))  # two of one image are one
        return loose or list(self.kinds)

    def _first_sampler(self, ends: list[str]) -> str:
        """Find the KSampler that begins the image of every end."""
        if len(ends) > _MAX_ENDS:
            raise DataError(f"its ComfyUI graph ends in {len(ends):,} nodes: Gobelin reads {_MAX_ENDS} at most")
        found: dict[str, str] = {}
        for end in ends:
            order = chain(self.execution([end], of_picture=True), self.execution([end]))
            sampler = next((name for name in order if self.kinds[name] in _SAMPLERS), None)
            if sampler is not None:
                found[sampler] = end
        if len(found) > 1:
            raise DataError(
                f"its ComfyUI graph saves images of {len(found)} samplers, by {self._named(found.values())}, and the "
                "file does not say which one it is"
            )
        if not found:
            others = sorted({kind for kind in self.kinds.values() if "sampler" in kind.lower()})
            which = f", but {in_words(', '.join(others))}" if others else ""
            raise DataError(f"its ComfyUI graph has no KSampler that leads to the image{which}")
        return next(iter(found))

    def _named(self, names: Collection[str]) -> str:
        return in_words(", ".join(f"{self.kinds[name]} {name}" for name in names))

    def _linked(self, value: Any) -> str | None:
        """Return the name of the node that a link comes from; None for what is no link."""
        if not (isinstance(value, list) and len(value) == 2 and isinstance(value[0], str | int)):
            return None
        return name if (name := str(value[0])) in self.kinds else None

    def _links(self, name: str) -> Iterator[tuple[str, str]]:
        """List a node's links: (input, name of the node that it comes from)."""
        for one, value in self.inputs[name].items():
            if (linked := self._linked(value)) is not None:
                yield one, linked

    def execution(self, ends: list[str], of_picture: bool = False) -> list[str]:
        """List the nodes that lead to others, and those, each once and after all that lead to it, as ComfyUI runs them.

        ``of_picture`` follows images and latents only, where a node has any.
        """
        order: list[str] = []
        seen: set[str] = set()
        waiting = [(name, False) for name in reversed(ends)]
        while waiting:
            name, led_to = waiting.pop()
            if led_to:
                order.append(name)
            elif name not in seen:
                seen.add(name)
                waiting.append((name, True))
                links = list(self._links(name))
                pictures = [link for link in links if link[0] in _PICTURES] if of_picture else []
                waiting += [(linked, False) for _, linked in reversed(pictures or links)]
        return order

    def _plain(self, value: Any) -> Any:
        """Follow a link to the constant at its end; where there is none, a link stays one."""
        for _ in range(_MAX_FOLLOWED):
            linked = self._linked(value)
            if linked is None:
                return value
            kind = self.kinds[linked]
            if kind == "Reroute":
                value = self._rerouted(linked)
            elif kind in _CONSTANTS:
                value = self.inputs[linked].get(_CONSTANTS[kind])
            else:
                return value
        return value

    def _follow(self, value: Any, through: tuple[str, ...], kinds: Collection[str]) -> str | None:
        """Follow a link upward, along inputs of these names and Reroutes, to the first node of some kinds."""
        for _ in range(_MAX_FOLLOWED):
            name = self._linked(value)
            if name is None or self.kinds[name] in kinds:
                return name
            if self.kinds[name] == "Reroute":
                value = self._rerouted(name)
            else:
                value = next((self.inputs[name][one] for one in through if one in self.inputs[name]), None)
        return None

    def _rerouted(self, name: str) -> Any:
        """Return what a Reroute passes on: its one input."""
        return next(iter(self.inputs[name].values()), None)

    def _take_sampler(self, draft: Draft, inputs: dict[str, Any]) -> None:
        """Take steps, guidance, seed and sampler; list what is not as usual."""
        for name, usual in _USUAL.items():
            if (value := self._plain(inputs.get(name, usual))) != usual:
                draft.say(f"{name} {in_words(value)}")
        last, steps = (as_number(self._plain(inputs.get(name)), int) for name in ("end_at_step", "steps"))
        if last is not None and steps is not None and last < steps:
            draft.say(f"end_at_step {last}")
        elif last is None and "end_at_step" in inputs:
            draft.say("end_at_step, which another node says")
        for name, ours in (*_NUMBERS.items(), ("noise_seed" if "noise_seed" in inputs else "seed", "seed")):
            draft.take_number(ours, self._plain(inputs.get(name)), name)
        named, schedule = (self._plain(inputs.get(name, "")) for name in ("sampler_name", "scheduler"))
        if isinstance(named, str) and isinstance(schedule, str):
            draft.take_sampler(named, schedule)
        else:
            draft.say("the sampler, which another node names")

    def _take_prompt(self, draft: Draft, sampler: dict[str, Any], name: str, ours: str) -> int | str | None:
        """Take one of a sampler's two prompts; returns the layer at which its CLIP stops, None for no prompt."""
        value = sampler.get(name)
        for _ in range(_MAX_FOLLOWED):
            linked = self._linked(value)
            if linked is None:
                break
            kind, inputs = self.kinds[linked], self.inputs[linked]
            if kind == "CLIPTextEncode":
                text = self._plain(inputs.get("text"))
                if not isinstance(text, str):
                    break
                draft.settings[ours] = text
                return self._clip_layer(inputs.get("clip"))
            if kind == _ZERO_OUT:
                draft.say(f"a {_ZERO_OUT}: the {name} conditioning is all zeros, which no prompt gives")
                return None
            if kind == "Reroute":
                value = self._rerouted(linked)
            elif kind in _TWO_SIDED:
                value = inputs.get(_SIDES.get(_output(value), ""))
            elif "positive" in inputs or "negative" in inputs:
                draft.say(f"the {name} prompt, which goes through a {kind}")
                return None
            else:
                value = next((inputs[one] for one in _CONDITIONING if one in inputs), None)
        draft.say(f"the {name} prompt, which is not plain text")
        return None

    def _clip_layer(self, link: Any) -> int | str:
        """Return the layer from the end at which CLIP stops; -1, the last, where no node says one."""
        found = self._follow(link, ("clip",), (_CLIP_SKIP,))
        if found is None:
            return -1
        layer = self._plain(self.inputs[found].get("stop_at_clip_layer"))
        return layer if isinstance(layer, int) else in_words(layer)

    def _take_clip_skip(self, draft: Draft, layers: set[int | str]) -> None:
        layer = as_number(next(iter(layers), -1), int)
        if len(layers) > 1 or layer is None or layer >= 0:
            draft.say(f"a {_CLIP_SKIP} at {' and '.join(sorted(map(str, layers)))}")
        elif layer < -1:
            draft.settings["clip_skip"] = -int(layer) - 1

    def _take_size(self, draft: Draft, sampler: dict[str, Any]) -> str | None:
        """Take width and height; returns the name of the node with the empty latents."""
        name = self._follow(sampler.get("latent_image"), (), (_EMPTY_LATENTS,))
        if name is None:
            draft.say("the init image")
            return None
        for one in ("width", "height"):
            draft.take_number(one, self._plain(self.inputs[name].get(one)), one)
        batch = self._plain(self.inputs[name].get("batch_size", 1))
        if batch != 1:
            draft.say(f"batch_size {in_words(batch)}: which image of the batch it is")
        return name

    def say_node(self, draft: Draft, name: str) -> None:
        """List a node that changes the image, with what it says."""
        kind = self.kinds[name]
        if kind in _SAMPLERS:
            draft.say(f"a {kind} after the first")
        elif kind not in _HARMLESS:
            values = ((one, value) for one, value in self.inputs[name].items() if self._linked(value) is None)
            said = ", ".join(f"{one}: {in_words(value)}" for one, value in islice(values, _MAX_INPUTS))
            draft.say(f"a {kind}" + (f" ({said})" if said else ""))


def _output(link: Any) -> int:
    """Return the number of the output that a link comes from; -1 for none."""
    return link[1] if isinstance(link, list) and len(link) == 2 and isinstance(link[1], int) else -1
