"""Samplers that ask once a step and remember what they saw before."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from gobelin.samplers.noise_levels import NoiseLevels
from gobelin.samplers.step import Denoise, DenoiserOutput, Latents, Step, sigma_of

_FEW = 15  # steps: with fewer, DEIS ends with a step of first order
_LMS_ORDER = 4
# Adams-Bashforth's weights for even steps, by how many predictions there are; the newest comes first.
_PLMS = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


def dpmpp_2m(denoise: Denoise, latents: Latents, levels: NoiseLevels, noise: Callable[[], Latents]) -> Iterator[Step]:
    """DPM-Solver++(2M), the midpoint form (Lu et al. 2022, arXiv 2211.01095, algorithm 2)."""
    yield from _dpmpp_2m(denoise, latents, levels, None)


def dpmpp_2m_sde(
    denoise: Denoise, latents: Latents, levels: NoiseLevels, noise: Callable[[], Latents]
) -> Iterator[Step]:
    """The same for the stochastic equation: SDE-DPM-Solver++(2M) (arXiv 2211.01095, section 6)."""
    yield from _dpmpp_2m(denoise, latents, levels, noise)


def _dpmpp_2m(
    denoise: Denoise, latents: Latents, levels: NoiseLevels, noise: Callable[[], Latents] | None
) -> Iterator[Step]:
    previous, previous_h = None, 0.0
    for index, timestep, here, there in levels.intervals():
        guess = denoise(latents, timestep, here)
        direction = guess.denoised
        h = _log_step(here, there)
        # The first step is of first order, the last, to no noise at all, too, and one from where the last one stood.
        if previous is not None and previous_h > 0 and there < 1:
            direction = direction + h / (2 * previous_h) * (direction - previous)
        shrink = sigma_of(there) / sigma_of(here)  # e^-h
        kept = shrink if noise is None else shrink**2
        # σ_t/σ_s·z_s in variance preserving terms; with noise, e^-h times that.
        latents = kept * math.sqrt(there / here) * guess.latents + math.sqrt(there) * (1 - kept) * direction
        if noise is not None and there < 1:
            latents = latents + math.sqrt((1 - there) * (1 - kept)) * noise()
        previous, previous_h = guess.denoised, h
        yield Step.of(index, timestep, here, latents, guess)


def lms(denoise: Denoise, latents: Latents, levels: NoiseLevels, noise: Callable[[], Latents]) -> Iterator[Step]:
    """Adams-Bashforth in σ, of fourth order at most (k-diffusion ``sample_lms``)."""
    slopes: list[Latents] = []
    sigmas = [sigma_of(alpha) for alpha in levels.alphas_cumprod]
    for index, timestep, here, there in levels.intervals():
        guess = denoise(latents, timestep, here)
        slopes = [guess.noise, *slopes[: _LMS_ORDER - 1]]
        weights = _adams(sigmas[index - len(slopes) + 1 : index + 1][::-1], sigmas[index], sigma_of(there))
        moved = _weighed(weights, slopes)
        latents = math.sqrt(there) * (guess.latents / math.sqrt(here) + moved)
        yield Step.of(index, timestep, here, latents, guess)


def deis(denoise: Denoise, latents: Latents, levels: NoiseLevels, noise: Callable[[], Latents]) -> Iterator[Step]:
    """DEIS with log σ as its variable, of second order (Zhang and Chen 2022, arXiv 2204.13902, table 2)."""
    previous: tuple[float, Latents] | None = None
    steps = len(levels.timesteps)
    for index, timestep, here, there in levels.intervals():
        guess = denoise(latents, timestep, here)
        sigma, target = sigma_of(here), sigma_of(there)
        moved = (target - sigma) * guess.noise
        last_of_few = index == steps - 1 and levels.skipped + steps < _FEW
        if previous is not None and not last_of_few and previous[0] != sigma:
            older, slope = previous

            def integral(at: float, one: float, other: float) -> float:
                """∫ (log x − log other) / (log one − log other) dx."""
                return at * (math.log(at) - math.log(other) - 1) / (math.log(one) - math.log(other))

            moved = (integral(target, sigma, older) - integral(sigma, sigma, older)) * guess.noise
            moved = moved + (integral(target, older, sigma) - integral(sigma, older, sigma)) * slope
        previous = sigma, guess.noise
        latents = math.sqrt(there) * (guess.latents / math.sqrt(here) + moved)
        yield Step.of(index, timestep, here, latents, guess)


def pndm(denoise: Denoise, latents: Latents, levels: NoiseLevels, noise: Callable[[], Latents]) -> Iterator[Step]:
    """Pseudo linear multistep, begun by one step that asks twice (Liu et al. 2022, arXiv 2202.09778; CompVis' PLMS).

    What is put together are the predictions themselves: the noise, or where the model predicts it the velocity.
    """
    seen: list[Latents] = []
    rows = list(levels.intervals())
    for index, (row, timestep, here, there) in enumerate(rows[:1] + rows[2:]):
        guess = denoise(latents, timestep, here)
        seen = [_predicted(guess, here, levels), *seen[: len(_PLMS) - 1]]
        prediction = _weighed(_PLMS[len(seen) - 1], seen)
        latents = _transferred(guess.latents, prediction, here, there, levels)
        if row == 0 and len(rows) > 1:
            # Asked again at the end of the step, which from there began one stride above.
            _, after, level, _ = rows[1]
            second = denoise(latents, after, level)
            prediction = (_predicted(second, level, levels) + prediction) / 2
            latents = _transferred(guess.latents, prediction, levels.above[1], level, levels)
        yield Step.of(index, timestep, here, latents, guess)


def _predicted(guess: DenoiserOutput, alpha_cumprod: float, levels: NoiseLevels) -> Latents:
    """What the model predicted for this guess."""
    if not levels.velocity:
        return guess.noise
    return math.sqrt(alpha_cumprod) * guess.noise - math.sqrt(1 - alpha_cumprod) * guess.denoised


def _transferred(latents: Latents, prediction: Latents, here: float, there: float, levels: NoiseLevels) -> Latents:
    """From one level to another by a prediction at the first (arXiv 2202.09778, equation 9)."""
    noise = prediction
    if levels.velocity:
        noise = math.sqrt(here) * prediction + math.sqrt(1 - here) * latents
    return math.sqrt(there) * (latents / math.sqrt(here) + (sigma_of(there) - sigma_of(here)) * noise)


def uni_pc(denoise: Denoise, latents: Latents, levels: NoiseLevels, noise: Callable[[], Latents]) -> Iterator[Step]:
    """UniPC-2 with B(h) = e^h − 1: predict, and correct by what is seen there (Zhao et al. 2023, arXiv 2302.04867)."""
    before: _Seen | None = None
    last: _Seen | None = None
    order, steps = 1, len(levels.timesteps)
    for index, timestep, here, there in levels.intervals():
        guess = denoise(latents, timestep, here)
        start = guess.latents
        if last is not None:
            start = _unified(last, before if order == 2 else None, here, guess.denoised)
        order = 1 if last is None or index == steps - 1 else 2
        before, last = last, _Seen(latents=start, denoised=guess.denoised, alpha_cumprod=here)
        latents = _unified(last, before if order == 2 else None, there, None)
        yield Step.of(index, timestep, here, latents, guess)


@dataclass(frozen=True, kw_only=True)
class _Seen:
    """Where UniPC stood, and what it saw there."""

    latents: Latents
    denoised: Latents
    alpha_cumprod: float


def _unified(last: _Seen, before: _Seen | None, there: float, seen_there: Latents | None) -> Latents:
    """UniPC's step from ``last`` to ᾱ ``there``, by what was seen ``before`` it and, to correct it, at its end."""
    h = _log_step(last.alpha_cumprod, there)
    if not h:  # as many steps as there are timesteps may stand at one of them twice
        return last.latents
    if before is not None and before.alpha_cumprod == last.alpha_cumprod:
        before = None
    grown = -math.expm1(-h)  # 1 − e^-h
    change: Latents | float = 0.0
    rate = 1.0
    if before is not None:
        rate = -_log_step(before.alpha_cumprod, last.alpha_cumprod) / h
        change = (before.denoised - last.denoised) / rate
    if seen_there is None:
        pull = 0.5 * change
    elif before is None:
        pull = 0.5 * (seen_there - last.denoised)
    else:
        # Two equations that make the step exact for denoised latents that are parabolas in λ (equation 9).
        wanted = [1 / grown - 1 / h, (1 - 2 * (1 - grown / h) / h) / grown]
        earlier, later = np.linalg.solve(np.array([[1.0, 1.0], [rate, 1.0]]), np.array(wanted)).tolist()
        pull = earlier * change + later * (seen_there - last.denoised)
    shrink = sigma_of(there) / sigma_of(last.alpha_cumprod) * math.sqrt(there / last.alpha_cumprod)
    return shrink * last.latents + math.sqrt(there) * grown * (last.denoised + pull)


def _weighed(weights: Sequence[float], seen: Sequence[Latents]) -> Latents:
    """The weighted sum of what was seen."""
    return torch.stack([weight * one for weight, one in zip(weights, seen, strict=True)]).sum(dim=0)


def _log_step(here: float, there: float) -> float:
    """λ_there − λ_here, with λ = log(√ᾱ / √(1−ᾱ)) = −log σ; without end where no noise is left."""
    return math.log(sigma_of(here) / sigma_of(there)) if there < 1 else math.inf


def _adams(nodes: Sequence[float], start: float, end: float) -> list[float]:
    """The integrals from ``start`` to ``end`` of the polynomials that are 1 at one of the nodes and 0 at the others."""
    weights = []
    for node in nodes:
        others = [other for other in nodes if other != node]
        whole = np.poly1d(others, r=True).integ() / math.prod(node - other for other in others)
        weights.append(float(whole(end) - whole(start)))
    return weights
