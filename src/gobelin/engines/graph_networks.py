"""Networks that run as graphs: made of a U-Net or a VAE's decoder for one shape of inputs, and kept while it lasts.

An engine says how a graph is compiled; here is when, for what, and what is done where there is none.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Self

import torch
from jaxtyping import Bool, Float, Num
from torch import Tensor, nn

from gobelin.attention import AnyAttentionEdit, AttentionMaps, AttentionSite, ExtraWords, Reduction, Sites, choose_sites
from gobelin.engines.engine import DecoderRunner, UNetRunner
from gobelin.engines.watched_weights import WatchedWeights
from gobelin.shortcuts import Shortcuts
from gobelin.unet import UNet
from gobelin.vae import VAE, decode_in_tiles

RunGraph = Callable[[Mapping[str, Tensor]], tuple[Tensor, ...]]
"""A compiled graph: inputs by name in, outputs in their order."""


class TracedMaps(NamedTuple):
    """The attention maps that are outputs of a graph, as :meth:`UNet.trace` takes them; ``rows`` from and to.

    ``lengths`` are those of the words that are looked for beside the text, whose embeddings are an input.
    """

    sites: tuple[AttentionSite, ...]
    reduce: Reduction
    rows: tuple[int, int]
    lengths: tuple[int, ...] = ()


class UNetGraph(nn.Module):
    """A U-Net's forward pass with inputs by name: the prediction, then the maps of the sites that are traced."""

    def __init__(self, unet: UNet, traced: TracedMaps | None = None):
        super().__init__()
        self.unet = unet
        self.traced = traced

    def forward(
        self,
        noisy_latents: Tensor,
        timesteps: Tensor,
        text_embeddings: Tensor,
        text_mask: Tensor | None = None,
        also: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        if self.traced is None:
            return (self.unet(noisy_latents, timesteps, text_embeddings, text_mask),)
        sites, reduce, rows, lengths = self.traced
        words = None if also is None else ExtraWords(embeddings=also, lengths=lengths)
        text = text_embeddings, text_mask
        prediction, maps = self.unet.trace(noisy_latents, timesteps, *text, sites, reduce, slice(*rows), also=words)
        return (prediction, *(maps[site] for site in sites))

    def __str__(self) -> str:
        return f"U-Net {self.unet.config} {self.traced}"


class DecoderGraph(nn.Module):
    """A VAE's decoder: latents of about unit variance to an image."""

    def __init__(self, vae: VAE):
        super().__init__()
        self.vae = vae

    def forward(self, latents: Tensor) -> tuple[Tensor, ...]:
        return (self.vae.latents_to_images(latents),)

    def __str__(self) -> str:
        return f"VAE {self.vae.config}"


class Compile(NamedTuple):
    """A graph to be compiled: its module, example inputs by name, and the weights that it has now."""

    graph: nn.Module
    inputs: Mapping[str, Tensor]
    weights: WatchedWeights


class Graphs:
    """The graphs of one network, each compiled when it is first needed, and again when the weights have changed.

    Where an engine cannot compile or run one, that is said in a warning, and PyTorch runs the network from then on.
    """

    def __init__(self, name: str, network: nn.Module, compile_graph: Callable[[Compile], RunGraph]):
        self._name = name
        self._weights = WatchedWeights(network)
        self._compile = compile_graph
        self._compiled: dict[str, RunGraph] = {}
        self._said: set[str] = set()
        self._fails = False
        self.reads_weights = False
        """Whether the next run is to read the weights, and so to find every change."""

    def run(self, graph: nn.Module, inputs: Mapping[str, Tensor | None]) -> tuple[Tensor, ...] | None:
        """Run a graph, or return None where PyTorch is to do it."""
        if self._fails:
            return None
        given = {name: tensor for name, tensor in inputs.items() if tensor is not None}
        if self._weights.have_changed(read=self.reads_weights):
            self._compiled.clear()
        self.reads_weights = False
        key = f"{graph} {describe_inputs(given)}"
        try:
            if key not in self._compiled:
                self._compiled[key] = self._compile(Compile(graph, given, self._weights))
            return self._compiled[key](given)
        except Exception as error:  # of compilers and libraries, which raise whatever they like
            reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
            self.say(f"the engine {self._name} cannot run this network, so PyTorch does: {reason[:200]}")
            self._fails = True
            return None

    def say(self, sentence: str) -> None:
        """Warn, once of each."""
        if sentence not in self._said:
            self._said.add(sentence)
            warnings.warn(sentence, stacklevel=2)


def describe_inputs(inputs: Mapping[str, Tensor]) -> str:
    """Describe inputs by name, precision and shape: graphs are made for one of each."""
    return ", ".join(f"{name} {tensor.dtype} {list(tensor.shape)}" for name, tensor in inputs.items())


class GraphUNet(UNetRunner):
    """A U-Net that runs as graphs: the same numbers up to rounding, and a prediction that is the same traced or not.

    Passes with attention edits, whose functions are Python's, those that gradients are wanted of, and those that take
    shortcuts are PyTorch's.
    """

    def __init__(self, name: str, unet: UNet, compile_graph: Callable[[Compile], RunGraph]):
        super().__init__(unet)
        self._graphs = Graphs(name, unet, compile_graph)
        self._name = name
        self._same_bits: dict[str, bool] = {}

    def looking_closely(self) -> Self:
        """Have the next pass read the weights, to find every change; returns this."""
        self._graphs.reads_weights = True
        return self

    def __call__(
        self,
        noisy_latents: Float[Tensor, "images in_channels height width"],
        timesteps: Num[Tensor, " images"],
        text_embeddings: Float[Tensor, "batch length text_width"],
        text_mask: Bool[Tensor, "batch length"] | None = None,
    ) -> Float[Tensor, "batch out_channels height width"]:
        """Predict, as :class:`UNet` does."""
        inputs = _named(noisy_latents, timesteps, text_embeddings, text_mask)
        if not self._with_gradients(inputs):
            outputs = self._graphs.run(UNetGraph(self._unet), inputs)
            if outputs is not None:
                return outputs[0]
        return self._unet(noisy_latents, timesteps, text_embeddings, text_mask)

    def trace(
        self,
        noisy_latents: Float[Tensor, "images in_channels height width"],
        timesteps: Num[Tensor, " images"],
        text_embeddings: Float[Tensor, "batch length text_width"],
        text_mask: Bool[Tensor, "batch length"] | None = None,
        sites: Sites = None,
        reduce: Reduction = "heads",
        rows: slice | None = None,
        edits: Sequence[AnyAttentionEdit] = (),
        shortcuts: Shortcuts | None = None,
        unedited: int = 0,
        also: ExtraWords | None = None,
    ) -> tuple[Float[Tensor, "batch out_channels height width"], AttentionMaps]:
        """Predict, bit for bit as a plain call of this engine, and return attention maps, as :meth:`UNet.trace` does.

        Maps are further outputs of another graph. Both graphs run the first time: where their predictions differ, as
        they may in half precision, both always do.
        """
        inputs = _named(noisy_latents, timesteps, text_embeddings, text_mask)
        chosen = choose_sites(self.attention_sites, sites)
        if edits:
            self._graphs.say(
                f"the engine {self._name} has no attention controls: PyTorch runs the passes that they change"
            )
        if shortcuts is not None:
            self._graphs.say(f"the engine {self._name} takes no shortcuts: PyTorch runs the passes that do")
        elif not edits and not self._with_gradients(inputs):
            if not chosen:
                return self(noisy_latents, timesteps, text_embeddings, text_mask), {}
            start, stop, _ = (slice(None) if rows is None else rows).indices(len(text_embeddings))
            lengths = () if also is None else also.lengths
            beside = None if also is None else also.embeddings
            outputs = self._traced(TracedMaps(chosen, reduce, (start, stop), lengths), inputs, beside)
            if outputs is not None:
                return outputs[0], dict(zip(chosen, outputs[1:], strict=True))
        text = text_embeddings, text_mask
        return self._unet.trace(noisy_latents, timesteps, *text, sites, reduce, rows, edits, shortcuts, unedited, also)

    def _traced(
        self, traced: TracedMaps, inputs: Mapping[str, Tensor | None], also: Tensor | None
    ) -> tuple[Tensor, ...] | None:
        """Run the graph with maps, and the plain one too where its prediction has other bits."""
        graph = UNetGraph(self._unet, traced)
        given = {**inputs, "also": also}
        key = f"{graph} {describe_inputs({name: one for name, one in given.items() if one is not None})}"
        outputs = self._graphs.run(graph, given)
        if outputs is None or self._same_bits.get(key, False):
            return outputs
        plain = self._graphs.run(UNetGraph(self._unet), inputs)
        if plain is None:
            return None
        self._same_bits.setdefault(key, torch.equal(plain[0], outputs[0]))
        return (plain[0], *outputs[1:])

    def _with_gradients(self, inputs: Mapping[str, Tensor | None]) -> bool:
        """Tell whether gradients are wanted, which graphs do not have; that is said once."""
        if not torch.is_grad_enabled() or not any(one is not None and one.requires_grad for one in inputs.values()):
            return False
        self._graphs.say(f"the engine {self._name} has no gradients: PyTorch runs the passes that need them")
        return True


class GraphVAE(DecoderRunner):
    """A VAE's decoder that runs as a graph, one image at a time, so that there is one graph for a size."""

    def __init__(self, name: str, vae: VAE, compile_graph: Callable[[Compile], RunGraph]):
        super().__init__(vae)
        self._graphs = Graphs(name, vae, compile_graph)

    def looking_closely(self) -> Self:
        """Have the next decoding read the weights, to find every change; returns this."""
        self._graphs.reads_weights = True
        return self

    def latents_to_images(
        self, latents: Float[Tensor, "batch latent_channels h w"]
    ) -> Float[Tensor, "batch 3 height width"]:
        """Decode latents, as :meth:`VAE.latents_to_images` does."""
        images: list[Tensor] = []
        for one in latents.split(1):
            outputs = self._graphs.run(DecoderGraph(self._vae), {"latents": one})
            images.append(self._vae.latents_to_images(one) if outputs is None else outputs[0])
        return torch.cat(images)

    def latents_to_large_images(
        self, latents: Float[Tensor, "batch latent_channels h w"], tile: int = 64, overlap: int = 16
    ) -> Float[Tensor, "batch 3 height width"]:
        """Decode latents in tiles, as :meth:`VAE.latents_to_large_images` does."""
        return decode_in_tiles(self.latents_to_images, self.config, latents, tile, overlap)


def _named(
    noisy_latents: Tensor, timesteps: Tensor, text_embeddings: Tensor, text_mask: Tensor | None
) -> dict[str, Tensor | None]:
    return {
        "noisy_latents": noisy_latents,
        "timesteps": timesteps.float(),
        "text_embeddings": text_embeddings,
        "text_mask": text_mask,
    }
