"""Sharp maps that are collected while painting are those of ``trace="sharp"``, and steps have their own."""

from dataclasses import replace

import torch
from PIL import Image

from gobelin.attention import Trace
from gobelin.look.page import word_map_data, word_shares
from gobelin.look.sharp_maps import sharp_trace
from gobelin.look.step_shares import StepCollector
from gobelin.pipeline import Pipeline

PROMPTS, SETTINGS = ["a red circle", "a blue square and a ring"], {"seed": 1, "steps": 4}


def collected(pipe: Pipeline) -> StepCollector:
    size = pipe.latent_size()
    trace = sharp_trace(pipe.unet.attention_sites, size)
    painting = pipe.start(PROMPTS, trace=replace(trace, start=0.0), **SETTINGS)
    words = [chunks.words.at_length(painting.plan.length) for chunks in painting.plan.texts]
    collector = StepCollector(trace, words, size)
    for step in painting:
        collector.add(step.maps, pipe.schedule.progress(step.timestep))
    return collector


def test_the_mean_is_the_sharp_trace_and_steps_are_their_own(pipe: Pipeline) -> None:
    collector = collected(pipe)
    result = pipe(PROMPTS, trace="sharp", **SETTINGS)
    sites = sharp_trace(pipe.unet.attention_sites, pipe.latent_size()).sites
    apart = pipe(PROMPTS, trace=Trace(sites=sites, per_step=True), **SETTINGS)
    for index, image in enumerate(result.images):
        ours = collector.heatmaps(index, image)
        assert ours.sharp
        for number in range(len(ours.words)):
            torch.testing.assert_close(ours[number].raw, result.heatmaps[index][number].raw, atol=1e-6, rtol=1e-4)
        assert sum(site.kind == "self" for site in ours.maps) == 1
        shares = collector.shares(index)
        for step in range(4):
            theirs = word_shares(apart.heatmaps[index].select(steps=[step]).sharpened())
            torch.testing.assert_close(shares[step], theirs, atol=1e-6, rtol=1e-4)
        assert word_map_data(ours, shares)["steps"] == 1 + 4


def test_a_step_without_maps_repeats_the_one_before(pipe: Pipeline) -> None:
    collector = collected(pipe)
    collector.add({}, 1.0)
    shares = collector.shares(0)
    assert torch.equal(shares[-1], shares[-2])
    assert collector.heatmaps(0, Image.new("RGB", (8, 8))).sharp
