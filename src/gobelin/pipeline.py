"""The pipeline: a model that paints. A prompt and settings in, a painting of steps and images out."""

import inspect
import warnings
from collections.abc import Callable, Generator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
from PIL import Image
from torch import nn

from gobelin.adapters.learned_words import LearnedWords
from gobelin.adapters.lora import Loras
from gobelin.attention import Trace
from gobelin.captioned_images import (
    FEATURE_NOISES,
    FEATURE_TIMESTEP,
    LOOK_TIMESTEPS,
    PRESENCE_NOISES,
    PRESENCE_TIMESTEPS,
    LookOptions,
    features_of_images,
    look_at_images,
    presence_in_images,
)
from gobelin.checkpoint import Model, open_model
from gobelin.checkpoint.diffusers_folder import save_folder
from gobelin.checkpoint.shipped import shipped_model
from gobelin.checkpoint.single_file import save_single_file
from gobelin.clip import TextEncoder
from gobelin.concept_erasure import erase_words
from gobelin.control import AnyControl, EditGuidance, FlowEdit, LocalBlend, prompt_to_prompt, reweight
from gobelin.control.alignment import layout_change
from gobelin.engines import EngineName, find_engine
from gobelin.errors import UsageError
from gobelin.formats.textual_inversion import read_textual_inversion
from gobelin.images import ImageSource, open_image, tensor_to_images
from gobelin.inpainting import InitImage
from gobelin.look.heatmaps import HeatMaps
from gobelin.look.patch_features import PatchFeatures
from gobelin.painting import EditPainting, Painting, PaintingStep, Result
from gobelin.plan import control_list, latent_size, make_plan
from gobelin.prompt_weighting import PromptSyntax
from gobelin.schedule import NoiseSchedule
from gobelin.settings import LEARNED_WORDS, LORAS, EditSettings, Prompts, Settings, takes_settings
from gobelin.text_conditioning import TextConditioning, batch_texts, chunk_prompt, encode_chunks
from gobelin.tokenizer import Tokenizer
from gobelin.types import Latents
from gobelin.unet import UNet
from gobelin.vae import VAE
from gobelin.validation import refuse_unknown, validated
from gobelin.words import Words

__all__ = ["EditSettings", "Painting", "PaintingStep", "Pipeline", "Result", "Settings", "find_device", "shipped_model"]

DTYPES = {str(one).removeprefix("torch."): one for one in (torch.float32, torch.bfloat16, torch.float16, torch.float64)}
"""The precisions that a model is painted with and saved in, by name."""


class Pipeline:
    """A model that paints: call it with a prompt and settings, or start a painting and go through its steps."""

    def __init__(self, model: Model):
        for network in (model.unet, model.vae, model.text_encoder):
            network.eval()
        self.model = model
        self._learned = LearnedWords(model.tokenizer, model.text_encoder)
        self.loras = Loras({"unet": model.unet, "text_encoder": model.text_encoder}, self._learned)
        self.learned_words: list[str] = []
        self._is_rounded = False
        self.use("eager")

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        engine: EngineName = "eager",
        **options: Any,
    ) -> Self:
        """Open a model: one that ships with Gobelin by its name ("tiny", which is also what None is, or "emoji"), a
        diffusers folder, an original ``.safetensors`` or ``.ckpt`` file, or a repository of the Hub by its name.

        ``device`` None takes the best there is (cuda, mps, cpu); ``dtype`` None, or "auto", the fastest for the device
        and the model: bfloat16 for large ones where it is multiplied faster, float32 otherwise. ``engine`` is as
        in :meth:`use`. The other options are those of :func:`gobelin.checkpoint.open_model`. Raises :class:`ModelError`
        that names the file and what is wrong with it.
        """
        source = shipped_model() if path is None else validated("the model", path, Annotated[str | Path, "its path"])
        refuse_unknown(options, list(inspect.signature(open_model).parameters)[3:])
        find_engine(engine)  # is refused before a model is opened
        chosen = "auto" if dtype in (None, "auto") else find_dtype(dtype)
        pipeline = cls(open_model(source, find_device(device), chosen, **options)).use(engine)
        pipeline._is_rounded = chosen == "auto" and pipeline.unet.dtype != torch.float32
        return pipeline

    @takes_settings(Settings)
    def __call__(self, prompt: Prompts, settings: Settings) -> Result:
        """Paint one prompt or several; results are in prompt-major order, then by count.

        ``pipe("a red circle", steps=20, seed=3)``; a :class:`Settings` is passed as ``pipe(prompt, **settings)``.
        Raises :class:`UsageError` for what cannot be painted.
        """
        return self._start(prompt, settings).result

    @takes_settings(Settings)
    def start(self, prompt: Prompts, settings: Settings) -> Painting:
        """Start a painting: check everything, and return what goes through the steps.

        ``for step in pipe.start("a red circle"): step.preview()``; its ``settings`` are known before the first step,
        ``cancel()`` ends it, ``result`` runs what is left. Raises :class:`UsageError` for what cannot be painted.
        """
        return self._start(prompt, settings)

    @takes_settings(EditSettings)
    def edit(self, prompt: str, to: str, settings: EditSettings) -> Result:
        """Edit an image: paint ``prompt``, or take ``init_image``, which it describes, and change it to what ``to``
        says.

        Returns two images, before and after. The change goes by FlowEdit and prompt-to-prompt's attention, and stays
        within the pixels of the words that changed (:mod:`gobelin.control`), unless these say how many things there are
        or where: then it is free to move them. A ``control`` concerns the change alone,
        and outside of a ``mask`` nothing changes. The paper's prompt-to-prompt by itself is
        ``method="prompt_to_prompt", self_replace=0.4, edit_guidance=0, local_blend=()``.
        """
        return self._start_edit(prompt, to, settings).result

    @takes_settings(EditSettings)
    def start_edit(self, prompt: str, to: str, settings: EditSettings) -> EditPainting:
        """Start an edit, as :meth:`edit` makes it: check everything, and return what goes through the steps."""
        return self._start_edit(prompt, to, settings)

    def look(
        self,
        images: ImageSource | Sequence[ImageSource],
        captions: Prompts,
        *,
        timesteps: Sequence[int] = LOOK_TIMESTEPS,
        trace: Literal["sharp", True] | Trace = "sharp",
        also: Sequence[str] = (),
        seed: int = 0,
        height: int | None = None,
        width: int | None = None,
        weights: PromptSyntax | None = None,
        clip_skip: int | None = None,
        advance: Callable[[int], None] = lambda timestep: None,
    ) -> list[HeatMaps]:
        """Look at images that anybody made: which word of its caption each pixel hears, in heat maps of every word.

        ``pipe.look("photo.jpg", "a cat on a chair")[0]["cat"]``. One caption is for all images, or each has its own. An
        image is resized to about as many pixels as the model paints, or to ``height`` and ``width``, noised to each
        of the ``timesteps`` (0 to 999) by the ``seed``, and predicted there once; ``trace`` is as in painting, of
        these timesteps. ``also`` are words or phrases that the captions need not have, whose maps are computed beside:
        ``pipe.look("photo.jpg", "a cat", also=["dog"])[0].also["dog"]``. ``weights`` and ``clip_skip`` are the model's
        own unless given. ``advance`` is called with each timestep when it is done; what it raises ends the looking.
        Raises :class:`UsageError` for what cannot be looked at, and :class:`DataError` for a file that is no image.
        """
        options = LookOptions.of(self.model, seed=seed, size=(height, width), weights=weights, clip_skip=clip_skip)
        return look_at_images(
            self.model,
            self._engine,
            images,
            captions,
            timesteps=timesteps,
            trace=trace,
            also=also,
            options=options,
            advance=advance,
        )

    def features(
        self,
        images: ImageSource | Sequence[ImageSource],
        captions: Prompts = "",
        *,
        timestep: int = FEATURE_TIMESTEP,
        layers: str | Sequence[str] | None = None,
        noises: int = FEATURE_NOISES,
        seed: int = 0,
        height: int | None = None,
        width: int | None = None,
        weights: PromptSyntax | None = None,
        clip_skip: int | None = None,
    ) -> PatchFeatures:
        """Compute features of images' patches: what layers of the U-Net return for the noised images (DIFT).

        ``correspond(pipe.features(one), (20, 31), pipe.features(another))`` finds the pixel of another image that is
        like a pixel of one. An image is resized as in :meth:`look`, noised to the ``timestep`` (0 to 999), predicted
        with its caption, by default none, and the features are a mean over so many ``noises``. ``layers`` are names or
        patterns among ``unet.layer_names``; without any, the one that corresponds best. Raises :class:`UsageError` for
        what cannot be looked at, and for images of several shapes.
        """
        options = LookOptions.of(self.model, seed=seed, size=(height, width), weights=weights, clip_skip=clip_skip)
        return features_of_images(
            self.model, images, captions, timestep=timestep, layers=layers, noises=noises, options=options
        )

    def erase(
        self,
        words: str | Sequence[str],
        instead: str = "",
        *,
        prompts: Sequence[str] = (),
        preserve: Sequence[str] = (),
        ridge: float = 1e-3,
    ) -> Self:
        """Erase words from what the U-Net hears, in closed form: it reads each as it reads ``instead``; returns self.

        ``pipe.erase("star", "shape", preserve=["a circle", "a ring"])``. The weights of cross-attention's keys and
        values change for good, and are saved with the model; what else breaks, :mod:`gobelin.evaluate.erasure`
        measures. ``prompts`` are texts in which the words occur, beside a few that are there. ``preserve`` are texts to
        be read as before. ``ridge`` above 0 holds the other directions: more of it erases less and breaks less. Raises
        :class:`UsageError` where LoRAs are loaded, whose weights would hide the change.
        """
        if self.loras.weights:
            raise UsageError("LoRAs are loaded: remove them, erase, and load them again")
        erase_words(self.model, [words] if isinstance(words, str) else words, instead, prompts, preserve, ridge)
        self.use(self.engine)  # whose copies of the weights are older
        return self

    def presence(
        self,
        images: ImageSource | Sequence[ImageSource],
        texts: Sequence[str],
        *,
        timesteps: Sequence[int] = PRESENCE_TIMESTEPS,
        noises: int = PRESENCE_NOISES,
        seed: int = 0,
        height: int | None = None,
        width: int | None = None,
        weights: PromptSyntax | None = None,
        clip_skip: int | None = None,
    ) -> list[dict[str, float]]:
        """Score how far each text is in an image: the share of the error of predicting its noise that the text takes
        away, beside no text (Li et al. 2023, Diffusion Classifier, arXiv 2303.16203).

        ``pipe.presence("photo.jpg", ["a dog", "a cat", "a chair"])[0]``: what is there scores higher than what is not,
        and 0 or less says nothing; compare texts of one kind, in one image. An image is resized as in :meth:`look`, and
        noised ``noises`` times to each of the ``timesteps``. Attention is no such score: a word that is not there finds
        its patches too (docs/attribution.md). Raises as :meth:`look` does.
        """
        options = LookOptions.of(self.model, seed=seed, size=(height, width), weights=weights, clip_skip=clip_skip)
        return presence_in_images(
            self.model, self._engine, images, texts, timesteps=timesteps, noises=noises, options=options
        )

    def words(self, prompt: str, weights: PromptSyntax = "a1111") -> Words:
        """Find the words of a prompt, without its weights, and the tokens of each, through all its chunks."""
        validated("the prompt", prompt, str)
        return chunk_prompt(self.tokenizer, prompt, validated("weights", weights, PromptSyntax)).words

    @torch.no_grad()
    def encode_text(self, texts: Prompts, clip_skip: int = 0, weights: PromptSyntax = "a1111") -> TextConditioning:
        """Encode prompts, each distinct one once, as long as the longest of them and masked beyond their own ends."""
        texts = [texts] if isinstance(texts, str) else validated("texts", texts, Annotated[list[str], "texts"])
        validated("weights", weights, PromptSyntax)
        encoded = {
            text: encode_chunks(
                self.text_encoder, self.tokenizer, chunk_prompt(self.tokenizer, text, weights), weights, clip_skip
            ).to(self.unet.dtype)
            for text in dict.fromkeys(texts)
        }
        return batch_texts([encoded[text] for text in texts])

    def latent_size(self, height: int | None = None, width: int | None = None) -> tuple[int, int]:
        """Compute height and width of the latents of an image of ``height`` × ``width`` pixels, None the model's own.

        Raises :class:`UsageError` for a size that cannot be painted.
        """
        return latent_size(self.model, height, width)

    def use(self, engine: EngineName) -> Self:
        """Choose the engine that runs U-Net and VAE's decoder while painting (:mod:`gobelin.engines`); returns self.

        It sees LoRAs that are loaded later, and other devices and precisions. Raises :class:`UsageError` for one that
        there is not, that is not installed, or that cannot run this model.
        """
        self._engine = find_engine(engine)(self.model)
        return self

    @property
    def engine(self) -> EngineName:
        """The name of the engine."""
        return self._engine.name

    def to(
        self, device: str | torch.device | torch.dtype | None = None, dtype: str | torch.dtype | None = None
    ) -> Self:
        """Move the model to a device, a precision or both, and return the pipeline; one argument may be either."""
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        where = self.unet.device if device is None else find_device(device)
        dtype = None if dtype is None else find_dtype(dtype)
        networks: list[nn.Module] = [self.unet, self.vae, self.text_encoder]
        for network in networks:
            network.to(where, dtype)
        self.loras.to(where, dtype)
        try:
            return self.use(self.engine)
        except UsageError as error:  # an engine for other devices
            warnings.warn(f"{error}; until then the engine is eager", stacklevel=2)
            return self.use("eager")

    def save_pretrained(
        self, folder: str | Path, dtype: str | torch.dtype | None = None, fuse_loras: bool = False
    ) -> None:
        """Write a diffusers folder, in ``dtype`` or in the weights' own precision; the index comes last.

        Raises :class:`UsageError` where LoRAs are loaded and ``fuse_loras`` does not say that they become the model's,
        where learned words are, which neither form has a place for, and for weights that were rounded for speed when
        they were opened, unless ``dtype`` is given; nothing is written then.
        """
        self._refuse_additions(fuse_loras)
        save_folder(self.model, Path(folder), self._saved_dtype(dtype))

    def save_single_file(
        self, path: str | Path, dtype: str | torch.dtype | None = None, fuse_loras: bool = False
    ) -> None:
        """Write a ``.safetensors`` file in the original code's layout, which has no place for the tokenizer.

        Raises as :meth:`save_pretrained` does.
        """
        self._refuse_additions(fuse_loras)
        save_single_file(self.model, Path(path), self._saved_dtype(dtype))

    def load_lora(
        self, path: str | Path, weight: float = 1.0, name: str | None = None, allow_pickle: bool = False
    ) -> str:
        """Load a LoRA of kohya's, diffusers', PEFT's or ComfyUI's layout, ``weight`` times as strong as it was trained.

        Returns its name in ``loras``, where its weight can be changed and it can be taken out. Embeddings in it are
        words as long as it is loaded. Raises :class:`ModelError` that names what of the file does not fit this model.
        """
        return self.loras.add(Path(path), weight, name, allow_pickle)

    def load_textual_inversion(self, path: str | Path, token: str | None = None, allow_pickle: bool = False) -> str:
        """Load a textual inversion; returns its word, ``token`` or the file's own, to be used in prompts.

        Without ``token`` the file's name is the word too, unless it is a token. Case does not matter; in ComfyUI's
        meaning ``embedding:`` and the file's name are the word in any case.
        Raises :class:`ModelError` for a file that is none, and :class:`UsageError` for vectors of another width and a
        word that there is already.
        """
        named, vectors = read_textual_inversion(Path(path), allow_pickle)
        word = token or named
        self._learned.add({word: vectors}, Path(path), Path(path).stem)
        if token is None:
            self._learned.add_file_name(word, Path(path).stem)
        self.learned_words.append(word)
        return word

    @property
    def unet(self) -> UNet:
        """The model's U-Net."""
        return self.model.unet

    @property
    def vae(self) -> VAE:
        """The model's VAE."""
        return self.model.vae

    @property
    def text_encoder(self) -> TextEncoder:
        """The model's text encoder."""
        return self.model.text_encoder

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self.model.tokenizer

    @property
    def schedule(self) -> NoiseSchedule:
        """The noise schedule that the model was trained with."""
        return self.model.schedule

    @property
    def recommended(self) -> Settings:
        """The settings that the model recommends."""
        return self.model.recommended

    @property
    def name(self) -> str:
        """The model's name."""
        return self.model.name

    def __repr__(self) -> str:
        side = self.unet.config.sample_size * self.vae.config.factor
        added = [f"loras={self.loras.weights}"] if self.loras.weights else []
        added += [f"learned_words={self.learned_words}"] if self.learned_words else []
        added += [] if self.engine == "eager" else [f"engine={self.engine!r}"]
        parts = [repr(self.name), f"{side}×{side} pixels", f"{self.unet.device}, {self.unet.dtype}", *added]
        return f"Pipeline({', '.join(parts)}, recommended={self.recommended})"

    def _refuse_additions(self, fuse_loras: bool) -> None:
        """Raise :class:`UsageError` for LoRAs that are not to be fused, and for learned words."""
        self.loras.require_fuse(fuse_loras)
        self.tokenizer.refuse_learned()

    def _saved_dtype(self, dtype: str | torch.dtype | None) -> torch.dtype | None:
        """Return the precision to save in, None for the weights' own; raises :class:`UsageError` for rounded ones."""
        if dtype is None and self._is_rounded:
            raise UsageError(
                "the weights were rounded to bfloat16 when the model was opened, as that is the fastest here: open it "
                "with dtype='float32' to save them as they were, or save with dtype='bfloat16'"
            )
        return None if dtype is None else find_dtype(dtype)

    def _start(self, prompt: Prompts, settings: Settings) -> Painting:
        added: dict[str, Any] = {LORAS: dict(self.loras.weights)} if self.loras.weights else {}
        added |= {LEARNED_WORDS: list(self.learned_words)} if self.learned_words else {}
        plan = make_plan(self.model, prompt, settings, added)
        return Painting(model=self.model, plan=plan, engine=self._engine)

    def _start_edit(self, prompt: str, to: str, settings: EditSettings) -> EditPainting:
        return EditPainting(paintings=self._edit_paintings(prompt, to, settings))

    def _edit_paintings(
        self, prompt: str, to: str, settings: EditSettings
    ) -> Generator[tuple[Painting, int], None, Result]:
        """Start an edit's paintings one after the other, each with the number of steps after it; return the result."""
        if settings.count != 1 or isinstance(settings.seed, Sequence) or isinstance(settings.init_image, list | tuple):
            raise UsageError("an edit is of one image: leave out count, and give one seed and one init_image")
        _refuse_unused(settings)
        syntax = settings.weights or self.recommended.weights or "a1111"
        moves = layout_change(self.words(prompt, syntax), self.words(to, syntax))
        settings = settings.filled_for_edit(moves if settings.method == "flowedit" else None)
        assert settings.cross_replace is not None
        assert settings.self_replace is not None
        seed = int(torch.randint(2**31, ()).item()) if settings.seed is None else settings.seed
        controls: list[AnyControl] = [prompt_to_prompt(settings.cross_replace, settings.self_replace)]
        if settings.reweight:
            controls.append(reweight(settings.reweight, rows=[1]))
        if settings.edit_guidance:
            controls.append(EditGuidance(strength=settings.edit_guidance))
        controls += [LocalBlend(words=settings.local_blend), *control_list(settings.control)]
        plain = Settings(**{field.name: settings[field.name] for field in fields(Settings)})
        both = replace(plain, seed=[seed, seed], strength=None, latents=None, control=controls)
        if settings.method == "prompt_to_prompt":
            painting = self._start([prompt, to], both)
            yield painting, 0
            return painting.result
        factor = self.model.vae.config.factor

        def changed(image: Image.Image | None, latents: Latents) -> Settings:
            return replace(
                both,
                init_image=None if settings.mask is None else image,
                height=latents.shape[2] * factor,
                width=latents.shape[3] * factor,
                control=[*controls, FlowEdit(latents=latents, strength=settings.strength or 1.0)],
            )

        first = None
        if settings.init_image is None:
            painting = self._start(prompt, replace(plain, seed=seed, strength=None, mask=None, control=()))
            # What is wrong with the change is said before the first image is painted.
            _, h, w = painting.plan.shape
            blank = changed(Image.new("RGB", (w * factor, h * factor)), torch.zeros(1, *painting.plan.shape))
            plan = make_plan(self.model, [prompt, to], replace(blank, trace=False))
            yield painting, plan.levels.steps
            first = painting.result
            image, latents = first.images[0], first.latents
        else:
            image, latents = self._encoded(settings.init_image, settings)
        painting = self._start([prompt, to], changed(image, latents))
        yield painting, 0
        result = painting.result
        before = first or result
        # An image that was given is shown as it is, and not as the VAE returns it.
        traced = None if result.traced is None else [replace(before.heatmaps[0], image=image), result.heatmaps[1]]
        return Result(
            images=[image, result.images[1]],
            latents=result.latents,
            settings=[before.settings[0], result.settings[1]],
            traced=traced,
        )

    @torch.no_grad()
    def _encoded(self, image: Any, settings: Settings) -> tuple[Any, torch.Tensor]:
        """Open the image that an edit is given, and encode it at the size that is painted."""
        opened = open_image(image, "init_image")
        factor = self.vae.config.factor
        h, w = latent_size(self.model, settings.height, settings.width, opened.size)
        images = InitImage.of([opened], None, (h * factor, w * factor)).images
        latents = self.vae.encode(images.to(self.vae.device, self.vae.dtype)).mean.float()
        return tensor_to_images(images)[0], self.vae.config.scaling_factor * latents


def _refuse_unused(settings: EditSettings) -> None:
    """Raise :class:`UsageError` for a setting that the way of editing has no use for."""
    unused: dict[str, str] = {}
    if settings.method == "prompt_to_prompt":
        unused = dict.fromkeys(
            ("init_image", "mask", "strength", "latents"), "prompt_to_prompt paints both images from the seed's noise"
        )
    elif settings.init_image is not None:
        unused = {"latents": "an edit of an image that is given begins from it"}
    if found := [name for name in unused if settings[name] is not None]:
        raise UsageError(f"{unused[found[0]]}: leave out {' and '.join(found)}")


def find_dtype(name: str | torch.dtype) -> torch.dtype:
    """Find the precision of that name; raises :class:`UsageError` with the choices for any other."""
    found = DTYPES.get(name) if isinstance(name, str) else name
    if found is None or found not in DTYPES.values():
        raise UsageError(f"unknown dtype {str(name)!r}: the choices are {', '.join(DTYPES)}")
    return found


def find_device(name: str | torch.device | None = None) -> torch.device:
    """Find the device of that name; for None and "auto", the first of cuda, mps and cpu that this machine has.

    Raises :class:`UsageError` with the choices for a device that this machine does not have.
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    choices = [kind for kind, available in there.items() if available]
    if name in (None, "auto"):
        return torch.device(choices[0])
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        device = None
    if device is None or device.type not in choices or (device.index or 0) >= max(1, torch.cuda.device_count()):
        raise UsageError(f"unknown device {str(name)!r}: the choices on this machine are {', '.join(choices)}")
    return device
