"""Caption validation against U-Nets of which it is known how they use the text, and the sentence for every case."""

import dataclasses
import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gobelin.errors import DataError, TrainingError, UsageError
from gobelin.schedule import NoiseSchedule, ScheduleConfig
from gobelin.training.caption_validation import (
    CaptionLosses,
    caption_gain,
    caption_losses,
    percent,
    wrong_captions,
)
from gobelin.training.caption_verdict import describe_caption_losses

CPU = torch.device("cpu")
SCHEDULES = {
    "epsilon": NoiseSchedule(),
    "v_prediction": NoiseSchedule(ScheduleConfig.zero_terminal_snr()),
}


class ToyUNet:
    """Predict as one who believes that the clean latents are ``belief(text)``; a caption here spells its latents."""

    def __init__(self, schedule, belief):
        self.schedule, self.belief = schedule, belief
        self.seen = []

    def __call__(self, noisy_latents, timesteps, text_embeddings):
        self.seen.append((noisy_latents.clone(), timesteps.clone()))
        latents = self.belief(text_embeddings).reshape(noisy_latents.shape)
        alphas = self.schedule.alphas_cumprod[timesteps][:, None, None, None]
        noise = (noisy_latents - alphas.sqrt() * latents) / (1 - alphas).sqrt()
        return self.schedule.target(latents, noise, timesteps)


def measured(belief, schedule=SCHEDULES["epsilon"], count=64, swapped=False, latents_seed=0, **options):
    """Losses of a toy, over latents and captions that are unit noise; the wrong caption is the next image's."""
    latents = torch.randn(count, 4, 3, 3, generator=torch.Generator().manual_seed(latents_seed))
    right = latents.reshape(count, 1, -1)
    wrong, empty = right.roll(1, dims=0), torch.zeros_like(right)
    if swapped:
        right, wrong = wrong, right
    unet = ToyUNet(schedule, belief)
    options = {"seed": 3, "device": CPU, "batch_size": 10, **options}
    return caption_losses(unet, schedule, latents, right, wrong, empty, **options), unet


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("hears", [0.3, 0.6, 1.0])
def test_gains_are_those_of_a_unet_that_hears_so_much(schedule, hears):
    losses, _ = measured(lambda text: hears * text, schedule, count=512)
    remaining = (1 - hears) ** 2  # of a variance of 1, where a wrong caption adds another's
    for against, expected in (("empty", 1 - remaining), ("wrong", 1 - remaining / (1 + hears**2))):
        for gain in caption_gain(losses, against):
            assert gain.value == pytest.approx(expected, abs=0.04)
            assert gain.low - 0.02 <= expected <= gain.high + 0.02


def test_losses_are_those_of_the_formula():
    losses, unet = measured(torch.zeros_like)
    latents = torch.randn(64, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    timesteps = torch.cat([times for _, times in unet.seen]).reshape(4, 3, 64)[:, 0]
    alphas = SCHEDULES["epsilon"].alphas_cumprod[
        timesteps
    ]  # z_t = √ᾱ z_0 + √(1 − ᾱ) ε, so ε is off by √(ᾱ / (1 − ᾱ)) z_0
    expected = (alphas / (1 - alphas) * latents.square().mean(dim=(1, 2, 3))).mean(dim=1)
    assert losses.right == losses.wrong == losses.empty == pytest.approx(expected.tolist(), rel=1e-4)


def test_a_unet_that_ignores_the_text_gains_nothing():
    losses, _ = measured(lambda text: torch.full_like(text, 0.2))
    for against in ("empty", "wrong"):
        assert [(gain.value, gain.low, gain.high) for gain in caption_gain(losses, against)] == [(0.0, 0.0, 0.0)] * 4


def test_a_unet_that_only_wants_some_text_gains_on_none_but_not_on_a_wrong_one():
    losses, _ = measured(lambda text: torch.where(text.any(dim=2, keepdim=True), 0.0, 2.0).expand(text.shape))
    assert min(gain.low for gain in caption_gain(losses, "empty")) > 0.5
    assert [gain.value for gain in caption_gain(losses, "wrong")] == [0.0] * 4


def test_a_unet_that_memorised_gains_on_what_it_knows():
    known = torch.randn(64, 36, generator=torch.Generator().manual_seed(0))

    def recall(text):
        return torch.where((text[:, 0, None] == known).all(dim=2).any(dim=1)[:, None, None], text, 0.0)

    training, _ = measured(recall)
    held_out, _ = measured(recall, latents_seed=1)
    assert min(gain.value for gain in caption_gain(training, "empty")) > 0.99
    assert max(abs(gain.value) for gain in caption_gain(held_out, "empty")) == 0


def test_exchanging_right_and_wrong_turns_the_gain_into_a_loss():
    losses, _ = measured(lambda text: 0.5 * text)
    swapped, _ = measured(lambda text: 0.5 * text, swapped=True)
    assert (losses.right, losses.wrong, losses.empty) == (swapped.wrong, swapped.right, swapped.empty)
    assert all(gain.low > 0 for gain in caption_gain(losses, "wrong"))
    assert all(gain.high < 0 for gain in caption_gain(swapped, "wrong") + caption_gain(swapped, "empty"))


def test_noise_and_timesteps_are_the_same_for_each_caption_and_in_every_call():
    count, batches = 25, 3
    losses, unet = measured(torch.zeros_like, count=count)
    again, other = measured(torch.zeros_like, count=count, batch_size=25)
    assert losses.right == pytest.approx(again.right)
    assert measured(torch.zeros_like, count=count, seed=4)[0].right != losses.right
    noisy = torch.cat([latents for latents, _ in unet.seen]).reshape(4, 3, count, -1)
    assert torch.equal(noisy[:, 0], noisy[:, 1])
    assert torch.equal(noisy[:, 0], noisy[:, 2])
    assert torch.equal(noisy.flatten(), torch.cat([latents for latents, _ in other.seen]).flatten())
    assert len(unet.seen) == 4 * 3 * batches


@given(count=st.integers(2, 40), bins=st.integers(1, 7))
def test_each_image_is_seen_once_in_every_bin_and_timesteps_are_spread_evenly(count, bins):
    losses, unet = measured(torch.zeros_like, count=count, bins=bins)
    timesteps = torch.cat([times for _, times in unet.seen]).reshape(bins, 3, count)[:, 0].sort().values
    assert losses.count == count
    assert [losses.bins[0][0], losses.bins[-1][1]] == [0, 999]
    assert all(after[0] == before[1] + 1 for before, after in zip(losses.bins, losses.bins[1:], strict=False))
    for (first, last), times in zip(losses.bins, timesteps, strict=True):
        width = last + 1 - first
        parts = ((times - first + 0.999) * count / width).long().clamp(max=count - 1)
        assert times.min() >= first
        assert times.max() <= last
        assert (parts - torch.arange(count)).abs().max() <= 1, "one timestep from each of `count` equal parts"


def test_more_pairs_narrow_the_interval():
    few, many = (measured(lambda text: 0.5 * text, count=count)[0] for count in (32, 512))
    for against in ("empty", "wrong"):
        # Not near no noise, where the toy's loss goes to infinity and a few timesteps are all that counts.
        for wide, narrow in list(zip(caption_gain(few, against), caption_gain(many, against), strict=True))[1:]:
            assert wide.margin / narrow.margin == pytest.approx(4, rel=0.4)


def test_the_interval_holds_what_it_promises():
    held = 0
    for trial in range(200):
        losses, _ = measured(lambda text: 0.3 * text + 0.5, count=24, latents_seed=trial, seed=trial)
        truth = 1 - (0.7**2 + 0.5**2) / (1 + 0.5**2)  # the constant is believed of the empty caption too
        gain = caption_gain(losses, "empty")[-1]
        held += gain.low <= truth <= gain.high
    assert 180 <= held <= 199


def test_records_go_through_json():
    losses, _ = measured(lambda text: 0.5 * text)
    record = json.loads(json.dumps({"step": 4, "split": "held_out", **losses.as_record()}, allow_nan=False))
    assert CaptionLosses.from_record(record) == losses
    diverged = dataclasses.replace(losses, right=(math.nan, math.inf, 1.0, 1.0))
    assert diverged.as_record()["right"] == [None, None, 1.0, 1.0]
    assert not CaptionLosses.from_record(diverged.as_record()).finite


@pytest.mark.parametrize(
    "damage",
    [{"right": [1.0]}, {"right": None}, {"bins": [[0]] * 4}, {"bins": []}, {"count": "many"}, {"wrong": ["<b>"] * 4}],
)
def test_damaged_records_are_refused_in_a_sentence(damage):
    losses, _ = measured(torch.zeros_like)
    with pytest.raises(TrainingError, match=r"a record of caption losses has .*: expected .*leave that line out"):
        CaptionLosses.from_record({**losses.as_record(), **damage})


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(DataError, match="1 captioned images to validate on: give 2 or more"):
        measured(torch.zeros_like, count=1)
    with pytest.raises(UsageError, match="bins is 0: give 1 to 1000"):
        measured(torch.zeros_like, bins=0)


@given(captions=st.lists(st.sampled_from(["a", "A ", "b", "c  d", "c d", "e"]), max_size=30), seed=st.integers(0, 5))
def test_a_wrong_caption_is_another_text_and_nobody_is_wrong_twice(captions, seed):
    texts = [" ".join(caption.lower().split()) for caption in captions]
    most = max(map(texts.count, texts), default=0)
    if most == len(captions):
        with pytest.raises(DataError, match="no two differ"):
            wrong_captions(captions, seed)
        return
    pairs = wrong_captions(captions, seed)
    assert pairs == wrong_captions(captions, seed)
    assert all(texts[image] != texts[other] for image, other in pairs)
    assert len({image for image, _ in pairs}) == len({other for _, other in pairs}) == len(pairs)
    assert len(pairs) == min(len(captions), 2 * (len(captions) - most)), "as many as there is room for"


def test_neighbours_in_the_alphabet_do_not_meet():
    pairs = wrong_captions([f"caption {number:03}" for number in range(100)])
    assert sum(abs(image - other) == 1 for image, other in pairs) < 10


@pytest.mark.parametrize(
    ("share", "written"), [(0.18, "18 %"), (0.014, "1.4 %"), (-0.002, "−0.2 %"), (0.0996, "10 %"), (1.0, "100 %")]
)
def test_percent(share, written):
    assert percent(share) == written


def record(step, empty=0.0, wrong=0.0, right=1.0, error=0.01, count=200):
    """A made-up record: gains on none and on a wrong caption, in the last of four bins; the others have none."""
    others = {"empty": [right] * 3 + [right / (1 - empty)], "wrong": [right] * 3 + [right / (1 - wrong)]}
    errors = {f"{name}_gain_error": [error] * 4 for name in others}
    bins = [[0, 249], [250, 499], [500, 749], [750, 999]]
    return {"step": step, "bins": bins, "count": count, "right": [right] * 4, **others, **errors}


NOTHING = record(1000)
HEARD = [NOTHING, record(2000, 0.3, 0.3), NOTHING | {"step": 3000}, record(4000, 0.09, 0.1), record(5000, 0.11, 0.12)]
RISING = [record(1000, 0.1, 0.1, right=0.9), record(2000, 0.08, 0.08, right=0.95)]


@pytest.mark.parametrize(
    ("held_out", "training", "sentence"),
    [
        ([], [], "Whether the caption is heard was not measured: no images were held out."),
        ([record(9, 0.3, 0.3, count=15)], [], "Too few pairs to tell whether the caption is heard: 15 were held out, "),
        ([record(9, error=0.03)], [], "Too few pairs to tell whether the caption is heard: with 200 held out"),
        ([record(2000)], [], "Up to step 2,000 the caption has no effect yet: "),
        ([record(2000, 0.02, 0.02)], [], "Up to step 2,000 the caption has no effect yet: "),
        ([record(9, right=math.inf)], [], "The validation loss of step 9 is not a number: the training has diverged."),
        (
            HEARD,
            [record(5000, 0.13, 0.13)],
            "From step 4,000 on the caption is heard: at high noise (timesteps 750–999) the right one lowers the loss "
            "of held-out pairs by 11 % against none and by 12 % against a wrong one, and that of training pairs by "
            "13 % against none: it is not memorising.",
        ),
        (HEARD, [record(5000, 0.3, 0.3)], "does not rise: it is not memorising yet."),
        (HEARD, [record(4000, 0.13, 0.13)], "; training pairs were not checked beside them, so memorising cannot"),
        (HEARD, [], "; training pairs were not checked beside them, so memorising cannot be told."),
        (
            RISING,
            [record(2000, 0.3, 0.3)],
            "The U-Net is memorising: at high noise (timesteps 750–999) the caption lowers the loss of training pairs "
            "by 30 % and that of held-out pairs by 8.0 %, and the held-out loss has risen by 5.6 % since step 1,000; "
            "train no longer than that, or on more pairs.",
        ),
        (RISING, [record(2000, 0.09, 0.09)], "though the held-out loss has risen by 5.6 % since step 1,000."),
        (
            [record(3000, 0.1, 0.0)],
            [],
            "At step 3,000 a caption is used but not heard: at high noise (timesteps 750–999) the right one lowers the "
            "held-out loss by 10 % against none, and a wrong one does as well (the right one's gain on it is 0.0 % "
            "[−2.5 to 2.5]).",
        ),
        ([record(3000, 0.0, 0.1)], [], "told from a wrong one, but not surely better than none: at high noise"),
        (
            [record(3000, -0.1, 0.0)],
            [],
            "does harm: at high noise (timesteps 750–999) it raises the held-out loss by 10 %",
        ),
    ],
)
def test_the_sentence_says_what_is_the_case(held_out, training, sentence):
    said = describe_caption_losses(held_out, training)
    assert sentence in said
    assert said.endswith(".")
    assert said.count(". ") == 0, "it is one sentence"


def test_records_may_come_in_any_order_and_the_last_of_a_step_counts():
    said = describe_caption_losses(HEARD, [])
    assert describe_caption_losses([HEARD[-1], record(4000), *HEARD[:-1]], []) == said


def test_chance_is_seldom_called_hearing():
    generator = torch.Generator().manual_seed(0)
    heard = 0
    for _ in range(300):
        gains = (0.01 * torch.randn(2, 4, generator=generator)).tolist()
        flat = record(5, error=0.01)
        chance = {name: [1 / (1 - gain) for gain in row] for name, row in zip(("empty", "wrong"), gains, strict=True)}
        heard += "is heard" in describe_caption_losses([flat | chance], [])
    assert heard <= 3, "it would have to be better than none and than a wrong one by chance"
