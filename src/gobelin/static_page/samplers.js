// Guidance and samplers: gobelin.guidance, gobelin.schedule and gobelin.samplers, in float32 as PyTorch rounds.

const { fround, sqrt } = Math;

// a·x + b·y of two arrays, each product rounded
export function weighted(a, x, b, y) {
  const [first, second] = [fround(a), fround(b)];
  return x.map((value, place) => fround(first * value) + fround(second * y[place]));
}

// Classifier-free guidance (Ho and Salimans 2022, equation 6), and its rescale (arXiv 2305.08891, section 3.4).
export function guide(negative, positive, scale, rescale) {
  if (scale <= 1) return positive;
  const factor = fround(scale);
  const guided = negative.map((value, place) => value + fround(factor * fround(positive[place] - value)));
  if (!rescale) return guided;
  const spread = fround(fround(rescale * fround(deviation(positive) / deviation(guided))) + fround(1 - rescale));
  return guided.map((value) => value * spread);
}

function deviation(values) {
  const mean = values.reduce((sum, value) => sum + value, 0) / values.length;
  return fround(sqrt(values.reduce((sum, value) => sum + (value - mean) ** 2, 0) / (values.length - 1)));
}

// Split noisy latents at noise level ᾱ, by the prediction, into denoised latents and noise.
export function split(kind, prediction, latents, alpha) {
  const [signal, sigma] = [alpha ** 0.5, (1 - alpha) ** 0.5];
  if (kind === "epsilon") {
    const clean = weighted(1, latents, -sigma, prediction);
    return { denoised: clean.map((value) => value / fround(signal)), noise: prediction };
  }
  return {
    denoised: weighted(signal, latents, -sigma, prediction),
    noise: weighted(signal, prediction, sigma, latents),
  };
}

// Each sampler makes a function of a step: (output, latents, ᾱ, next ᾱ, drawNoise) -> the next latents.

// DDIM, and Euler's method (Song et al. 2020, equation 12).
const ddim = () => (output, latents, alpha, nextAlpha) =>
  weighted(sqrt(nextAlpha), output.denoised, sqrt(1 - nextAlpha), output.noise);

// DDPM (Ho et al. 2020, equation 7).
const ddpm = () => (output, latents, alpha, nextAlpha, drawNoise) => {
  const alphaT = alpha / nextAlpha;
  const mean = weighted(
    (sqrt(nextAlpha) * (1 - alphaT)) / (1 - alpha),
    output.denoised,
    (sqrt(alphaT) * (1 - nextAlpha)) / (1 - alpha),
    latents,
  );
  const variance = ((1 - nextAlpha) / (1 - alpha)) * (1 - alphaT);
  return variance > 0 ? weighted(1, mean, sqrt(variance), drawNoise()) : mean;
};

// DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095, algorithm 2).
const dpmpp2m = () => {
  let [previous, previousH] = [null, 0];
  return (output, latents, alpha, nextAlpha) => {
    const h = lambdaStep(alpha, nextAlpha);
    let direction = output.denoised;
    if (previous !== null && previousH > 0 && nextAlpha < 1) {
      const change = weighted(1, direction, -1, previous);
      direction = weighted(1, direction, h / (2 * previousH), change);
    }
    const kept = sigmaOf(nextAlpha) / sigmaOf(alpha);
    [previous, previousH] = [output.denoised, h];
    return weighted(kept * sqrt(nextAlpha / alpha), latents, sqrt(nextAlpha) * (1 - kept), direction);
  };
};

const sigmaOf = (alpha) => sqrt((1 - alpha) / alpha);
const lambdaStep = (alpha, nextAlpha) => (nextAlpha < 1 ? Math.log(sigmaOf(alpha) / sigmaOf(nextAlpha)) : Infinity);

const SAMPLERS = {
  ddim,
  ddpm,
  euler: ddim,
  euler_karras: ddim,
  dpmpp_2m: dpmpp2m,
  dpmpp_2m_karras: dpmpp2m,
};

// Sample: from noise to latents. `levels` are {timesteps, alphas, nextAlphas, startScale}; `predict(latents, timestep)`
// promises a prediction; each step is {index, latents, denoised}.
export async function* sample({ name, kind, levels, predict, drawNoise }) {
  const step = SAMPLERS[name]();
  let latents = drawNoise();
  if (levels.startScale !== 1) latents = latents.map((value) => value * fround(levels.startScale));
  for (const [index, timestep] of levels.timesteps.entries()) {
    const [alpha, nextAlpha] = [levels.alphas[index], levels.nextAlphas[index]];
    const output = split(kind, await predict(latents, timestep), latents, alpha);
    latents = step(output, latents, alpha, nextAlpha, drawNoise);
    yield { index, latents, denoised: output.denoised };
  }
}
