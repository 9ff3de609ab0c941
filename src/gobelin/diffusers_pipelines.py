"""Looking into pipelines of diffusers: which word painted which pixel, in a pipeline that somebody brings.

While it runs, PyTorch's forward hooks hear the queries and keys of its attention, and probabilities are computed beside
it, so that the image is the same bit for bit. Nothing of diffusers is imported.
"""

import inspect
import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial, wraps
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from gobelin.attention import AttentionSite, Trace, attention_probs, choose_sites
from gobelin.errors import GobelinError, ModelError, UsageError
from gobelin.images import open_image
from gobelin.look.collector import Collector
from gobelin.look.heatmaps import HeatMaps
from gobelin.plan import find_trace
from gobelin.prompt_weighting import PromptSyntax
from gobelin.schedule import NoiseSchedule, ScheduleConfig
from gobelin.settings import Prompts
from gobelin.text_conditioning import chunk_prompt
from gobelin.tokenizer import Tokenizer
from gobelin.unet import UNet
from gobelin.unet_config import UNetConfig
from gobelin.validation import shown, validated
from gobelin.words import Token, Words

_SITE = re.compile(r"(down|mid|up)_blocks?(?:\.(\d+))?\..+\.attn([12])")
_OWN_SIZE = (64, 64)  # latents for which a trace is checked before there are any
_FREE = ("time_cond_proj_dim",)  # of the U-Net's configuration: latent consistency models have one
_BLOCKS = ("CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")
# All are softmax(QKᵀ/√d)V with the module's own to_q and to_k; an IP-Adapter's adds the image prompt's attention to it.
_PROCESSORS = (
    *("AttnProcessor", "AttnProcessor2_0", "SlicedAttnProcessor", "XFormersAttnProcessor", "AttnProcessorNPU"),
    *("IPAdapterAttnProcessor", "IPAdapterAttnProcessor2_0", "IPAdapterXFormersAttnProcessor"),
)
_ASKED = "paint within `with gobelin.look_into(pipe) as look:`"


def look_into(
    pipe: Any,
    trace: Literal["sharp", True] | Trace = True,
    *,
    prompt: Prompts | None = None,
    negative: bool = False,
    weights: PromptSyntax = "none",
) -> "PipelineLook":
    """Look into a pipeline of diffusers, of the Stable Diffusion 1.x kind: heat maps beside the images that it paints.

    ``with gobelin.look_into(pipe) as look: pipe("a cat on a chair")``, and then ``look.heatmaps[0]["cat"]``; the images
    are what they would be without, bit for bit. ``trace`` is as in painting. ``prompt`` is the text of calls that are
    given ``prompt_embeds``, one for all of them or one for each, and ``weights`` the tool in whose meaning texts are
    weighed and split into chunks. ``negative`` looks at the words of the negative prompt in the prompt's place. Raises
    :class:`UsageError` for what cannot be looked into.
    """
    return PipelineLook(pipe, trace, prompt=prompt, negative=negative, weights=weights)


class PipelineLook:
    """Look into a pipeline of diffusers within a ``with`` block; :attr:`heatmaps` are those of its last call."""

    def __init__(
        self,
        pipe: Any,
        trace: Literal["sharp", True] | Trace,
        *,
        prompt: Prompts | None,
        negative: bool,
        weights: PromptSyntax,
    ):
        texts = [prompt] if prompt is None or isinstance(prompt, str) else prompt
        if not isinstance(texts, Sequence) or not all(text is None or isinstance(text, str) for text in texts):
            raise UsageError(f"the prompt is {shown(prompt)}: give text, or a list of texts")
        found = find_trace(tuple(find_attention(_unet_of(pipe))), trace, _OWN_SIZE)
        if found is None:
            raise UsageError('trace is False, and maps are all that there is to see: give True, "sharp" or a Trace')
        if found.also or found.negative:
            raise UsageError(
                "a trace in a pipeline of diffusers has neither also nor negative: leave them out, and look at the "
                "negative prompt by look_into(pipe, negative=True)"
            )
        self.pipe = pipe
        self.trace = trace
        self.prompt = prompt
        self.negative: bool = validated("negative", negative, bool)
        self.weights: PromptSyntax = validated("weights", weights, PromptSyntax)
        self._own_class: type | None = None
        self._tokenizer: tuple[tuple[Any, int], _PipelineTokenizer] | None = None
        self._heatmaps: list[HeatMaps] | GobelinError = UsageError(f"nothing has been painted yet: {_ASKED}")

    def __repr__(self) -> str:
        state = "looking" if self._own_class is not None else "not looking"
        return f"PipelineLook({type(self.pipe).__name__}, trace={self.trace!r}, {state})"

    def _repr_html_(self) -> str | None:
        maps = self._heatmaps
        return None if isinstance(maps, GobelinError) else "".join(one._repr_html_() for one in maps)

    def __enter__(self) -> Self:
        """Begin to look: until the block ends, a call of the pipeline goes through :meth:`_watch`.

        Python looks up ``__call__`` in the class, so the pipeline has one of its own meanwhile, with the same name.
        """
        own = type(self.pipe)
        if hasattr(own, "_gobelin_look"):
            raise UsageError("this pipeline is being looked into already: leave the first `with` block before another")

        @wraps(own.__call__)
        def call(pipe: Any, *args: Any, **kwargs: Any) -> Any:
            return self._watch(partial(own.__call__, pipe), args, kwargs)

        names = {
            "__call__": call,
            "__module__": own.__module__,
            "__qualname__": own.__qualname__,
            "_gobelin_look": self,
        }
        self.pipe.__class__ = type(own.__name__, (own,), names)
        self._own_class = own
        return self

    def __exit__(self, *error: object) -> None:
        """Give the pipeline its own class back."""
        assert self._own_class is not None
        self.pipe.__class__ = self._own_class
        self._own_class = None

    @property
    def heatmaps(self) -> list[HeatMaps]:
        """Heat maps of each image of the pipeline's last call, in its order.

        Raises :class:`UsageError` where there are none, and says why.
        """
        if isinstance(self._heatmaps, GobelinError):
            raise self._heatmaps
        return self._heatmaps

    def _watch(self, call: partial[Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the pipeline's own ``__call__``, and watch its U-Net meanwhile.

        What is wrong is said before anything is painted; once it is, the image is returned, whatever becomes of maps.
        """
        self._heatmaps = UsageError(
            "the last call of the pipeline did not finish, so it has no heat maps: call it again"
        )
        try:
            given = inspect.signature(call).bind(*args, **kwargs).arguments
        except TypeError:
            return call(*args, **kwargs)  # which says what is wrong
        given |= given.get("kwargs", {})
        unet = _unet_of(self.pipe)
        with ExitStack() as hooks:
            words, chunk_length = self._find_words(given), self._find_tokenizer().max_length
            watch = _CallWatch(look=self, unet=unet, words=words, chunk_length=chunk_length, hooks=hooks)
            handle = unet.register_forward_pre_hook(watch.begin_pass, with_kwargs=True)
            hooks.callback(handle.remove)
            output = call(*args, **kwargs)
        try:
            self._heatmaps = watch.heatmaps(output, is_latent=given.get("output_type") == "latent")
        except GobelinError as error:
            self._heatmaps = error
        return output

    def _find_words(self, given: Mapping[str, Any]) -> list[Words]:
        """Find the words of each image that a call with such arguments paints."""
        if given.get("padding_mask_crop") is not None:
            raise UsageError(
                "padding_mask_crop paints a part of the image and puts it back, and maps are of all of it: crop the "
                "image and the mask before, and leave it out"
            )
        prompts = given.get("prompt") if given.get("prompt") is not None else given.get("prompt_embeds")
        count = len(prompts) if isinstance(prompts, list | Tensor) else 1
        name = "negative_prompt" if self.negative else "prompt"
        said = given.get(name)
        if said is None and given.get(f"{name}_embeds") is not None:
            said = self.prompt
            if said is None:
                raise UsageError(
                    f"the pipeline is given {name}_embeds and no text, so nothing says which words they are: give "
                    "look_into(pipe, prompt=…)"
                )
        texts = [said or ""] * count if said is None or isinstance(said, str) else said
        if not isinstance(texts, Sequence) or len(texts) != count or not all(isinstance(text, str) for text in texts):
            raise UsageError(f"the {name} is {shown(said)} for {count} prompts: give text, one for all, or one of each")
        tokenizer = self._find_tokenizer()
        words = {text: tokenizer.prompt_words(self.pipe, text, self.weights) for text in dict.fromkeys(texts)}
        return [words[text] for text in texts for _ in range(given.get("num_images_per_prompt") or 1)]

    def _find_tokenizer(self) -> "_PipelineTokenizer":
        """Return the tokenizer that reads as the pipeline's, made once for as long as no words are added to that."""
        there = self.pipe.tokenizer, len(self.pipe.tokenizer)
        if self._tokenizer is None or self._tokenizer[0] != there:
            self._tokenizer = there, _PipelineTokenizer.of(self.pipe)
        return self._tokenizer[1]


@dataclass(kw_only=True)
class _CallWatch:
    """A call of a pipeline while it runs: what its U-Net is given, pass by pass, and the maps so far.

    ``words`` are each image's, of all chunks that its text makes, of ``chunk_length`` tokens each.
    """

    look: PipelineLook
    unet: nn.Module
    words: list[Words]
    chunk_length: int
    hooks: ExitStack
    recorder: "MapRecorder | None" = None

    def begin_pass(self, unet: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Choose the rows of a pass that are recorded, from what the U-Net is given; a forward hook."""
        given = dict(zip(("sample", "timestep", "encoder_hidden_states"), args, strict=False)) | kwargs
        if given.get("attention_mask") is not None or given.get("encoder_attention_mask") is not None:
            raise UsageError("the pipeline gives its U-Net a mask of attention, which cannot be looked through")
        latents, text = given["sample"], given["encoder_hidden_states"]
        count, size = len(self.words), (latents.shape[2], latents.shape[3])
        halves = 1 + bool(getattr(self.look.pipe, "do_classifier_free_guidance", latents.shape[0] == 2 * count))
        if not latents.shape[0] == text.shape[0] == halves * count:
            raise UsageError(
                f"{type(self.look.pipe).__name__} gives its U-Net {latents.shape[0]} latents and {text.shape[0]} texts "
                f"for {count} images: expected the prompt's, after those of the negative prompt where guidance is on"
            )
        if self.recorder is None:
            self.recorder = self._start_recorder(size, text.shape[1])
        if (size, text.shape[1]) != (self.recorder.latent_size, self.recorder.length):
            raise UsageError(
                "the pipeline paints in latents, or with texts, of several sizes, which have no common map"
            )
        self.recorder.rows = None
        if self._is_recorded(given["timestep"]) and not (self.look.negative and halves == 1):
            self.recorder.rows = slice(0, count) if self.look.negative else slice(-count, None)

    def heatmaps(self, output: Any, is_latent: bool) -> list[HeatMaps]:
        """Make the heat maps of the images that the call returned."""
        recorded = [self.recorder.maps(index) for index in range(len(self.words))] if self.recorder is not None else []
        if self.recorder is None or not any(recorded):
            half = "negative prompt, as guidance was off" if self.look.negative else "prompt"
            raise UsageError(f"in the last call no pass of the U-Net was made with a {half}: there is nothing to see")
        (h, w), factor = self.recorder.latent_size, getattr(self.look.pipe, "vae_scale_factor", 8)
        size = w * factor, h * factor
        images = [Image.new("RGB", size, "grey")] * len(self.words) if is_latent else _images_of(output)
        if len(images) != len(self.words) or any(image.size != size for image in images):
            seen = f"{len(images)} of {' and '.join(dict.fromkeys(f'{one.width}×{one.height}' for one in images))}"
            raise UsageError(
                f"the pipeline returned images that its U-Net did not paint whole ({seen} pixels, and latents are of "
                f"{len(self.words)} of {size[0]}×{size[1]}), so that maps would be of other pixels"
            )
        found = [
            HeatMaps(
                words=_words_of_length(words, self.recorder.length),
                maps=maps,
                latent_size=(h, w),
                image=image,
            )
            for words, maps, image in zip(self.words, recorded, images, strict=True)
        ]
        return [one.sharpened() for one in found] if self.recorder.trace.sharp else found

    def _start_recorder(self, size: tuple[int, int], length: int) -> "MapRecorder":
        """Choose sites for latents of a size, and begin to hear them."""
        if length % self.chunk_length:
            raise UsageError(
                f"the text embeddings have {length} tokens, and this pipeline's text encoder makes "
                f"{self.chunk_length} of a text, or of each of its chunks: which words they are cannot be told"
            )
        attention = find_attention(self.unet)
        trace = find_trace(tuple(attention), self.look.trace, size)
        assert trace is not None
        chosen = choose_sites(tuple(attention), trace.sites)
        last = self._progress(self.look.pipe.scheduler.timesteps[-1]) if trace.start else 0.0
        recorder = MapRecorder(
            modules={site: attention[site] for site in chosen},
            trace=replace(trace, start=min(trace.start, last)),
            latent_size=size,
            length=length,
        )
        return self.hooks.enter_context(recorder)

    def _is_recorded(self, timestep: Any) -> bool:
        """Tell whether the trace has begun at a timestep, and the pass is the first of a step, as Gobelin's are.

        A timestep on a GPU is read only where it matters.
        """
        assert self.recorder is not None
        scheduler, start = self.look.pipe.scheduler, self.recorder.trace.start
        if not getattr(scheduler, "state_in_first_order", True) or getattr(scheduler, "counter", 0) == 1:
            return False  # the second pass of a step of Heun's or DPM2's, or of PNDM's first
        return not start or self._progress(timestep) >= start

    def _progress(self, timestep: Any) -> float:
        schedule = ScheduleConfig(num_train_timesteps=self.look.pipe.scheduler.config.num_train_timesteps)
        return NoiseSchedule(schedule).progress(float(torch.as_tensor(timestep).flatten()[0]))


@dataclass(kw_only=True)
class MapRecorder:
    """Recorder of the attention maps of a diffusers U-Net, from the queries and keys that it computes for itself.

    ``modules`` are the attentions to hear, by their sites, ``rows`` those of a pass's batch that are recorded, None for
    none. It hears them as a context manager. The maps of passes are added up, so that memory does not grow with them.
    """

    modules: Mapping[AttentionSite, nn.Module]
    trace: Trace
    latent_size: tuple[int, int]
    length: int
    rows: slice | None = None
    _collector: Collector = field(init=False)
    _hooks: ExitStack = field(init=False, default_factory=ExitStack)

    def __post_init__(self) -> None:
        self._collector = Collector(self.trace)

    def __enter__(self) -> Self:
        for site, module in self.modules.items():
            heard: dict[str, Tensor] = {}
            parts = {name: module.get_submodule(f"to_{name}") for name in ("q", "k")}
            handles = [part.register_forward_hook(partial(self._hear, heard, name)) for name, part in parts.items()]
            handles.append(module.register_forward_pre_hook(partial(self._check, site)))
            handles.append(module.register_forward_hook(partial(self._record, site, heard)))
            for handle in handles:
                self._hooks.callback(handle.remove)
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.close()

    def maps(self, index: int) -> dict[AttentionSite, Tensor]:
        """Return the maps of one of the recorded rows, as :meth:`gobelin.look.collector.Collector.maps` does."""
        return self._collector.maps(index)

    def _check(self, site: AttentionSite, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Refuse an attention that is computed otherwise, before it is; a forward hook."""
        kind = type(module.processor)
        if kind.__name__ not in _PROCESSORS or not kind.__module__.startswith("diffusers."):
            raise UsageError(
                f"{site.name} has the attention processor {kind.__name__}, whose probabilities cannot be seen: set "
                "diffusers' own, pipe.unet.set_default_attn_processor()"
            )

    def _hear(self, heard: dict[str, Tensor], name: str, module: nn.Module, inputs: Any, output: Tensor) -> None:
        """Note queries or keys [B, patches or tokens, heads · width] until attention is done; a forward hook."""
        if self.rows is not None:
            heard[name] = output[self.rows]

    @torch.no_grad()
    def _record(
        self, site: AttentionSite, heard: dict[str, Tensor], module: nn.Module, inputs: Any, output: Any
    ) -> None:
        """Compute the probabilities of one attention, and add them to the maps; a forward hook."""
        if self.rows is None:
            return
        patches = site.grid(*self.latent_size)[0] * site.grid(*self.latent_size)[1]
        expected = {"q": patches, "k": patches if site.kind == "self" else self.length}
        found = {name: tensor.shape[1] for name, tensor in heard.items()}
        if found != expected:
            raise UsageError(
                f"{site.name} attends from {found.get('q', 0)} patches to {found.get('k', 0)}, where {expected['q']} "
                f"and {expected['k']} are expected: something in this pipeline merges, reuses or adds some"
            )
        query, key = (heard.pop(name).unflatten(-1, (site.heads, -1)).transpose(1, 2) for name in expected)
        with torch.autocast(query.device.type, enabled=False):  # maps are float32 wherever they are computed
            probs = attention_probs(query, key)
        self._collector.add({site: probs if self.trace.per_head else probs.mean(dim=1)})


class _PipelineTokenizer(Tokenizer):
    """A tokenizer that splits texts as a pipeline's does, and knows which characters a token stands for.

    A word of several vectors is followed by tokens ``word_1``, ``word_2``, … that the pipeline adds to the prompt.
    """

    @classmethod
    def of(cls, pipe: Any) -> Self:
        """Make the tokenizer from the files that the pipeline's own writes, of whatever release of transformers."""
        with TemporaryDirectory() as folder:
            pipe.tokenizer.save_pretrained(folder)
            try:
                return cls.from_pretrained(Path(folder))
            except ModelError as error:
                raise UsageError(f"the pipeline's tokenizer is none that CLIP has: {error}") from error

    def tokens(self, text: str) -> list[Token]:
        """Return the tokens of a text, without BOS and EOS, with those that the pipeline adds."""
        return [one for token in super().tokens(text) for one in (token, *self._more_vectors(token))]

    def _more_vectors(self, token: Token) -> list[Token]:
        """List what follows the token of a word of several vectors, which stands for the same characters."""
        if not token.whole:
            return []
        more, word = [token], self._added[token.id].content
        while (number := self.vocab.get(f"{word}_{len(more)}")) is not None:
            more.append(replace(token, id=number))
        return more[1:]

    def prompt_words(self, pipe: Any, text: str, weights: PromptSyntax) -> Words:
        """Find the words of a text, in all of its chunks.

        Raises :class:`UsageError` where the pipeline's own tokenizer reads other tokens.
        """
        if weights == "none":
            convert = getattr(pipe, "maybe_convert_prompt", lambda text, _: text)
            read = pipe.tokenizer(convert(text, pipe.tokenizer), truncation=True, max_length=self.max_length).input_ids
            ids = [token.id for token in self.tokens(text)]
            if list(read) != self.padded(ids)[: min(len(ids) + 2, self.max_length)]:
                raise UsageError(
                    f"this pipeline's tokenizer reads {shown(text)} as other tokens than CLIP's, so that its words "
                    "cannot be told from each other: write it in plainer letters"
                )
        return chunk_prompt(self, text, weights).words


def find_attention(unet: nn.Module) -> dict[AttentionSite, nn.Module]:
    """Find the attentions of a diffusers U-Net, by the sites that :class:`gobelin.unet.UNet` has, in its order."""
    found: dict[str, dict[AttentionSite, nn.Module]] = {"down": {}, "mid": {}, "up": {}}
    deepest = len(unet.get_submodule("down_blocks")) - 1  # pyright: ignore[reportArgumentType]
    for name, module in unet.named_modules():
        if (path := _SITE.fullmatch(name)) is None:
            continue
        part, number, which = path.groups()
        level = {"down": int(number or 0), "mid": deepest, "up": deepest - int(number or 0)}[part]
        kind, heads = "self" if which == "1" else "cross", int(module.heads)  # pyright: ignore[reportArgumentType]
        site = AttentionSite(name=name, kind=kind, downscale=2**level, heads=heads)
        found[part][site] = module
    return found["down"] | found["mid"] | found["up"]


def _unet_of(pipe: Any) -> nn.Module:
    """Return the U-Net of a pipeline; raises :class:`UsageError` for a pipeline that cannot be looked into."""
    unet, kind = getattr(pipe, "unet", None), type(pipe).__name__
    if isinstance(unet, UNet):
        raise UsageError("this is a pipeline of Gobelin's own, which traces what it paints: call it with trace=True")
    if not callable(pipe) or isinstance(pipe, nn.Module | type) or not hasattr(pipe, "scheduler"):
        raise UsageError(f"look_into is given {shown(pipe)}: give a pipeline of diffusers, of Stable Diffusion 1.x")
    whole = f"{kind} cannot be looked into"
    if not isinstance(unet, nn.Module):
        raise UsageError(f"{whole}: it has no U-Net that PyTorch runs, as Stable Diffusion 1.x has")
    if hasattr(unet, "_orig_mod") or any(getattr(one, "_compiled_call_impl", None) for one in unet.modules()):
        raise UsageError(
            f"{whole} while its U-Net is compiled, since what records maps would make it another program: give it the "
            "U-Net that torch.compile was given"
        )
    if "UNet2DConditionModel" not in (base.__name__ for base in type(unet).__mro__):
        raise UsageError(f"{whole}: its U-Net is a {type(unet).__name__}, and Stable Diffusion 1.x has another")
    config: Any = unet.config
    for name, only in UNetConfig.fixed.items():
        if name not in _FREE and config.get(name, only) != only:
            raise UsageError(
                f"{whole}: its U-Net has {name} {shown(config[name])}, and that of Stable Diffusion 1.x {shown(only)}"
            )
    if other := [name for name in (*config["down_block_types"], *config["up_block_types"]) if name not in _BLOCKS]:
        raise UsageError(f"{whole}: its U-Net has a {other[0]}, and that of Stable Diffusion 1.x has none")
    if getattr(pipe, "tokenizer", None) is None:
        raise UsageError(f"{whole}: it has no tokenizer, which says what words a prompt has: give it one")
    return unet


def _words_of_length(words: Words, length: int) -> Words:
    """Return the words among so many positions: the first chunks, or all of them and padding.

    A pipeline of diffusers cuts a long text; where another text is longer, whoever encodes them pads the shorter one.
    """
    if words.length <= length:
        return replace(words, kinds=(*words.kinds, *("padding",) * (length - words.length)))
    spans = [replace(span, tokens=tuple(one for one in span.tokens if one < length)) for span in words.spans]
    return replace(words, spans=tuple(span for span in spans if span.tokens), kinds=words.kinds[:length])


def _images_of(output: Any) -> list[Image.Image]:
    """Return the images of a pipeline's output, whatever kind was asked for."""
    images = output[0] if isinstance(output, tuple) else getattr(output, "images", None)
    if isinstance(images, Tensor):
        return [open_image(image.float().cpu() * 2 - 1) for image in images]
    if isinstance(images, np.ndarray) or (isinstance(images, list) and images):
        return [open_image(image) for image in images]
    raise UsageError("the pipeline returned no images: there is nothing that maps could be of")
