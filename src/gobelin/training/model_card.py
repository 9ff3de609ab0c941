"""The model card: what a trained folder says of itself."""

from gobelin.clip import TextEncoder
from gobelin.formats.weights import parameter_count
from gobelin.training.config import TrainConfig
from gobelin.unet import UNet
from gobelin.vae import VAE


def model_card(config: TrainConfig, data: str, unet: UNet, vae: VAE, text_encoder: TextEncoder, step: int) -> str:
    """A README for a model folder: data, sizes, training and how to paint with it.

    ``step`` is how many of its steps the U-Net has taken.
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
    return f"""---
library_name: gobelin
pipeline_tag: text-to-image
---

# A model trained from nothing with Gobelin

It paints {unet.config.sample_size * vae.config.factor}×{unet.config.sample_size * vae.config.factor} pictures from
prompts, with a cross-attention U-Net in the manner of Stable Diffusion 1.5. It knows only what was in its data, and
no safety filter is part of it.

Data: {data}.

| part | parameters |
|---|---|
{rows}

| stage | steps | batch | learning rate |
|---|---|---|---|
{steps}

The U-Net predicts the {target}; {config.unet.caption_dropout:.0%} of the captions were left out for guidance.

```python
import gobelin

pipe = gobelin.Pipeline.from_pretrained("path/to/this/folder")
pipe("…").save("out")
```

Recommended: sampler `{recommended.sampler}`, {recommended.steps} steps, guidance {recommended.guidance:g}. The folder
also opens in diffusers' `StableDiffusionPipeline.from_pretrained`.
"""
