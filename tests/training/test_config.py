"""Configurations: every number that cannot be trained with is refused when it is made, in one sentence."""

import dataclasses

import pytest

from gobelin.errors import UsageError
from gobelin.training import find_preset

NAN = float("nan")


def changed(config, path, value):
    """The configuration with the field of a dotted path replaced."""
    name, _, rest = path.partition(".")
    return dataclasses.replace(config, **{name: changed(getattr(config, name), rest, value) if rest else value})


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("vae.optim.learning_rate", -1, "learning_rate is -1: give a number above 0"),
        ("vae.optim.learning_rate", 0.0, "learning_rate is 0.0: give a number above 0"),
        ("vae.optim.learning_rate", NAN, "learning_rate is nan: give a number above 0"),
        ("vae.optim.learning_rate", "fast", "learning_rate is 'fast': give a number above 0"),
        ("unet.optim.betas", (0.9, 1.0), "betas is (0.9, 1.0): give two fractions from 0 to less than 1"),
        ("unet.optim.betas", (-0.1, 0.9), "betas is (-0.1, 0.9): give two fractions from 0 to less than 1"),
        ("unet.optim.betas", (0.9,), "betas is (0.9,): give two fractions"),
        ("unet.optim.betas", 0.9, "betas is 0.9: give two fractions"),
        ("unet.optim.steps", 0, "steps is 0: give a whole number of 1 or more"),
        ("unet.optim.batch_size", 0, "batch_size is 0: give a whole number of 1 or more"),
        ("text.optim.batch_size", 1, "text.optim.batch_size is 1: give 2 or more"),
        ("unet.optim.warmup_steps", -1, "warmup_steps is -1: give a whole number of 0 or more"),
        ("unet.optim.hold", 1, "hold is 1: give a fraction from 0 to less than 1"),
        ("unet.optim.ema", 1.0, "ema is 1.0: give a fraction from 0 to less than 1"),
        ("unet.optim.clip_norm", 0, "clip_norm is 0: give a number above 0"),
        ("unet.optim.weight_decay", -0.1, "weight_decay is -0.1: give a number of 0 or more"),
        ("unet.optim.final_lr_ratio", 2, "final_lr_ratio is 2: give a fraction from 0 to 1"),
        ("unet.optim.precision", "float16", "precision is 'float16': give one of 'auto', 'float32', 'bfloat16'"),
        ("unet.caption_dropout", 1.1, "caption_dropout is 1.1: give a fraction from 0 to 1"),
        ("unet.caption_dropout", -0.1, "caption_dropout is -0.1: give a fraction from 0 to 1"),
        ("unet.timestep_shift", 0, "timestep_shift is 0: give a number above 0"),
        ("unet.text_lr_ratio", -1, "text_lr_ratio is -1: give a number of 0 or more"),
        ("unet.preset", "huge", "preset is 'huge': give one of 'nano'"),
        ("unet.prediction", "epsilon", "zero_terminal_snr needs prediction v_prediction"),
        ("vae.kl", -1.0, "kl is -1.0: give a number of 0 or more"),
        ("text.heads", 5, "width is 96: give a multiple of heads, 5"),
        ("text.layers", 0, "layers is 0: give a whole number of 1 or more"),
        ("text.sketch", float("inf"), "sketch is inf: give a number of 0 or more"),
        ("tokenizer.vocab_size", 513, "vocab_size is 513: give 514 (bytes and markers) or more"),
        ("tokenizer.max_length", 2, "max_length is 2: give 3 (BOS, a token, EOS) or more"),
        ("data.size", 40, "size is 40: give a multiple of 16"),
        ("data.size", 0, "size is 0: give a whole number of 1 or more"),
        ("data.count", 0, "count is 0: give a whole number of 1 or more"),
        ("data.path", 3, "path is 3: give the name of a folder"),
        ("sample_every", 0, "sample_every is 0: give a whole number of 1 or more"),
        ("save_every", 0, "save_every is 0: give a whole number of 1 or more"),
        ("seed", -1, "seed is -1: give a whole number of 0 or more"),
        ("recommended.sampler", "magic", "unknown sampler 'magic'"),
        ("recommended.steps", 0, "steps is 0: give a whole number from 1 to 1000"),
        ("recommended.guidance", NAN, "guidance is nan: give a number"),
        ("recommended.guidance_rescale", 2.0, "guidance_rescale is 2.0: give a fraction from 0 to 1"),
    ],
)
def test_values_that_cannot_be_trained_with_are_refused_at_once(path, value, message):
    with pytest.raises(UsageError) as caught:
        changed(find_preset("nano"), path, value)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("unet.caption_dropout", 0.0),
        ("unet.caption_dropout", 1.0),
        ("unet.optim.betas", (0.0, 0.0)),
        ("unet.optim.warmup_steps", 0),
        ("unet.optim.batch_size", 1),
        ("text.optim.batch_size", 2),
        ("tokenizer.vocab_size", 514),
        ("recommended.guidance", 1),
    ],
)
def test_values_at_the_ends_of_their_ranges_are_taken(path, value):
    assert dataclasses.asdict(changed(find_preset("nano"), path, value))


def test_an_unknown_preset_is_told_the_choices():
    with pytest.raises(UsageError, match="unknown preset 'huge': the choices are nano"):
        find_preset("huge")
