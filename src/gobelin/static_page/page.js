// The page: what is typed goes to the painter (painter.js, a worker), and what comes back to the word map.

import "./word_map.js";
import { packShares } from "./maps.js";
import { withText } from "./png.js";
import { splitPrompt } from "./prompt_words.js";
import { trust } from "./trust.js";

const MOST_KEPT = 12; // pictures of this visit
const STORED = "gobelin"; // the keyword of a PNG's settings
const RELOADED = "gobelin reloaded for threads";
const WAIT = 3000; // milliseconds for a service worker to begin

const parts = Object.fromEntries([...document.querySelectorAll("[id]")].map((part) => [part.id, part]));
const map = document.querySelector("word-map");
const canvas = document.createElement("canvas");

let model = null;
let painter = null;
let job = null; // what is being painted: {id, asked, words, shares, images, …}
let shown = null; // the finished picture that is shown
let count = 0;

parts.unstarted.remove();
await isolate();
await start().catch(() => fail("This page's file model.json is missing or damaged: copy the whole folder again.", true));

async function start() {
  model = await (await fetch("./model.json", { cache: "no-cache" })).json();
  [canvas.height, canvas.width] = model.image;
  document.querySelector("#trust").textContent = trust(model.pointing, "paint");
  describe();
  fillIn();
  listen();
  painter = new Worker("./painter.js", { type: "module" });
  painter.addEventListener("message", ({ data }) => ANSWERS[data.kind](data));
  painter.addEventListener("error", () => {
    fail("This page's scripts are missing or damaged: copy the whole folder again.", true);
  });
  painter.postMessage({ kind: "open", model });
  if (parts.prompt.value.trim()) paint();
}

// Have the service worker isolate the page from other origins, so that there are threads: from the second load on.
async function isolate() {
  if (!("serviceWorker" in navigator)) return;
  try {
    await navigator.serviceWorker.register("./service_worker.js");
  } catch {
    return; // private windows refuse: without threads, then
  }
  if (crossOriginIsolated || sessionStorage.getItem(RELOADED)) return;
  const begun = navigator.serviceWorker.controller
    ? Promise.resolve(true)
    : new Promise((resolve) => {
        navigator.serviceWorker.addEventListener("controllerchange", () => resolve(true), { once: true });
        setTimeout(() => resolve(false), WAIT);
      });
  if (!(await begun)) return;
  sessionStorage.setItem(RELOADED, "yes");
  location.reload();
  await new Promise(() => {}); // until the page is gone
}

// What an address asks for, or what the model recommends.
function fillIn() {
  const asked = new URLSearchParams(location.hash.slice(1));
  parts.prompt.value = asked.get("prompt") ?? model.examples[0] ?? "";
  parts.steps.value = asked.get("steps") in model.levels ? asked.get("steps") : model.steps;
  parts.guidance.value = asked.get("guidance") ?? model.guidance;
  parts.negative.value = asked.get("negative") ?? model.negativePrompt;
  parts.seed.value = asked.get("seed") ?? 0;
  if (!parts.seed.checkValidity()) parts.seed.value = 0;
  if (!parts.guidance.checkValidity()) parts.guidance.value = model.guidance;
}

// What the page says about the model.
function describe() {
  parts.steps.replaceChildren(
    ...Object.keys(model.levels).map((steps) => make("option", { value: steps, textContent: steps })),
  );
  parts.examples.replaceChildren(
    ...model.examples.map((text) => {
      const button = make("button", { type: "button", textContent: text });
      button.addEventListener("click", () => {
        parts.prompt.value = text;
        paint();
      });
      return button;
    }),
  );
  parts.knows.hidden = Object.keys(model.vocabulary).length === 0;
  parts.knows
    .querySelector("dl")
    .replaceChildren(
      ...Object.entries(model.vocabulary).flatMap(([kind, phrases]) => [
        make("dt", { textContent: kind }),
        make("dd", { textContent: phrases.join(", ") }),
      ]),
    );
}

function listen() {
  parts.ask.addEventListener("submit", (event) => {
    event.preventDefault();
    paint();
  });
  parts.another.addEventListener("click", () => {
    parts.seed.value = Math.floor(Math.random() * 2 ** 31);
    paint();
  });
  addEventListener("hashchange", () => {
    fillIn();
    paint();
  });
  parts.stop.addEventListener("click", () => painter.postMessage({ kind: "stop" }));
  parts.save.addEventListener("click", save);
  parts.link.hidden = !navigator.clipboard; // as where the connection is not a safe one
  parts.link.addEventListener("click", async () => {
    await navigator.clipboard.writeText(location.href);
    say("The link is copied: it paints this picture again.");
  });
}

function paint() {
  if (!parts.ask.reportValidity()) return;
  const asked = {
    prompt: parts.prompt.value,
    negativePrompt: parts.negative.value,
    seed: parts.seed.valueAsNumber,
    steps: Number(parts.steps.value),
    guidance: parts.guidance.valueAsNumber,
  };
  job = { id: ++count, asked, words: [], shares: [], images: [] };
  parts.problem.hidden = true;
  parts.save.disabled = parts.link.disabled = true; // until it is a whole picture that is shown
  setBusy(true);
  painter.postMessage({ kind: "paint", id: job.id, ...asked });
}

// What the painter says; of a painting that is no longer wanted, nothing counts any more.
const ofThisJob = (answer) => (data) => {
  if (data.id === job?.id) answer(data);
};
const ANSWERS = {
  reading({ share }) {
    say(share < 1 ? `Reading the model: ${Math.floor(100 * share)} %` : "Preparing the model", share);
  },
  ready({ threads }) {
    const size = model.files.reduce((sum, { bytes }) => sum + bytes, 0);
    parts.facts.textContent =
      `A model of ${(model.numbers / 1e6).toFixed(1)} million numbers, with what runs it ${(size / 1e6).toFixed(1)} MB; ` +
      `here on ${threads === 1 ? "one thread" : `${threads} threads`}. The same prompt and seed give the same picture ` +
      "everywhere.";
    say("", 0);
  },
  begun: ofThisJob(({ words, cut }) => {
    Object.assign(job, { words, text: splitPrompt(job.asked.prompt, words), begun: performance.now() });
    note(words, cut);
  }),
  step: ofThisJob(({ step, steps, image, shares }) => {
    job.shares.push(shares);
    job.images.push(toUrl(image));
    say(`Step ${step} of ${steps}`, step / steps);
    show({ image: job.images.at(-1), steps: [shares] });
  }),
  done: ofThisJob(({ image, shares }) => {
    const url = toUrl(image);
    const seconds = (performance.now() - job.begun) / 1000;
    show({ image: url, steps: [shares, ...job.shares], images: [url, ...job.images] });
    say(`Painted in ${seconds.toFixed(1)} s. ${job.words.length ? "Point at a word, or at the picture." : ""}`, 0);
    finish(image);
  }),
  stopped: ofThisJob(() => {
    say("Stopped.", 0);
    setBusy(false);
  }),
  failed({ sentence, id, opened }) {
    if (id !== undefined && id !== job?.id) return;
    fail(sentence, !opened);
  },
};

function show({ image, images, steps }) {
  const [rows, columns] = gridOf(steps[0].length / Math.max(1, job.words.length));
  map.hidden = false;
  map.data = {
    text: job.text,
    words: job.words.map(({ word }) => word),
    rows,
    columns,
    steps: steps.length,
    sharp: true,
    weighted: model.isWeighted ? job.words.length : 0,
    colours: model.colours,
    image,
    images,
    ...packShares(steps, job.words.length, rows * columns),
  };
}

function finish(image) {
  const { asked } = job;
  const data = map.data;
  const { words } = job;
  const entry = { asked, words, data, image };
  const picture = make("img", { src: data.image, alt: asked.prompt, title: `${asked.prompt}, seed ${asked.seed}` });
  const button = make("button", { type: "button" }, picture);
  button.addEventListener("click", () => bringBack(entry));
  entry.button = button;
  parts.past.prepend(make("li", {}, button));
  while (parts.past.children.length > MOST_KEPT) parts.past.lastElementChild.remove();
  parts.after.hidden = false;
  present(entry);
  setBusy(false);
}

function bringBack(entry) {
  if (job !== null) painter.postMessage({ kind: "stop" });
  job = null;
  setBusy(false);
  const { prompt, negativePrompt, seed, steps, guidance } = entry.asked;
  parts.prompt.value = prompt;
  parts.negative.value = negativePrompt;
  [parts.seed.value, parts.steps.value, parts.guidance.value] = [seed, steps, guidance];
  map.data = entry.data;
  note(entry.words, "");
  say("", 0);
  present(entry);
}

// The picture that is shown now: its address, and how Python paints it.
function present(entry) {
  shown = entry;
  const { prompt, negativePrompt, seed, steps, guidance } = entry.asked;
  const address = new URLSearchParams({ prompt, seed });
  const options = [quoted(prompt), "--seed", seed, "--weights none"];
  if (steps !== model.steps) options.push("--steps", steps);
  if (guidance !== model.guidance) options.push("--guidance", guidance);
  if (negativePrompt !== model.negativePrompt) options.push("--negative-prompt", quoted(negativePrompt));
  for (const [name, value, usual] of [
    ["steps", steps, model.steps],
    ["guidance", guidance, model.guidance],
    ["negative", negativePrompt, model.negativePrompt],
  ]) {
    if (value !== usual) address.set(name, value);
  }
  history.replaceState(null, "", `#${address}`);
  parts.command.textContent = `${model.command} ${options.join(" ")}`;
  parts.save.disabled = parts.link.disabled = false;
  for (const button of parts.past.querySelectorAll("button")) {
    button.setAttribute("aria-current", String(button === entry.button));
  }
}

const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;

async function save() {
  const { prompt, negativePrompt, seed, steps, guidance } = shown.asked;
  toUrl(shown.image);
  const plain = await new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
  const settings = {
    prompt,
    seed,
    sampler: model.sampler,
    steps,
    guidance,
    guidance_rescale: model.guidanceRescale,
    negative_prompt: negativePrompt,
    height: model.image[0],
    width: model.image[1],
    clip_skip: model.clipSkip,
    weights: "none",
    model: model.name,
  };
  const file = await withText(plain, STORED, JSON.stringify(settings));
  const address = URL.createObjectURL(file);
  make("a", { href: address, download: `${slugOf(prompt)}-${seed}.png` }).click();
  URL.revokeObjectURL(address);
}

function slugOf(text) {
  const slug = text.toLowerCase().replaceAll(/[^\p{L}\p{M}\p{N}]+/gu, "-");
  return slug.slice(0, 60).replaceAll(/^-|-$/g, "") || "image";
}

function note(words, cut) {
  const unknown = model.words === null ? [] : words.map(({ word }) => word).filter((word) => !isKnown(word));
  const notes = [];
  if (unknown.length) {
    const several = [...new Set(unknown)].map((word) => `“${word}”`).join(", ");
    notes.push(`This model was never taught ${several}: that means nothing to it.`);
  }
  if (cut) notes.push(`The prompt is longer than this model reads: “${cut}” is left out.`);
  parts.notes.textContent = notes.join(" ");
}

const isKnown = (word) => model.words.includes(word.normalize("NFC").toLowerCase());

function gridOf(patches) {
  const [, h, w] = model.latents;
  const scale = Math.sqrt((patches || h * w) / (h * w));
  return [Math.round(h * scale), Math.round(w * scale)];
}

function toUrl(levels) {
  canvas.getContext("2d").putImageData(new ImageData(levels, canvas.width, canvas.height), 0, 0);
  return canvas.toDataURL("image/png");
}

// Say how far it is; what is said at the end of something is spoken too.
function say(text, share = 0) {
  parts.status.textContent = text;
  parts.bar.value = share;
  parts.bar.style.visibility = share > 0 ? "visible" : "hidden";
  if (share === 0) parts.spoken.textContent = text;
}

// Say what is wrong; at the end of all painting nothing can be asked for any more.
function fail(sentence, isEnd) {
  parts.problem.textContent = sentence;
  parts.problem.hidden = false;
  say("", 0);
  setBusy(false);
  if (isEnd) for (const button of parts.ask.querySelectorAll("button")) button.disabled = true;
}

function setBusy(isBusy) {
  if (!isBusy && document.activeElement === parts.stop) parts.paint.focus();
  parts.stop.hidden = !isBusy;
  parts.another.hidden = isBusy;
  parts.ask.setAttribute("aria-busy", String(isBusy));
}

function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}
