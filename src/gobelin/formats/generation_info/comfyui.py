"""ComfyUI's graph of nodes: the settings of the sampler that begins an image, and every node that changes it besides.

Layout: ComfyUI's ``nodes.py`` (the classes of nodes, their inputs and the order of their outputs), and
``execution.py``: a link is ``[name of a node, number of its output]``.
"""

import re
from collections.abc import Collection, Iterator
from typing import Any

from gobelin.errors import DataError
from gobelin.formats.generation_info.draft import Draft, GenerationInfo, as_number, shown

_SAMPLERS = ("KSampler", "KSamplerAdvanced")
_LOADERS = ("CheckpointLoaderSimple", "CheckpointLoader")
_CLIP_SKIP = "CLIPSetLastLayer"
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
    *("EmptyLatentImage", "Reroute", _CLIP_SKIP, _ZERO_OUT),
    *_CONSTANTS,
}
# Inputs that a conditioning goes through, in the order in which they are followed.
_CONDITIONING = ("conditioning", "conditioning_1", "conditioning_to")
_PROMPTS = {"positive": "prompt", "negative": "negative_prompt"}
_NUMBERS = {"steps": "steps", "cfg": "guidance"}
_USUAL = {"denoise": 1, "start_at_step": 0, "add_noise": "enable", "return_with_leftover_noise": "disable"}
_PICTURES = ("images", "image", "samples", "latent_image", "latent", "pixels", "samples_to", "samples_from")

Node = dict[str, Any]


def parse_comfyui_graph(graph: dict[str, Any], samplers: Collection[str]) -> GenerationInfo:
    """Parse ComfyUI's graph: the settings of the sampler that begins the image, and what else leads to the image.

    Raises :class:`DataError` for a graph without a KSampler.
    """
    return _Graph(graph).read(samplers)


def is_comfyui_graph(content: dict[str, Any]) -> bool:
    """Say whether an object is a graph of nodes."""
    return any(isinstance(node, dict) and "class_type" in node for node in content.values())


class _Graph:
    """The nodes of a graph by their names, followed from outputs to inputs; cycles end where they began."""

    def __init__(self, graph: dict[str, Any]):
        self.nodes = {name: node for name, node in graph.items() if isinstance(node, dict)}

    def read(self, samplers: Collection[str]) -> GenerationInfo:
        found = [name for name, node in self.nodes.items() if _kind(node) in _SAMPLERS]
        if not found:
            others = sorted({_kind(node) for node in self.nodes.values() if "sampler" in _kind(node).lower()})
            which = f" but {shown(', '.join(others))}" if others else ""
            raise DataError(f"its ComfyUI graph has no KSampler to take the settings from{which}")
        draft = Draft(source="ComfyUI", weights="comfyui", samplers=samplers)
        draft.say("ComfyUI draws other noise for a seed: the layout may differ")
        ends = self._ends(draft)
        order = [*self._execution(ends, of_picture=True), *self._execution(ends), *found]
        first = next(name for name in order if _kind(self.nodes[name]) in _SAMPLERS)
        sampler = self.nodes[first]
        leading = self._execution([*ends, first])
        self._take_sampler(draft, sampler)
        for name in leading:
            if _kind(self.nodes[name]) in _SAMPLERS and name != first:
                draft.say(f"a {_kind(self.nodes[name])} after the first")
        layers = {self._take_prompt(draft, sampler, name, ours) for name, ours in _PROMPTS.items()}
        self._take_clip_skip(draft, layers - {None})
        size = self._take_size(draft, sampler)
        loader = self._follow(_inputs(sampler).get("model"), ("model",), _LOADERS)
        if loader is not None:
            draft.take_model(_inputs(self.nodes[loader]).get("ckpt_name"))
        for name in leading:
            self._say_node(draft, name, {first, size, loader})
        return draft.finished()

    def _ends(self, draft: Draft) -> list[str]:
        """Find the node that saves the image: one that no other takes from, of those that lead from a sampler."""
        taken = {name for node in self.nodes.values() for _, name in self._links(node)}
        loose = [name for name in self.nodes if name not in taken]
        for word in ("save", "preview"):
            found = [name for name in loose if word in _kind(self.nodes[name]).lower()]
            if len(found) > 1:
                draft.say("the graph saves several images: the settings are those of one of them")
            if found:
                return found[:1]
        return loose or list(self.nodes)

    def _links(self, node: Node) -> Iterator[tuple[str, str]]:
        """List a node's links: (input, name of the node that it comes from)."""
        for name, value in _inputs(node).items():
            if (linked := self._linked(value)) is not None:
                yield name, linked

    def _linked(self, value: Any) -> str | None:
        """Return the name of the node that a link comes from; None for what is no link."""
        if not (isinstance(value, list) and len(value) == 2 and isinstance(value[0], str | int)):
            return None
        return name if (name := str(value[0])) in self.nodes else None

    def _execution(self, ends: list[str], of_picture: bool = False) -> list[str]:
        """List the nodes that lead to others, those too, each once and after all that lead to it, as ComfyUI runs them.

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
                links = list(self._links(self.nodes[name]))
                pictures = [link for link in links if link[0] in _PICTURES] if of_picture else []
                waiting += [(linked, False) for _, linked in reversed(pictures or links)]
        return order

    def _plain(self, value: Any) -> Any:
        """Follow a link to the constant at its end; a list stays where there is none."""
        for _ in self.nodes:
            linked = self._linked(value)
            if linked is None:
                return value
            node = self.nodes[linked]
            if _kind(node) == "Reroute":
                value = next(iter(_inputs(node).values()), None)
            elif _kind(node) in _CONSTANTS:
                value = _inputs(node).get(_CONSTANTS[_kind(node)])
            else:
                return value
        return value

    def _follow(self, value: Any, through: tuple[str, ...], kinds: Collection[str]) -> str | None:
        """Follow a link upward, along inputs of these names and Reroutes, to the first node of some kinds."""
        for _ in self.nodes:
            name = self._linked(value)
            if name is None or _kind(self.nodes[name]) in kinds:
                return name
            inputs = _inputs(self.nodes[name])
            if _kind(self.nodes[name]) == "Reroute":
                value = next(iter(inputs.values()), None)
            else:
                value = next((inputs[one] for one in through if one in inputs), None)
        return None

    def _take_sampler(self, draft: Draft, sampler: Node) -> None:
        """Take steps, guidance, seed and sampler; list what is not as usual."""
        inputs = {name: self._plain(value) for name, value in _inputs(sampler).items()}
        for name, usual in _USUAL.items():
            if inputs.get(name, usual) != usual:
                draft.say(f"{name} {shown(inputs[name])}")
        last, steps = as_number(inputs.get("end_at_step"), int), as_number(inputs.get("steps"), int)
        if last is not None and steps is not None and last < steps:
            draft.say(f"end_at_step {last}")
        for name, ours in (*_NUMBERS.items(), ("noise_seed" if "noise_seed" in inputs else "seed", "seed")):
            draft.take_number(ours, inputs.get(name), name)
        named, schedule = (self._plain(inputs.get(name, "")) for name in ("sampler_name", "scheduler"))
        if isinstance(named, str) and isinstance(schedule, str):
            draft.take_sampler(named, schedule)
        else:
            draft.say("the sampler, which another node names")

    def _take_prompt(self, draft: Draft, sampler: Node, name: str, ours: str) -> int | str | None:
        """Take one of the two prompts; returns where its CLIP stops, None for no prompt."""
        value: Any = _inputs(sampler).get(name)
        for _ in self.nodes:
            linked = self._linked(value)
            if linked is None:
                break
            node, inputs = self.nodes[linked], _inputs(self.nodes[linked])
            if _kind(node) == "CLIPTextEncode":
                text = self._plain(inputs.get("text"))
                if not isinstance(text, str):
                    break
                draft.settings[ours] = text
                return self._clip_layer(inputs.get("clip"))
            if _kind(node) == _ZERO_OUT:
                draft.say(f"a {_ZERO_OUT}: the {name} conditioning is all zeros, which no prompt gives")
                return None
            if _kind(node) == "Reroute":
                value = next(iter(inputs.values()), None)
            elif "positive" in inputs and "negative" in inputs:  # two outputs, in this order
                value = inputs["positive"] if value[1] == 0 else inputs["negative"] if value[1] == 1 else None
            else:
                value = next((inputs[one] for one in _CONDITIONING if one in inputs), None)
        draft.say(f"the {name} prompt, which is not plain text")
        return None

    def _clip_layer(self, link: Any) -> int | str:
        """Return the layer from the end at which CLIP stops, -1 where no node says one."""
        found = self._follow(link, ("clip",), (_CLIP_SKIP,))
        layer = -1 if found is None else self._plain(_inputs(self.nodes[found]).get("stop_at_clip_layer"))
        return layer if isinstance(layer, int) else shown(layer)

    def _take_clip_skip(self, draft: Draft, layers: set[int | str | None]) -> None:
        layer = as_number(next(iter(layers), -1), int)
        if len(layers) > 1 or layer is None or layer >= 0:
            draft.say(f"a {_CLIP_SKIP}: {shown(sorted(map(str, layers)))}")
        elif layer < -1:
            draft.settings["clip_skip"] = -int(layer) - 1

    def _take_size(self, draft: Draft, sampler: Node) -> str | None:
        """Take width and height; returns the name of the node with the empty latents."""
        linked = self._follow(_inputs(sampler).get("latent_image"), (), ("EmptyLatentImage",))
        if linked is None or _kind(self.nodes[linked]) != "EmptyLatentImage":
            draft.say("the init image")
            return None
        inputs = _inputs(self.nodes[linked])
        for name in ("width", "height"):
            draft.take_number(name, self._plain(inputs.get(name)), name)
        batch = self._plain(inputs.get("batch_size", 1))
        if batch != 1:
            draft.say(f"batch_size {shown(batch)}: which image of the batch it is")
        return linked

    def _say_node(self, draft: Draft, name: str, read: set[str | None]) -> None:
        """List a node that changes the image, with what it says; not those that were read."""
        node = self.nodes[name]
        kind = _kind(node)
        if name in read or kind in _SAMPLERS or (kind in _HARMLESS and kind != "EmptyLatentImage"):
            return
        values = {one: value for one, value in _inputs(node).items() if self._linked(value) is None}
        said = ", ".join(f"{one}: {shown(value)}" for one, value in list(values.items())[:8])
        draft.say(f"a {kind or 'node without a class'}" + (f" ({said})" if said else ""))


def _kind(node: Node) -> str:
    """Return the class of a node, in one line; empty for one without."""
    kind = node.get("class_type")
    return re.sub(r"\s+", " ", kind[:80]) if isinstance(kind, str) else ""


def _inputs(node: Node) -> dict[str, Any]:
    """Return a node's inputs; empty for none that are an object."""
    inputs = node.get("inputs")
    return inputs if isinstance(inputs, dict) else {}
