"""The model card: the README of a trained model folder."""

import json
import shlex
from pathlib import Path

from gobelin.clip import TextEncoder
from gobelin.formats.weights import parameter_count
from gobelin.training.config import OptimConfig, TrainConfig
from gobelin.training.fine_tune_config import FineTuneConfig
from gobelin.unet import UNet
from gobelin.vae import VAE


def model_card(
    config: TrainConfig, data_description: str, unet: UNet, vae: VAE, text_encoder: TextEncoder, step: int
) -> str:
    """Write a model card in Markdown: data, parameter counts, training, and how to generate with the model.

    ``step`` is the number of steps that the U-Net has been trained for.
    """
    sizes = {"U-Net": unet, "VAE": vae, "text encoder": text_encoder}
    rows = "\n".join(f"| {name} | {parameter_count(module):,} |" for name, module in sizes.items())
    stages = {"text encoder": config.text.optim, "VAE": config.vae.optim, "U-Net": config.unet.optim}
    taken = {name: f"{optim.steps:,}" for name, optim in stages.items()}
    if step < config.unet.optim.steps:
        taken["U-Net"] = f"{step:,} of {config.unet.optim.steps:,}: it is still training"
    steps = "\n".join(
        f"| {name} | {taken[name]} | {optim.batch_size} | {optim.learning_rate:g} |" for name, optim in stages.items()
    )
    recommended = config.recommended
    target = "velocity" if config.unet.prediction == "v_prediction" else "noise"
    size = unet.config.sample_size * vae.config.factor
    first = config.unet.half_size_steps
    halved = f" Its first {first:,} steps were on images of half the size." if first else ""
    return f"""---
library_name: gobelin
pipeline_tag: text-to-image
---

# A model trained from scratch with Gobelin

It generates {size}×{size} images from prompts, with a cross-attention U-Net of the Stable Diffusion 1.5 design.
It knows only what was in its data, and has no safety filter.

Data: {data_description}.

| part | parameters |
|---|---|
{rows}

| stage | steps | batch | learning rate |
|---|---|---|---|
{steps}

The U-Net predicts the {target}; {config.unet.caption_dropout:.0%} of the captions were dropped, for classifier-free
guidance.{halved}

```python
import gobelin

pipe = gobelin.Pipeline.from_pretrained("path/to/this/folder")
pipe("…").save("out")
```

Recommended: sampler `{recommended.sampler}`, {recommended.steps} steps, guidance {recommended.guidance:g}. The folder
also opens in diffusers' `StableDiffusionPipeline.from_pretrained`.
"""


def fine_tune_card(config: FineTuneConfig, data_description: str, step: int, steps: int, inpaints: bool) -> str:
    """Write the card of a model that was trained from another: from which, on what, and for how long."""
    what = {"vae": "Its VAE's decoder was trained", "inpainting": "Its U-Net was trained to inpaint"}
    how = what.get(config.method, "Its U-Net was trained" + (" with its text encoder" * config.unet.train_text_encoder))
    optim = config.vae.optim if config.method == "vae" else config.unet.optim
    return f"""---
library_name: gobelin
pipeline_tag: text-to-image
---

# A model trained from {_base_name(config)} with Gobelin

{how}: {_taken(step, steps)}, {_batch(optim)}.
{_prior_sentence(config)}
Data: {data_description}.

```python
import gobelin

pipe = gobelin.Pipeline.from_pretrained("{_HERE}")
{_PAINTED[inpaints]}
```

```sh
gobelin generate "…" --model {_HERE}{" --init-image image.png --mask mask.png" * (inpaints)}
```

The folder also opens in diffusers' `{
        "StableDiffusionInpaintPipeline" if inpaints else "StableDiffusionPipeline"
    }.from_pretrained`.
"""


def adapter_card(config: FineTuneConfig, file: str, data_description: str, step: int) -> str:
    """Write the card of an adapter or a new word: for which model its ``file`` is, and how it is loaded."""
    is_word = config.method == "textual_inversion"
    option, method = ("inversion", "load_textual_inversion") if is_word else ("lora", "load_lora")
    prompt = f"a photo of {config.new_word.word}" if is_word else "…"
    what = f"new word {config.new_word.word}" if is_word else f"{config.adapter.kind} of rank {config.adapter.rank}"
    base = "" if config.model is None else json.dumps(str(config.model), ensure_ascii=False)
    model = "" if config.model is None else f" --model {shlex.quote(str(config.model))}"
    return f"""---
library_name: gobelin
pipeline_tag: text-to-image
---

# A {what} for {_base_name(config)}, trained with Gobelin

`{file}` was trained for {_taken(step, config.unet.optim.steps)}, {_batch(config.unet.optim)}.
{_prior_sentence(config)}
Data: {data_description}.

```python
import gobelin

pipe = gobelin.Pipeline.from_pretrained({base})
pipe.{method}("{_HERE}/{file}")
pipe("{prompt}").save("out")
```

```sh
gobelin generate "{prompt}"{model} --{option} {_HERE}/{file}
```
"""


_HERE = "path/to/this/folder"
_PAINTED = {False: 'pipe("…").save("out")', True: 'pipe("…", init_image="image.png", mask="mask.png").save("out")'}


def _base_name(config: FineTuneConfig) -> str:
    """Name the model that was started from."""
    return "the model that ships with Gobelin" if config.model is None else Path(config.model).name


def _taken(step: int, steps: int) -> str:
    """Say how long it was trained."""
    return f"{step:,} steps" if step == steps else f"{step:,} of {steps:,} steps, and is still training"


def _batch(optim: OptimConfig) -> str:
    return f"{optim.batch_size} image{'s' * (optim.batch_size > 1)} each, at a learning rate of {optim.learning_rate:g}"


def _prior_sentence(config: FineTuneConfig) -> str:
    """Say with which prior it was trained, if any."""
    prior = config.prior
    if prior.path is not None:
        return f"Beside them it learned the images of {Path(prior.path).resolve().name}, to keep what it knew."
    if not prior.prompts:
        return ""
    first, *others = prior.prompts
    more = f" and {len(others)} more" if others else ""
    return f"Beside them it learned {prior.count} images of “{first}”{more} by the model itself."
