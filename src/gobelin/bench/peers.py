"""Peers: the other programs that a benchmark compares with, whether they are there, and how to install them."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from gobelin.validation import refuse_unknown


@dataclass(frozen=True, kw_only=True)
class Peer:
    """Another program: the modules that it needs, the distribution that has its version, and how to install it."""

    name: str
    modules: tuple[str, ...]
    distribution: str
    install: str

    @property
    def missing(self) -> list[str]:
        """The modules that are not there."""
        return [module for module in self.modules if find_spec(module) is None]

    @property
    def version(self) -> str | None:
        """The version that is there, or None."""
        if self.missing:
            return None
        try:
            return version(self.distribution)
        except PackageNotFoundError:  # a copy beside the environment, without its metadata
            return "of unknown version"

    @property
    def line(self) -> str:
        """Say in one line whether it is there, and else how to install it."""
        if not self.missing:
            return f"{self.name} {self.version}"
        return f"{self.name} is not installed (no {', '.join(self.missing)}): {self.install}"


PEERS = {
    peer.name: peer
    for peer in (
        Peer(
            name="diffusers",
            modules=("diffusers", "transformers"),
            distribution="diffusers",
            install="pip install diffusers transformers",
        ),
        Peer(
            name="openvino",
            modules=("openvino", "diffusers", "transformers"),
            distribution="openvino",
            install="pip install openvino diffusers transformers",
        ),
        Peer(
            name="stable-diffusion.cpp",
            modules=("stable_diffusion_cpp",),
            distribution="stable-diffusion-cpp-python",
            install="pip install stable-diffusion-cpp-python, which compiles for some minutes",
        ),
        Peer(
            name="daam",
            modules=("daam", "matplotlib", "diffusers", "transformers"),
            distribution="daam",
            install="pip install daam",
        ),
        Peer(
            name="attention-map-diffusers",
            modules=("attention_map_diffusers", "diffusers", "transformers"),
            distribution="attention-map-diffusers",
            install="pip install attention-map-diffusers",
        ),
        Peer(name="peft", modules=("peft", "diffusers"), distribution="peft", install="pip install peft diffusers"),
    )
}


def find_peers(names: Sequence[str]) -> list[Peer]:
    """Find peers by name, all for none; raises :class:`UsageError` with the nearest name for one that is unknown."""
    refuse_unknown(names, PEERS, what="peer")
    return [PEERS[name] for name in names or PEERS]
