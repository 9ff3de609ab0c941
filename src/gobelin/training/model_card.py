"""The model card: the README of a trained model folder."""

from gobelin.clip import TextEncoder
from gobelin.formats.weights import parameter_count
from gobelin.training.config import FineTuneConfig, TrainConfig
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
guidance.

```python
import gobelin

pipe = gobelin.Pipeline.from_pretrained("path/to/this/folder")
pipe("…").save("out")
```

Recommended: sampler `{recommended.sampler}`, {recommended.steps} steps, guidance {recommended.guidance:g}. The folder
also opens in diffusers' `StableDiffusionPipeline.from_pretrained`.
"""


def fine_tune_card(config: FineTuneConfig, model: str, data_description: str, step: int, steps: int) -> str:
    """Write the card of a model that was trained from a ``model``: from what, on what, and for how long."""
    what = {"vae": "Its VAE was trained alone", "inpainting": "Its U-Net was trained to inpaint"}
    how = what.get(config.method, "Its U-Net was trained" + (" with its text encoder" * config.unet.train_text_encoder))
    taken = f"{step:,} steps" if step == steps else f"{step:,} of {steps:,} steps: it is still training"
    optim = config.vae.optim if config.method == "vae" else config.unet.optim
    return f"""---
library_name: gobelin
pipeline_tag: text-to-image
---

# A model trained from {model} with Gobelin

{how}, {taken}, {optim.batch_size} images each, at a learning rate of {optim.learning_rate:g}.
{_prior_sentence(config)}
Data: {data_description}.

```python
import gobelin

pipe = gobelin.Pipeline.from_pretrained("path/to/this/folder")
pipe("…").save("out")
```
"""


def adapter_card(config: FineTuneConfig, model: str, file: str, data_description: str, step: int) -> str:
    """Write the card of an adapter or a new word: for which ``model`` its ``file`` is, and how it is loaded."""
    is_word = config.method == "textual_inversion"
    loading = f'pipe.load_textual_inversion("{file}")' if is_word else f'pipe.load_lora("{file}")'
    prompt = config.new_word.word if is_word else "…"
    what = f"new word {config.new_word.word}" if is_word else f"{config.adapter.kind} of rank {config.adapter.rank}"
    steps, optim = config.unet.optim.steps, config.unet.optim
    taken = f"{step:,} steps" if step == steps else f"{step:,} of {steps:,} steps: it is still training"
    return f"""---
library_name: gobelin
pipeline_tag: text-to-image
---

# A {what} for {model}, trained with Gobelin

`{file}` was trained for {taken}, {optim.batch_size} images each, at a learning rate of {optim.learning_rate:g}.
{_prior_sentence(config)}
Data: {data_description}.

```python
import gobelin

pipe = gobelin.Pipeline.from_pretrained({"" if config.model is None else '"the model"'})
{loading}
pipe("{prompt}").save("out")
```
"""


def _prior_sentence(config: FineTuneConfig) -> str:
    """Say with which prior it was trained, if any."""
    prior = config.prior
    return (
        f"Beside them it learned {prior.count} images of “{prior.prompt}” by the model itself." if prior.prompt else ""
    )
