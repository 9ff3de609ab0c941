"""Multistep samplers: one call of the denoiser a step, put together with what earlier steps saw."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from gobelin.samplers.noise_levels import DEISNoiseLevels, NoiseLevels, PNDMNoiseLevels
from gobelin.samplers.step import Denoise, DenoiserOutput, DrawNoise, Latents, Step, sigma_of

_DEIS_FEW_STEPS = 15  # with fewer, the last step is of first order: diffusers' lower_order_final, which steadies it
_LMS_ORDER = 4  # the default of k-diffusion and diffusers
# Adams-Bashforth's weights for even steps, by the number of predictions; the newest prediction's comes first.
_PLMS_WEIGHTS = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


def dpmpp_2m(denoise: Denoise, latents: Latents, levels: NoiseLevels, draw_noise: DrawNoise) -> Iterator[Step]:
    """DPM-Solver++(2M), the midpoint form (Lu et al. 2022, arXiv 2211.01095, algorithm 2)."""
    yield from _dpmpp_2m(denoise, latents, levels, None)


def dpmpp_2m_sde(denoise: Denoise, latents: Latents, levels: NoiseLevels, draw_noise: DrawNoise) -> Iterator[Step]:
    """SDE-DPM-Solver++(2M): the same for the stochastic equation (arXiv 2211.01095, section 6)."""
    yield from _dpmpp_2m(denoise, latents, levels, draw_noise)


def _dpmpp_2m(denoise: Denoise, latents: Latents, levels: NoiseLevels, draw_noise: DrawNoise | None) -> Iterator[Step]:
    """Step through DPM-Solver++(2M), for the stochastic equation where there is noise to draw."""
    previous, previous_h = None, 0.0
    for index, timestep, alpha, next_alpha in levels.intervals():
        output = denoise(latents, timestep, alpha)
        direction = output.denoised
        h = _lambda_step(alpha, next_alpha)
        # First order for the first step, for the last, to no noise at all, and after a step of length 0.
        if previous is not None and previous_h > 0 and next_alpha < 1:
            direction = direction + h / (2 * previous_h) * (direction - previous)
        shrink = sigma_of(next_alpha) / sigma_of(alpha)  # e^-h
        kept = shrink if draw_noise is None else shrink**2
        # σ_t/σ_s·z_s in variance preserving terms; with noise, e^-h times that.
        latents = kept * math.sqrt(next_alpha / alpha) * output.latents + math.sqrt(next_alpha) * (1 - kept) * direction
        if draw_noise is not None and next_alpha < 1:
            latents = latents + math.sqrt((1 - next_alpha) * (1 - kept)) * draw_noise()
        previous, previous_h = output.denoised, h
        yield Step.of(index, timestep, alpha, latents, output)


def lms(denoise: Denoise, latents: Latents, levels: NoiseLevels, draw_noise: DrawNoise) -> Iterator[Step]:
    """Linear multistep: Adams-Bashforth in σ, of fourth order at most (k-diffusion ``sample_lms``)."""
    slopes: list[Latents] = []
    sigmas = [sigma_of(alpha) for alpha in levels.alphas_cumprod]
    for index, timestep, alpha, next_alpha in levels.intervals():
        output = denoise(latents, timestep, alpha)
        slopes = [output.noise, *slopes[: _LMS_ORDER - 1]]
        nodes = sigmas[index - len(slopes) + 1 : index + 1][::-1]
        change = _weighted_sum(_adams_bashforth_weights(nodes, sigmas[index], sigma_of(next_alpha)), slopes)
        latents = math.sqrt(next_alpha) * (output.latents / math.sqrt(alpha) + change)
        yield Step.of(index, timestep, alpha, latents, output)


def deis(denoise: Denoise, latents: Latents, levels: DEISNoiseLevels, draw_noise: DrawNoise) -> Iterator[Step]:
    """DEIS with log σ as its variable, of second order (Zhang and Chen 2022, arXiv 2204.13902, table 2)."""
    previous: tuple[float, Latents] | None = None
    for index, timestep, alpha, next_alpha in levels.intervals():
        output = denoise(latents, timestep, alpha)
        sigma, next_sigma = sigma_of(alpha), sigma_of(next_alpha)
        change = (next_sigma - sigma) * output.noise
        last_of_few = index == levels.steps - 1 and levels.all_steps < _DEIS_FEW_STEPS
        if previous is not None and not last_of_few and previous[0] != sigma:
            previous_sigma, previous_slope = previous
            change = _log_linear_integral(sigma, next_sigma, sigma, previous_sigma) * output.noise
            change = change + _log_linear_integral(sigma, next_sigma, previous_sigma, sigma) * previous_slope
        previous = sigma, output.noise
        latents = math.sqrt(next_alpha) * (output.latents / math.sqrt(alpha) + change)
        yield Step.of(index, timestep, alpha, latents, output)


def _log_linear_integral(start: float, end: float, one: float, zero: float) -> float:
    """Integrate (log σ − log zero) / (log one − log zero), which is 1 at ``one`` and 0 at ``zero``, over σ."""

    def antiderivative(sigma: float) -> float:
        return sigma * (math.log(sigma) - math.log(zero) - 1) / (math.log(one) - math.log(zero))

    return antiderivative(end) - antiderivative(start)


def pndm(denoise: Denoise, latents: Latents, levels: PNDMNoiseLevels, draw_noise: DrawNoise) -> Iterator[Step]:
    """PNDM: pseudo linear multistep, begun by a step with two calls (Liu et al. 2022, arXiv 2202.09778; CompVis' PLMS).

    The predictions themselves are put together: the noise, or the velocity where the model predicts that.
    """
    predictions: list[Latents] = []
    rows = list(levels.intervals())
    for index, (row, timestep, alpha, next_alpha) in enumerate(rows[:1] + rows[2:]):
        output = denoise(latents, timestep, alpha)
        predictions = [_model_prediction(output, alpha, levels), *predictions[: len(_PLMS_WEIGHTS) - 1]]
        prediction = _weighted_sum(_PLMS_WEIGHTS[len(predictions) - 1], predictions)
        latents = _pndm_transfer(output.latents, prediction, alpha, next_alpha, levels)
        if row == 0 and len(rows) > 1:
            # The second call is at the end of the step, which is taken again from one stride before that end.
            _, end_timestep, end_alpha, _ = rows[1]
            second = denoise(latents, end_timestep, end_alpha)
            prediction = (_model_prediction(second, end_alpha, levels) + prediction) / 2
            previous_alpha = levels.previous_alphas_cumprod[1]
            latents = _pndm_transfer(output.latents, prediction, previous_alpha, end_alpha, levels)
        yield Step.of(index, timestep, alpha, latents, output)


def _model_prediction(output: DenoiserOutput, alpha: float, levels: PNDMNoiseLevels) -> Latents:
    """Restore the model's prediction, ε or v, from a denoiser's output at noise level ᾱ."""
    if levels.prediction_type == "epsilon":
        return output.noise
    return math.sqrt(alpha) * output.noise - math.sqrt(1 - alpha) * output.denoised


def _pndm_transfer(
    latents: Latents, prediction: Latents, alpha: float, next_alpha: float, levels: PNDMNoiseLevels
) -> Latents:
    """Go from one noise level to another by a prediction at the first (arXiv 2202.09778, equation 9)."""
    noise = prediction
    if levels.prediction_type == "v_prediction":
        noise = math.sqrt(alpha) * prediction + math.sqrt(1 - alpha) * latents
    return math.sqrt(next_alpha) * (latents / math.sqrt(alpha) + (sigma_of(next_alpha) - sigma_of(alpha)) * noise)


def uni_pc(denoise: Denoise, latents: Latents, levels: NoiseLevels, draw_noise: DrawNoise) -> Iterator[Step]:
    """UniPC-2 with B(h) = e^h − 1: predict, then correct by the output there (Zhao et al. 2023, arXiv 2302.04867)."""
    previous: _Evaluation | None = None
    latest: _Evaluation | None = None
    order = 1
    for index, timestep, alpha, next_alpha in levels.intervals():
        output = denoise(latents, timestep, alpha)
        corrected = output.latents
        if latest is not None:
            corrected = _uni_pc_update(latest, previous if order == 2 else None, alpha, output.denoised)
        order = 1 if latest is None or index == levels.steps - 1 else 2
        previous, latest = latest, _Evaluation(latents=corrected, denoised=output.denoised, alpha=alpha)
        latents = _uni_pc_update(latest, previous if order == 2 else None, next_alpha, None)
        yield Step.of(index, timestep, alpha, latents, output)


@dataclass(frozen=True, kw_only=True)
class _Evaluation:
    """One of UniPC's evaluations: noisy latents at noise level ᾱ, and the denoised ones that the model made of them."""

    latents: Latents
    denoised: Latents
    alpha: float


def _uni_pc_update(
    latest: _Evaluation, previous: _Evaluation | None, next_alpha: float, denoised: Latents | None
) -> Latents:
    """UniPC's step from ``latest`` to ``next_alpha``: the predictor, or with ``denoised`` from there the corrector.

    It is of second order with ``previous``, of first without.
    """
    h = _lambda_step(latest.alpha, next_alpha)
    if not h:  # with as many steps as timesteps, two may stand at the same one
        return latest.latents
    if previous is not None and previous.alpha == latest.alpha:
        previous = None
    phi = -math.expm1(-h)  # 1 − e^-h
    difference: Latents | float = 0.0
    rate = 1.0
    if previous is not None:
        rate = -_lambda_step(previous.alpha, latest.alpha) / h
        difference = (previous.denoised - latest.denoised) / rate
    if denoised is None:
        residual = 0.5 * difference
    elif previous is None:
        residual = 0.5 * (denoised - latest.denoised)
    else:
        # Two equations that make the step exact for denoised latents that are parabolas in λ (equation 9).
        wanted = [1 / phi - 1 / h, (1 - 2 * (1 - phi / h) / h) / phi]
        rho_previous, rho_next = np.linalg.solve(np.array([[1.0, 1.0], [rate, 1.0]]), np.array(wanted)).tolist()
        residual = rho_previous * difference + rho_next * (denoised - latest.denoised)
    shrink = sigma_of(next_alpha) / sigma_of(latest.alpha) * math.sqrt(next_alpha / latest.alpha)
    return shrink * latest.latents + math.sqrt(next_alpha) * phi * (latest.denoised + residual)


def _weighted_sum(weights: Sequence[float], terms: Sequence[Latents]) -> Latents:
    """Sum the terms, each times its weight."""
    return torch.stack([weight * term for weight, term in zip(weights, terms, strict=True)]).sum(dim=0)


def _lambda_step(alpha: float, next_alpha: float) -> float:
    """Compute h = λ' − λ, with λ = log(√ᾱ / √(1−ᾱ)) = −log σ; infinite where no noise is left."""
    return math.log(sigma_of(alpha) / sigma_of(next_alpha)) if next_alpha < 1 else math.inf


def _adams_bashforth_weights(nodes: Sequence[float], start: float, end: float) -> list[float]:
    """Integrate, from ``start`` to ``end``, the Lagrange polynomial of each node: 1 there, and 0 at the others."""
    weights: list[float] = []
    for node in nodes:
        others = [other for other in nodes if other != node]
        integral = np.poly1d(others, r=True).integ() / math.prod(node - other for other in others)
        weights.append(float(integral(end) - integral(start)))
    return weights
