"""Image features: the networks in whose features images are compared, and captions with images where they read both.

Inception is torch-fidelity's, CLIP is transformers', and both packages are asked for only where they are used. A model
that was trained from scratch has an image encoder of its own.
"""

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from gobelin.clip import IMAGE_ENCODER, ImageEncoder, TextEncoder
from gobelin.errors import ModelError, UsageError
from gobelin.formats.files import read_json
from gobelin.images import images_to_tensor
from gobelin.tokenizer import Tokenizer

INCEPTION = "inception"
EXTRA = "fidelity"
_BATCH_SIZE = 32


class ImageFeatures(ABC):
    """Turn images into features; ``description`` says of what network, as a report has to."""

    description: str

    @abstractmethod
    def encode_images(self, images: UInt8[np.ndarray, "batch height width 3"]) -> Float[Tensor, "batch features"]:
        """Encode RGB images of one size."""


class SharedSpace(ImageFeatures):
    """Turn captions into features too, in the same space: the cosine says how well the two go together."""

    @abstractmethod
    def encode_captions(self, captions: Sequence[str]) -> Float[Tensor, "batch features"]:
        """Encode captions; what is longer than the network reads is cut."""


class InceptionFeatures(ImageFeatures):
    """Pooled features of the Inception network that FID and KID are defined by: 2,048, of TensorFlow's weights of 2015.

    torch-fidelity's network scales images to 299×299 as TensorFlow did. ``weights`` None takes its file, downloaded at
    first use. Raises :class:`ModelError` where there is none, or where the file is another network's.
    """

    def __init__(self, weights: Path | None = None, device: torch.device | None = None):
        network = require_package("torch_fidelity.feature_extractor_inceptionv3")
        file = weights or _downloaded(network.URL_INCEPTION_V3)
        try:
            # The package unpickles what it is given, so the file is read without running anything first.
            torch.load(file, map_location="cpu", weights_only=True)
            self._network = network.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(file)).to(device)
        except Exception as error:  # of pickles, zip files, and names and shapes of tensors
            raise ModelError(
                f"{file} does not hold the weights of FID's Inception: give the file at {network.URL_INCEPTION_V3}"
            ) from error
        self._device = device
        self.description = "Inception (pool3, TensorFlow's weights of 2015, torch-fidelity)"

    @torch.no_grad()
    def encode_images(self, images: UInt8[np.ndarray, "batch height width 3"]) -> Float[Tensor, "batch features"]:
        """Encode RGB images to pooled features."""
        levels = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
        return self._network(levels.to(self._device))[0]


class GobelinFeatures(SharedSpace):
    """Features of the image and text encoders that a model trained from scratch has: unit vectors times √features.

    The factor makes KID's kernel, (x·y / features + 1)³, one of cosines. Raises :class:`ModelError` where the
    folder lacks a part.
    """

    def __init__(self, folder: Path, device: torch.device | None = None):
        self._images = ImageEncoder.from_pretrained(folder / IMAGE_ENCODER, torch.float32).to(device)
        self._texts = TextEncoder.from_pretrained(folder / "text_encoder", torch.float32).to(device)
        self._tokenizer = Tokenizer.from_pretrained(folder / "tokenizer")
        self._device = device
        self._scale = self._images.config.projection_dim**0.5
        self.description = (
            f"the image encoder of the model {folder.resolve().name} (no independent judge of that model)"
        )

    @torch.no_grad()
    def encode_images(self, images: UInt8[np.ndarray, "batch height width 3"]) -> Float[Tensor, "batch features"]:
        """Encode RGB images, scaled to the encoder's size."""
        return self._scale * self._images(images_to_tensor(images).to(self._device))

    @torch.no_grad()
    def encode_captions(self, captions: Sequence[str]) -> Float[Tensor, "batch features"]:
        """Encode captions, pooled at their end."""
        token_ids = self._tokenizer(captions).to(self._device)
        return self._scale * self._images.project_text(self._texts.pooled(token_ids, self._texts(token_ids)))


class CLIPFeatures(SharedSpace):
    """Projected features of a CLIP in transformers' layout, not normalised, as clean-fid and torch-fidelity take them.

    Its processor scales and crops images. Raises :class:`ModelError` for a folder that transformers cannot open.
    """

    def __init__(self, folder: Path, device: torch.device | None = None):
        transformers = require_package("transformers")
        logging = transformers.utils.logging
        shows_progress = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()  # of a second's loading
        try:
            self._clip = transformers.CLIPModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
            processor = transformers.CLIPProcessor.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # of files, JSON, tensors and tokenizers
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ModelError(f"{folder} cannot be opened as a CLIP of transformers: {reason}") from error
        finally:
            if shows_progress:
                logging.enable_progress_bar()
        self._clip.to(device).eval()
        self._device = device
        self._processor, self._tokenizer = processor.image_processor, processor.tokenizer
        self._length = self._clip.config.text_config.max_position_embeddings
        self.description = f"CLIP ({folder.resolve().name}, transformers)"

    @torch.no_grad()
    def encode_images(self, images: UInt8[np.ndarray, "batch height width 3"]) -> Float[Tensor, "batch features"]:
        """Encode RGB images, scaled and cropped by CLIP's processor."""
        pixels = self._processor(list(images), return_tensors="pt", input_data_format="channels_last")
        return self._clip.get_image_features(pixel_values=pixels["pixel_values"].to(self._device)).pooler_output

    @torch.no_grad()
    def encode_captions(self, captions: Sequence[str]) -> Float[Tensor, "batch features"]:
        """Encode captions."""
        tokens = self._tokenizer(
            list(captions), padding=True, truncation=True, max_length=self._length, return_tensors="pt"
        )
        return self._clip.get_text_features(**tokens.to(self._device)).pooler_output


def open_image_features(source: str | Path, device: torch.device | None = None) -> ImageFeatures:
    """Open features by their name or path: "inception", a file of its weights, a folder of a model or of a CLIP.

    Raises :class:`ModelError` for a path with none of these, and :class:`UsageError` where a package is missing.
    """
    path = Path(source)
    if str(source) == INCEPTION:
        return InceptionFeatures(device=device)
    if path.is_file():
        return InceptionFeatures(path, device)
    if (path / IMAGE_ENCODER).is_dir():
        return GobelinFeatures(path, device)
    if (path / "config.json").is_file() and read_json(path / "config.json").get("model_type") == "clip":
        return CLIPFeatures(path, device)
    found = f"{source} has no network that encodes images" if path.exists() else f"there is nothing at {source}"
    raise ModelError(
        f"{found}: give a model folder with an {IMAGE_ENCODER}, a CLIP's folder of transformers, or a file of "
        "Inception's weights"
    )


def encode_in_batches(
    images: Iterable[UInt8[np.ndarray, "height width 3"]],
    networks: Sequence[ImageFeatures],
    advance: Callable[[int], None] = lambda count: None,
) -> list[Float[Tensor, "images _"]]:
    """Encode images of one size by several networks, each image read once: features in float64, on the CPU.

    ``advance`` is called with the number of images of each batch.
    """
    found: list[list[Tensor]] = [[] for _ in networks]
    rest = iter(images)
    while batch := list(islice(rest, _BATCH_SIZE)):
        for features, network in zip(found, networks, strict=True):
            features.append(network.encode_images(np.stack(batch)).double().cpu())
        advance(len(batch))
    return [torch.cat(features) for features in found]


def encode_all_captions(network: SharedSpace, captions: Sequence[str]) -> Float[Tensor, "captions features"]:
    """Encode captions in batches: features in float64, on the CPU."""
    parts = (captions[start : start + _BATCH_SIZE] for start in range(0, len(captions), _BATCH_SIZE))
    return torch.cat([network.encode_captions(part).double().cpu() for part in parts])


def require_package(name: str) -> Any:
    """Import a module that only fidelity needs; raises :class:`UsageError` that says how to install it."""
    try:
        return import_module(name)
    except ImportError as error:
        package = name.partition(".")[0].replace("_", "-")
        raise UsageError(f"{package} is not installed: pip install 'gobelin[{EXTRA}]'") from error
    except (OSError, RuntimeError) as error:  # of a torchvision that was built for another torch
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UsageError(f"{name} cannot be imported ({reason}): install the torchvision of your torch") from error


def _downloaded(url: str) -> Path:
    """Return the file of Inception's weights, downloaded by PyTorch where it is not there yet."""
    file = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            digest = file.stem.rpartition("-")[2]
            torch.hub.download_url_to_file(url, str(file), hash_prefix=digest, progress=sys.stderr.isatty())
        except (OSError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise ModelError(
                f"Inception's weights cannot be downloaded ({reason}): fetch {url} and put it at {file}, or give its "
                "path as --features"
            ) from error
    return file
