// How it works, of the run on the desk: one patch asks, the words answer, with the numbers of this run.

import { announce, button, byId, loadImage, make } from "./elements.js";
import { getJson, post, runJob } from "./client.js";
import { desk, gather } from "./desk.js";
import { remember } from "./gallery.js";
import { showPair } from "./pair.js";
import { drawHeat, drawPicture, fitCanvas, framePatch } from "./overlay.js";
import { Puzzles } from "./puzzles.js";
import { Runner } from "./runner.js";
import { siteOption } from "./stage.js";
import { vectorStrip } from "./vectors.js";

const PAUSE = 120; // milliseconds that the pointer rests before the server is asked
const SIDE = 768; // pixels of the picture's canvas
const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
const SHOWN_TERMS = 4; // of the weighted sum
const FORGOTTEN = "The server no longer has this run.";

const figure = (value, digits = 2) => value.toFixed(digits).replace("-", "−");

export function startHowItWorks() {
  const puzzles = new Puzzles(byId("puzzles"));
  const lens = new Lens();
  startBreaking();
  showCode();
  let told = null; // the picture that is shown here already
  const renew = () => {
    const usable = desk.run?.kind === "paint";
    byId("how-empty").hidden = usable;
    byId("how-content").hidden = !usable;
    if (!usable || location.hash !== "#how" || told === desk.picture) return;
    told = desk.picture;
    byId("break-result").replaceChildren();
    lens.renew();
    puzzles.renew();
  };
  desk.addEventListener("run", renew);
  addEventListener("hashchange", renew);
  renew();
}

// The picture with one patch of it, and what the server says of that patch's attention.
class Lens {
  #canvas = byId("lens");
  #context = byId("lens").getContext("2d");
  #image = null;
  #at = [0.5, 0.5]; // of the picture
  #grid = [1, 1]; // rows and columns of the chosen layer
  #timer = null;
  #asked = null;
  #isHeld = false; // the patch was chosen, so that the pointer on its way elsewhere does not change it

  constructor() {
    const sites = desk.info?.sites ?? [];
    byId("lens-layer").replaceChildren(...sites.filter(({ kind }) => kind === "cross").map(siteOption));
    const finest = sites.findLast(({ kind, downscale }) => kind === "cross" && downscale === 1);
    if (finest) byId("lens-layer").value = finest.name;
    const offerHeads = () => {
      const heads = sites.find(({ name }) => name === byId("lens-layer").value)?.heads ?? 1;
      const each = Array.from({ length: heads }, (_, n) =>
        make("option", { value: n, textContent: `${n + 1} of ${heads}` }),
      );
      byId("lens-head").replaceChildren(...each);
    };
    offerHeads();
    byId("lens-layer").addEventListener("change", () => {
      offerHeads();
      this.#ask();
    });
    byId("lens-head").addEventListener("change", () => this.#ask());
    byId("lens-step").addEventListener("input", () => this.#ask());
    this.#listen();
  }

  async renew() {
    const { picture, map } = desk;
    const steps = Number(picture.settings.steps) || 1;
    const slider = byId("lens-step");
    [slider.max, slider.value] = [steps, Math.ceil(0.7 * steps)]; // late, when words have their places
    this.#image = await loadImage(picture.source);
    for (const canvas of [this.#canvas, byId("how-own")]) fitCanvas(canvas, this.#image, SIDE);
    if (map) [this.#grid, this.#at] = [[map.rows, map.columns], brightest(map)];
    this.#isHeld = false;
    this.#films();
    this.#draw();
    this.#ask();
  }

  #listen() {
    const canvas = this.#canvas;
    const point = ({ clientX, clientY }) => {
      const box = canvas.getBoundingClientRect();
      this.#at = [(clientX - box.left) / box.width, (clientY - box.top) / box.height].map((value) =>
        Math.min(0.999, Math.max(0, value)),
      );
      this.#draw();
      this.#ask();
    };
    canvas.addEventListener("pointermove", (event) => !this.#isHeld && event.pointerType === "mouse" && point(event));
    canvas.addEventListener("pointerdown", (event) => {
      this.#isHeld = !this.#isHeld || event.pointerType !== "mouse";
      point(event);
    });
    canvas.addEventListener("keydown", (event) => {
      if (!(event.key in ARROWS) || !this.#image) return;
      event.preventDefault();
      const [rows, columns] = this.#grid;
      const [right, down] = ARROWS[event.key];
      const column = Math.min(columns - 1, Math.max(0, Math.floor(this.#at[0] * columns) + right));
      const row = Math.min(rows - 1, Math.max(0, Math.floor(this.#at[1] * rows) + down));
      this.#at = [(column + 0.5) / columns, (row + 0.5) / rows];
      this.#isHeld = true;
      this.#draw();
      this.#ask();
    });
  }

  get #patch() {
    const [rows, columns] = this.#grid;
    return [Math.floor(this.#at[1] * rows), Math.floor(this.#at[0] * columns)];
  }

  #draw() {
    const [rows, columns] = this.#grid;
    const [row, column] = this.#patch;
    drawPicture(this.#context, this.#image);
    framePatch(this.#context, [row, column], this.#grid, "#b3204d");
    byId("lens-place").textContent =
      `The patch in row ${row + 1}, column ${column + 1} of ${rows}×${columns}` + (this.#isHeld ? ", held" : "");
  }

  // What the loom showed, step by step; to be chosen from.
  #films() {
    const films = desk.run.previews.flatMap(({ step, first, images }) => {
      const image = images[desk.index - (first ?? 0)];
      return image && step <= Number(byId("lens-step").max) ? [{ step, image }] : [];
    });
    byId("lens-films").replaceChildren(
      ...films.map(({ step, image }) => {
        const choose = () => {
          byId("lens-step").value = step;
          this.#ask();
        };
        const frame = make("img", { src: image, alt: `Step ${step}` });
        const chooser = make("button", { type: "button", onclick: choose }, frame);
        chooser.dataset.step = step;
        return make("li", {}, chooser);
      }),
    );
  }

  #ask() {
    const step = Number(byId("lens-step").value);
    byId("lens-step-said").textContent = `${step} of ${byId("lens-step").max}`;
    for (const chooser of byId("lens-films").querySelectorAll("button")) {
      chooser.setAttribute("aria-pressed", String(Number(chooser.dataset.step) === step));
    }
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => this.#fetch(step), PAUSE);
  }

  async #fetch(step) {
    this.#asked?.abort();
    this.#asked = new AbortController();
    const { signal } = this.#asked;
    const { width, height } = desk.picture;
    const body = {
      image: desk.index,
      step: step - 1, // the server counts from 0
      site: byId("lens-layer").value,
      head: Number(byId("lens-head").value),
      x: Math.floor(this.#at[0] * width),
      y: Math.floor(this.#at[1] * height),
    };
    const ask = (site) => post(`v1/jobs/${desk.run.job}/explain`, { ...body, site }, signal);
    try {
      const words = await ask(body.site);
      byId("lens-problem").textContent = "";
      this.#grid = words.grid;
      this.#draw();
      explain(words);
      const patches = await ask(body.site.replace(/attn2$/, "attn1"));
      this.#drawOwn(patches);
      showShapes(patches, words);
    } catch (error) {
      if (error.name === "AbortError") return;
      const { run } = desk;
      const again = () => desk.dispatchEvent(new CustomEvent("again", { detail: { run } }));
      const isForgotten = error.type === "not_found";
      byId("lens-problem").replaceChildren(
        isForgotten ? FORGOTTEN : error.message,
        ...(isForgotten ? [" ", button("Paint it again", again)] : []),
      );
    }
  }

  // What the patch draws on: its row of attn1, in the same head.
  #drawOwn({ softmax, grid }) {
    const context = byId("how-own").getContext("2d");
    const [low, high] = [Math.min(...softmax), Math.max(...softmax)];
    const values = softmax.map((share) => (share - low) / (high - low || 1));
    drawHeat(context, this.#image, values, grid, desk.map.colours);
    framePatch(context, this.#patch, this.#grid, "#b3204d");
    byId("how-own-said").textContent = `What this patch draws on: up to ${(100 * high).toFixed(1)} % from one patch`;
  }
}

// The patch at which a word stands out most: a good one to begin with.
function brightest({ rows, columns, tops, shares }) {
  const levels = Uint8Array.from(atob(shares), (letter) => letter.charCodeAt(0));
  const word = tops.indexOf(Math.max(...tops));
  const own = levels.subarray(word * rows * columns, (word + 1) * rows * columns);
  const patch = own.indexOf(Math.max(...own));
  return [((patch % columns) + 0.5) / columns, (Math.floor(patch / columns) + 0.5) / rows];
}

function explain({ query, keys, scores, softmax, output, latents, denoised, ...told }) {
  const values = told.values_norm;
  const tokens = told.tokens.map((token) => ({ "<bos>": "BOS", "<eos>": "EOS" })[token] ?? token);
  showTokens(tokens, softmax);
  byId("how-latents").src = latents;
  byId("how-denoised").src = denoised;
  byId("how-query").replaceChildren(vectorStrip(query, "The patch's query"));
  const order = softmax.map((_, place) => place).toSorted((a, b) => softmax[b] - softmax[a]);
  const rows = shownTokens(tokens).map(({ name, places }) => ({
    name,
    key: places.length === 1 ? keys[places[0]] : null,
    score: places.length === 1 ? scores[places[0]] : null,
    share: places.reduce((sum, place) => sum + softmax[place], 0),
  }));
  const most = Math.max(...rows.map(({ share }) => share));
  byId("how-keys").replaceChildren(
    ...rows.map(({ name, key, score, share }) => {
      const bar = make("i");
      bar.style.width = `${(100 * share) / most}%`;
      return make(
        "tr",
        {},
        make("th", { scope: "row", textContent: name, dir: "auto" }),
        make("td", {}, key ? vectorStrip(key, `Key of ${name}`) : ""),
        make("td", { className: "number", textContent: score === null ? "" : figure(score) }),
        make("td", { className: "share" }, make("div", { className: "bar" }, bar)),
        make("td", { className: "number", textContent: figure(share, 3) }),
      );
    }),
  );
  byId("how-total").textContent = figure(
    softmax.reduce((sum, one) => sum + one, 0),
    3,
  );
  const width = query.length;
  const best = order[0];
  byId("how-score").textContent =
    `For “${spoken(tokens[best])}”: q · k = ${figure(scores[best] * Math.sqrt(width))}, ` +
    `over √${width} = ${figure(Math.sqrt(width))} makes ${figure(scores[best])}; e to the power of it, ` +
    `over the sum of all, ${figure(softmax[best], 3)}.`;
  const large = order.slice(0, SHOWN_TERMS).filter((place) => softmax[place] >= 0.001);
  const terms = large.map((place) => `${figure(softmax[place], 3)} · v(${spoken(tokens[place])})`);
  byId("how-sum").textContent = `${terms.join(" + ")} + … =`;
  byId("how-output").replaceChildren(vectorStrip(output, "The output"));
  const lengths = large.map((place) => `|v(${spoken(tokens[place])})| = ${figure(values[place])}`);
  byId("how-values").textContent = lengths.join(", ");
}

const isPad = (token) => token === "<pad>";
const spoken = (token) => (isPad(token) ? "padding" : token);

// Tokens in their order, those of the padding as one.
function shownTokens(tokens) {
  const shown = tokens.flatMap((name, place) => (isPad(name) ? [] : [{ name, places: [place] }]));
  const padding = tokens.flatMap((name, place) => (isPad(name) ? [place] : []));
  return padding.length > 0 ? [...shown, { name: `padding ×${padding.length}`, places: padding }] : shown;
}

function showTokens(tokens, softmax) {
  byId("how-tokens").replaceChildren(
    ...shownTokens(tokens).map(({ name, places }) => {
      const share = places.reduce((sum, place) => sum + softmax[place], 0);
      const chip = make("li", {
        textContent: name,
        dir: "auto",
        title: `${(100 * share).toFixed(1)} % of this patch's attention`,
      });
      chip.style.setProperty("--share", Math.sqrt(share).toFixed(3));
      return chip;
    }),
  );
  byId("how-count").textContent = `${tokens.length} positions`;
}

const shape = (sizes) => make("td", { textContent: `[${sizes.join(", ")}]` });

function showShapes(patches, words) {
  byId("how-site").textContent = words.site.replace(/\.attn2$/, "");
  byId("how-shapes").replaceChildren(
    ...Object.entries(words.shapes).map(([name, sizes]) =>
      make("tr", {}, make("th", { scope: "row", textContent: name }), shape(patches.shapes[name]), shape(sizes)),
    ),
  );
}

// The same run with a part of it broken, beside the whole one.
function startBreaking() {
  const form = byId("break-form");
  const runner = new Runner(form);
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    if (runner.busy) return;
    const { run, picture, map, index } = desk;
    const broken = form.elements.broken.value;
    const body = {
      ...run.body,
      broken,
      previews: false,
      settings: { ...run.body.settings, seed: picture.settings.seed, count: 1 },
    };
    if (broken === "silence_site") body.site = byId("lens-layer").value;
    const made = await runner.attempt(async (signal) => {
      const heard = { step: ({ step, steps }) => runner.say(`Step ${step} of ${steps}.`) };
      return gather(await runJob(body, heard, signal), body);
    });
    if (made === null || desk.run !== run || desk.index !== index) return;
    runner.say("");
    const title = form.querySelector("input:checked").closest("label").textContent.trim();
    await showPair(
      byId("break-result"),
      { title: "Whole", source: picture.source, map },
      { title, source: made.pictures[0].source, map: made.maps[0] ?? null },
    );
    announce("The broken picture stands beside the whole one.");
    await remember(made);
  });
}

// The lines of code of each part, from the server, as they run.
async function showCode() {
  let code;
  try {
    code = await getJson("v1/code");
  } catch {
    return; // the page is of use without
  }
  const fill = (fold) => fold.replaceChildren(...excerpt(code[fold.dataset.code]));
  const folds = [...document.querySelectorAll("details[data-code]")].filter((fold) => code[fold.dataset.code]);
  for (const fold of folds) {
    fill(fold);
    fold.hidden = false;
  }
  byId("break-form").addEventListener("change", ({ target }) => {
    byId("break-code").dataset.code = target.value;
    fill(byId("break-code"));
  });
}

function excerpt({ name, file, line, source, marked }) {
  const lines = source.split("\n").map((text, place) => {
    const element = make(marked.includes(line + place) ? "mark" : "span", { textContent: text || " " });
    element.dataset.number = line + place;
    return element;
  });
  return [
    make("summary", { textContent: `The code: ${name}, line ${marked[0]} of ${file}` }),
    make("pre", { tabIndex: 0 }, make("code", {}, ...lines)),
  ];
}
