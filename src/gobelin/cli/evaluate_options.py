"""Options of the measurements of ``gobelin evaluate``."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gobelin.cli.options import Positional
from gobelin.cli.painting_options import PipelineOptions
from gobelin.cli.report_files import ReportFiles
from gobelin.engine_names import EngineName
from gobelin.evaluate.image_list import ALL_TASKS
from gobelin.evaluate.word_changes import WORD_KINDS, WordKind


@dataclass(frozen=True, kw_only=True)
class BenchmarkFiles(ReportFiles):
    """Files that a benchmark can write: its report, and a contact sheet of the scored images."""

    sheet: Path | None = None
    """Write a contact sheet here, PNG or JPEG: a sample of each task, then failures, framed in red."""


@dataclass(frozen=True, kw_only=True)
class MeasuredModel:
    """The model that is measured."""

    model: Positional[Path | None] = None
    """A diffusers folder; without one, the model that comes with Gobelin."""
    world: str | None = None
    """The world of scenes that the model was trained on: core, nano or rich; without it, the one that its folder
    names."""
    device: str | None = None
    """cpu, cuda or mps; without it, or with auto, the best there is."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """The precision to compute in; without it, the fastest for the device: bfloat16 for large models where it
    multiplies that faster, float32 otherwise."""
    engine: EngineName = "eager"
    """Engine that runs the networks."""


@dataclass(frozen=True, kw_only=True)
class PromptListOptions:
    """The list of prompts and images."""

    tasks: tuple[str, ...] = ALL_TASKS
    """GenEval's six, and beside them, in no mean: five, one object more than training shows, and tasks that only
    some worlds have."""
    splits: tuple[str, ...] = ("dev", "heldout")
    """dev: held-in combinations, the list for every choice; heldout: combinations that training never saw; test:
    held-in, other prompts and other wordings, for the final table only."""
    limit: int = 100
    """The number of prompts for each task and split."""
    count: int = 4
    """The number of images for each prompt."""
    seed: int = 0
    """Another seed, other images of the same prompts."""


@dataclass(frozen=True, kw_only=True)
class EvaluateScenes(BenchmarkFiles, PromptListOptions, MeasuredModel):
    """Generate images from fixed lists of prompts, and score each without a look at its prompt.

    The tasks are GenEval's six, and the exact scene. Shares come with 95 % intervals, which know that images of one
    prompt are alike. The same images scored for other prompts show the level of chance.

    Some examples:
      gobelin evaluate scenes
      gobelin evaluate scenes runs/mine --limit 25 --json scores.json --report scores.md --sheet sheet.png
      gobelin evaluate scenes runs/mine --splits test heldout --json final.json
      gobelin evaluate scenes --tasks colours position --steps 10 --dtype bfloat16
    """

    sampler: str | None = None
    """The sampler; without it, the model's recommendation, as for the next two."""
    steps: int | None = None
    """The number of denoising steps."""
    guidance: float | None = None
    """The strength of classifier-free guidance; 1 is none."""


@dataclass(frozen=True, kw_only=True)
class EvaluateImages(BenchmarkFiles):
    """Score a folder of images that another program generated from the list of gobelin evaluate prompts.

    Some examples:
      gobelin evaluate prompts --world core --out elsewhere
      gobelin evaluate images elsewhere --json scores.json --sheet sheet.png
    """

    folder: Positional[Path]
    """Images, and metadata.jsonl with the file_name and the text of each."""
    world: str | None = None
    """The world of the prompts: core, nano or rich; without it, the one that the list names."""


@dataclass(frozen=True, kw_only=True)
class EvaluatePrompts(PromptListOptions):
    """Write the list of images to generate as metadata.jsonl (file_name, text, seed), for any program.

    Some examples:
      gobelin evaluate prompts --out elsewhere
      gobelin evaluate prompts --world nano --out elsewhere --limit 25 --count 1
    """

    out: Path
    """The folder to write to; it must be empty or new."""
    world: str = "core"
    """The world of the prompts: core, nano or rich."""


@dataclass(frozen=True, kw_only=True)
class EvaluateAttribution(ReportFiles, MeasuredModel):
    """Compare the heat map of each word with the objects that it speaks of, in the model's images and in true ones.

    Some examples:
      gobelin evaluate attribution
      gobelin evaluate attribution runs/mine --limit 25 --json attribution.json --report attribution.md
    """

    limit: int = 100
    """The number of captions, 2 or more."""


@dataclass(frozen=True, kw_only=True)
class EvaluateEditing(ReportFiles, MeasuredModel):
    """Change one word of captions, and measure whether what it is about changes and nothing else.

    Some examples:
      gobelin evaluate editing --limit 50
      gobelin evaluate editing runs/mine --kinds colour --limit 25 --json editing.json --report editing.md
    """

    kinds: tuple[WordKind, ...] = WORD_KINDS
    """The kinds of words that change."""
    limit: int = 100
    """The number of edits of each kind, 2 or more; fewer are made where the model gets few captions right."""


@dataclass(frozen=True, kw_only=True)
class EvaluatePatching(ReportFiles, MeasuredModel):
    """Paint captions with some attention given another caption's text, and measure what of the image follows.

    Captions differ in one word, a colour, a shape, a number or a relation, and are painted from the same noise. Each
    site of cross-attention is patched alone, and all but it (activation patching).

    Some examples:
      gobelin evaluate patching --limit 30
      gobelin evaluate patching runs/mine --kinds colour --json patching.json --report patching.md
    """

    kinds: tuple[WordKind, ...] = WORD_KINDS
    """The kinds of words that differ."""
    limit: int = 30
    """The number of pairs of captions of each kind, 2 or more; fewer where the model gets few of them right."""


@dataclass(frozen=True, kw_only=True)
class EvaluateErasure(ReportFiles, MeasuredModel):
    """Erase a colour or a shape from a copy of a model, and measure whether it is gone and what else broke.

    Some examples:
      gobelin evaluate erasure --word star --instead circle
      gobelin evaluate erasure runs/mine --word red --instead "" --limit 20 --json erasure.json
    """

    word: str
    """What is erased: a shape or a colour of the world."""
    instead: str = ""
    """What it is read as; without it, as nothing."""
    ridge: float = 1e-3
    """How strongly the weights are held, above 0: more of it erases less and breaks less."""
    limit: int = 50
    """The number of prompts of each task, 2 or more."""


@dataclass(frozen=True, kw_only=True)
class EvaluateCorrespondence(ReportFiles, MeasuredModel):
    """Find points of objects again in scenes where these have moved or changed colours, by the U-Net's features.

    Beside raw pixels, the VAE's latents and chance. Without a layer and a timestep, those that are the defaults of
    Pipeline.features.

    Some examples:
      gobelin evaluate correspondence --limit 32
      gobelin evaluate correspondence --layers up_blocks.1.attentions.1 --timestep 261 --json correspondence.json
    """

    limit: int = 100
    """The number of scenes, 2 or more; each is changed in three ways."""
    layers: tuple[str, ...] = ()
    """Layers of the U-Net, names or patterns."""
    timestep: int | None = None
    """Timestep, 0 to 999, to which images are noised."""
    split: Literal["dev", "test"] = "test"
    """dev: the scenes for every choice; test: others, for the final table only."""


@dataclass(frozen=True, kw_only=True)
class EvaluateHeads(ReportFiles, MeasuredModel):
    """Fit weights of heads of attention to scenes whose masks are exact, and measure the sharp maps that they make.

    With --save they are kept in the model's folder, and maps are made by them from then on. Without, nothing changes.

    Some examples:
      gobelin evaluate heads runs/mine
      gobelin evaluate heads runs/mine --save
    """

    scenes: int = 320
    """The number of scenes that weights are fitted to, 2 or more."""
    limit: int = 96
    """The number of other scenes that maps are measured on, 2 or more."""
    save: bool = False
    """Keep the weights in the model's folder, as head_weights.json."""


@dataclass(frozen=True, kw_only=True)
class EvaluatePresence(ReportFiles, MeasuredModel):
    """Measure how well scores tell words for what is in an image from words for what is not, in true scenes.

    Attention, and the error of denoising, with the area under the ROC curve.

    Some examples:
      gobelin evaluate presence --limit 64
      gobelin evaluate presence runs/mine --split dev --json presence.json --report presence.md
    """

    limit: int = 100
    """The number of scenes, 2 or more."""
    split: Literal["dev", "test"] = "test"
    """dev: the scenes for every choice; test: others, for the final table only."""


@dataclass(frozen=True, kw_only=True)
class EvaluateFidelity(ReportFiles, PipelineOptions):
    """Compare images painted from a folder's captions with its true images: FID, KID, and a CLIP score.

    One half of the folder gives captions to paint, and the other is what they are compared with; the true images of
    these captions are compared too, and say how near a perfect painter comes. The folder should hold images that the
    model was not trained on, as copies of training images would be perfect.

    Needs pip install 'gobelin[fidelity]'.

    Some examples:
      gobelin evaluate fidelity my-images --model runs/mine --features model --count 500
      gobelin evaluate fidelity my-images --model runs/mine --clip clip-vit-large-patch14 --out painted
      gobelin evaluate fidelity my-images --painted painted --features weights.pth --json fidelity.json
    """

    folder: Positional[Path]
    """True images with captions, as for training: a folder, or tars; beside --painted a folder needs no captions."""
    painted: Path | None = None
    """A folder of images that are painted already, by any program; with captions, if there is to be a CLIP score."""
    count: int | None = None
    """The number of images of each side, chosen at random; without it, half of the folder's, up to 5,000, or as many
    as --painted has."""
    seed: int = 0
    """Another seed: other images are chosen, and painted from other noise."""
    features: str = "inception"
    """What images are compared by: inception, whose weights are downloaded at first use; model, the image encoder of a
    model that was trained from scratch; or a path: Inception's weights, a model folder, or a CLIP's of transformers."""
    clip: str | None = None
    """What compares images with captions: model, none, or the path of a model or CLIP folder; without it, the features
    where they are of captions too, or else the model's own."""
    caption_column: str | None = None
    """The column of the metadata, or the key of the JSON, with the true images' captions; without it, text, caption or
    prompt, as beside --painted."""
    sampler: str | None = None
    """The sampler; without it, the model's recommendation, as for the next two."""
    steps: int | None = None
    """The number of denoising steps."""
    guidance: float | None = None
    """The strength of classifier-free guidance; 1 is none."""
    out: Path | None = None
    """Keep the painted images here, with their captions, so that --painted can compare them again."""


@dataclass(frozen=True, kw_only=True)
class EvaluateEmoji(ReportFiles, PipelineOptions):
    """Paint captions of emoji, held in and held out, and measure whether concept and style are right.

    The judge, a classifier and an encoder, learns from true pictures alone; it is trained at first use, in minutes,
    and kept in the folder. Beside its verdicts stand its own on true pictures, and those for captions dealt out anew.

    Some examples:
      gobelin evaluate emoji emoji-set --model runs/emoji
      gobelin evaluate emoji emoji-set --model runs/emoji --limit 200 --sheet sheet.png --json emoji.json
    """

    folder: Positional[Path]
    """The folder that gobelin data emoji wrote."""
    limit: int = 1000
    """The number of captions of each split, at most."""
    seed: int = 0
    """Another seed: other captions are chosen, and painted from other noise."""
    sampler: str | None = None
    """The sampler; without it, the model's recommendation, as for the next two."""
    steps: int | None = None
    """The number of denoising steps."""
    guidance: float | None = None
    """The strength of classifier-free guidance; 1 is none."""
    sheet: Path | None = None
    """Write a contact sheet here, PNG or JPEG: up to a hundred images of each split, wrong ones framed in red."""
