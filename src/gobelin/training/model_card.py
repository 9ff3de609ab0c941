"""The model card: the README of a trained model folder."""

from gobelin.clip import TextEncoder
from gobelin.formats.weights import parameter_count
from gobelin.training.config import TrainConfig
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
