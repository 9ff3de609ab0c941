// The painter, a worker: it reads the model once, and then turns prompts into pictures, step by step.
//
// It is told {kind: "open", model}, {kind: "paint", id, prompt, negativePrompt, seed, steps, guidance} and
// {kind: "stop"}, and answers {kind: "reading", share}, {kind: "ready", threads}; then, each with the id,
// {kind: "begun", …}, {kind: "step", …}, {kind: "done", …}, {kind: "stopped"}; and {kind: "failed", sentence}.

import { Attention } from "./maps.js";
import { openNetworks } from "./networks.js";
import { drawNoise, Generator } from "./noise.js";
import { findWords } from "./prompt_words.js";
import { guide, sample } from "./samplers.js";
import { PageError, sentenceOf } from "./sentences.js";
import { Tokenizer } from "./tokenizer.js";

const MOST_CHARACTERS = 100_000;

let model = null;
let tokenizer = null;
let networks = null;
let wanted = null; // the id of the painting that is wanted: another one stops at its next step
let last = Promise.resolve();

self.addEventListener("message", ({ data }) => {
  if (data.kind === "open") last = attempt(() => open(data.model));
  if (data.kind === "stop") wanted = null;
  if (data.kind === "paint") {
    wanted = data.id;
    last = last.then(() => attempt(() => paint(data), data.id));
  }
});

async function attempt(work, id) {
  try {
    await work();
  } catch (error) {
    self.postMessage({ kind: "failed", id, sentence: sentenceOf(error), opened: networks !== null });
  }
}

async function open(described) {
  model = described;
  tokenizer = new Tokenizer(model.tokenizer);
  networks = await openNetworks(model, (share) => self.postMessage({ kind: "reading", share }));
  self.postMessage({ kind: "ready", threads: networks.threads });
}

async function paint({ id, prompt, negativePrompt, seed, steps, guidance }) {
  if (wanted !== id || networks === null) return;
  const [positive, negative] = [prompt, negativePrompt].map(readTokens);
  if (!prompt.trim()) throw new PageError("empty");
  const room = tokenizer.maxLength - 2;
  const words = findWords(prompt, positive.slice(0, room));
  const cut = positive.length > room ? [...prompt].slice(positive[room].start).join("").trim() : "";
  self.postMessage({ kind: "begun", id, words, cut });
  const embeddings = await networks.encode([negative, positive].map((tokens) => tokenizer.padded(tokens)));

  const generator = new Generator(seed);
  const count = model.latents.reduce((product, side) => product * side);
  const levels = model.levels[steps];
  const late = new Attention();
  let attention = null;
  const predict = async (latents, timestep) => {
    const predicted = await networks.predict(latents, timestep, embeddings);
    attention = predicted.attention;
    return guide(predicted.negative, predicted.positive, guidance, model.guidanceRescale);
  };
  let clean = null;
  for await (const { index, latents, denoised } of sample({
    name: model.sampler,
    kind: model.predictionType,
    levels,
    predict,
    drawNoise: () => drawNoise(generator, count),
  })) {
    await others();
    if (wanted !== id) return self.postMessage({ kind: "stopped", id });
    clean = latents;
    if (index >= levels.mapsFrom) late.add(attention);
    const shares = await networks.wordMaps(attention, words);
    const image = await networks.decode(denoised);
    const done = { step: index + 1, steps: levels.timesteps.length };
    self.postMessage({ kind: "step", id, ...done, image, shares });
  }
  const image = await networks.decode(clean);
  self.postMessage({ kind: "done", id, image, shares: await networks.wordMaps(late.mean(), words) });
}

function readTokens(text) {
  if (text.length > MOST_CHARACTERS) throw new PageError("long", MOST_CHARACTERS);
  if (!text.isWellFormed()) throw new PageError("half");
  return tokenizer.tokens(text);
}

// Let messages in that have come meanwhile.
function others() {
  return new Promise((resolve) => {
    const { port1, port2 } = new MessageChannel();
    port1.addEventListener("message", () => {
      port1.close();
      resolve();
    });
    port1.start();
    port2.postMessage(null);
  });
}
