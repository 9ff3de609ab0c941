// Changing a picture: other words, words that weigh more or less, places for words, a part painted over.

import { announce, button, byId, grow, make, phrasesOf, sendOnEnter, wordsOf } from "./elements.js";
import { runJob } from "./client.js";
import { desk, gather, isRepeatable } from "./desk.js";
import { MaskBoard, RegionBoard } from "./drawing.js";
import { remember } from "./gallery.js";
import { showPair } from "./pair.js";
import { pickImage } from "./photo.js";
import { Runner } from "./runner.js";

const MOST_WEIGHT = 3; // times; at 0 a word is suppressed
const NOT_SENT = new Set(["init_image", "mask", "strength", "count", "width", "height"]); // of what painted a picture

export function startChange() {
  const form = byId("change-form");
  const runner = new Runner(form);
  const source = new Source();
  const panels = {
    words: new Words(source),
    weights: new Weights(source),
    places: new Places(source),
    brush: new Brush(source),
  };
  const status = byId("change-progress");
  const way = () => form.elements.way.value;
  const choose = () => {
    for (const name of Object.keys(panels)) byId(`change-${name}`).hidden = name !== way();
  };
  for (const radio of form.elements.way) radio.addEventListener("change", choose);
  choose();

  source.addEventListener("change", () => {
    for (const panel of Object.values(panels)) panel.renew();
    byId("change-result").replaceChildren();
  });
  let isStale = false; // a slider was let go while the last one's picture was still being painted
  byId("change-weights").addEventListener("change", () => {
    if (runner.busy) isStale = true;
    else form.requestSubmit();
  });

  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    if (runner.busy) return;
    const refused = source.refusal ?? panels[way()].refusal;
    if (refused) {
      runner.say(refused, true);
      return;
    }
    isStale = false;
    const body = panels[way()].body();
    const before = source.shown;
    const run = await runner.attempt(async (signal) => {
      const heard = {
        waiting: (seconds) => runner.say(`The server is busy. Trying again in ${seconds} s.`),
        queued: ({ position }) => position > 1 && runner.say(`${position - 1} before this one.`),
        started: ({ steps }) => {
          [status.max, status.value] = [steps, 0];
          status.style.visibility = "visible";
        },
        step: ({ step, steps }) => {
          [status.max, status.value] = [steps, step];
        },
      };
      return gather(await runJob(body, heard, signal), body);
    });
    status.style.visibility = "hidden";
    if (run === null) return;
    runner.say("");
    await show(before, run);
    announce("The changed picture stands beside the first one.");
    await remember(run);
    if (isStale && way() === "weights") form.requestSubmit();
  });

  desk.addEventListener("run", async ({ detail }) => {
    const { run } = desk;
    if (run.kind === "look") return;
    const last = run.pictures.length - 1;
    source.take({ run, index: run.kind === "edit" ? last : desk.index });
    if (run.kind === "edit" && !detail.fresh) await show(null, run);
  });
}

// Put what was and what became side by side; of an edit both are in its run.
async function show(before, run) {
  const isEdit = run.kind === "edit";
  const first = isEdit ? { source: run.pictures[0].source, map: run.maps[0] } : before;
  const last = isEdit ? 1 : 0;
  const keep = button("Go on from this one", () => {
    desk.show(isEdit ? single(run) : run, 0, true);
    byId("change-heading").focus();
  });
  await showPair(
    byId("change-result"),
    { title: "Before", ...first },
    { title: "After", source: run.pictures[last].source, map: run.maps[last] ?? null, actions: [keep] },
  );
}

// The changed picture of an edit, as a run of its own.
const single = (run) => ({
  ...run,
  kind: "paint",
  prompt: run.to,
  to: null,
  pictures: [run.pictures[1]],
  maps: [run.maps[1]],
  offset: 1,
});

// What is changed: the picture on the desk, or one of one's own.
class Source extends EventTarget {
  picture = null;
  map = null;
  own = null; // the data URL of a picture that no settings paint again: one's own, or one that was changed

  constructor() {
    super();
    this.picker = pickImage(byId("change-file"), (source) => {
      [this.own, this.map] = [source, null];
      this.picture = { source, settings: {} };
      this.dispatchEvent(new Event("change"));
    });
    byId("change-prompt").addEventListener("input", () => this.dispatchEvent(new Event("words")));
    grow(byId("change-prompt"));
  }

  take({ run, index }) {
    this.picture = run.pictures[index];
    this.own = isRepeatable(run) ? null : this.picture.source;
    this.map = run.maps[index] ?? null;
    byId("change-prompt").value = run.kind === "edit" && index > 0 ? run.to : run.prompt;
    this.picker.show(this.picture.source, false);
    this.dispatchEvent(new Event("change"));
  }

  get prompt() {
    return byId("change-prompt").value;
  }

  get words() {
    return [...new Set(wordsOf(this.prompt))];
  }

  get shown() {
    return { source: this.picture.source, map: this.map };
  }

  get refusal() {
    if (!this.picture) return "There is no picture yet: paint one, or choose one of your own.";
    return this.prompt.trim() === "" ? "Say in a few words what the picture shows." : null;
  }

  // The settings that painted it, so that what is changed is the only difference.
  get settings() {
    const known = desk.info.settings.properties;
    const sent = Object.entries(this.picture.settings).filter(([name, value]) => {
      return name in known && !NOT_SENT.has(name) && value !== null && typeof value !== "object";
    });
    const { width, height } = this.picture;
    return { ...Object.fromEntries(sent), ...(this.own ? {} : { width, height }) };
  }
}

class Words {
  constructor(source) {
    this.source = source;
    grow(byId("change-to"));
    sendOnEnter(byId("change-to"));
  }

  renew() {
    byId("change-to").value = this.source.prompt;
  }

  get refusal() {
    const to = byId("change-to").value.trim();
    return to === "" || to === this.source.prompt.trim() ? "Change a word first: “red” to “green”, say." : null;
  }

  body() {
    const { own, prompt } = this.source;
    const settings = { ...this.source.settings, ...(own ? { init_image: own } : {}) };
    return { kind: "edit", prompt, to: byId("change-to").value, settings };
  }
}

// Ways that paint the same noise again need a picture that was painted.
class Repainted {
  constructor(source) {
    this.source = source;
    source.addEventListener("words", () => this.renew());
  }

  get refusal() {
    return this.source.own
      ? "This needs a picture that was painted from noise: in this one change words, or a part."
      : null;
  }

  body() {
    const { prompt, settings } = this.source;
    return { kind: "paint", prompt, settings, controls: this.controls(), trace: true, previews: false };
  }
}

const percent = (value) => `${Math.round(100 * value)} %`;

class Weights extends Repainted {
  #weights = new Map();

  renew() {
    this.#weights.clear();
    byId("weight-sliders").replaceChildren(...this.source.words.map((word) => this.#slider(word)));
  }

  get refusal() {
    return super.refusal ?? (this.#weights.size === 0 ? "Move a word's slider first." : null);
  }

  controls() {
    const weights = [...this.#weights];
    const moved = Object.fromEntries(weights.filter(([, weight]) => weight > 0));
    const gone = weights.filter(([, weight]) => weight === 0).map(([word]) => ({ kind: "suppress", word }));
    return Object.keys(moved).length > 0 ? [{ kind: "reweight", words: moved }, ...gone] : gone;
  }

  #slider(word) {
    const input = make("input", { type: "range", min: 0, max: MOST_WEIGHT, step: 0.1, value: 1 });
    const output = make("output", { textContent: "1×" });
    input.addEventListener("input", () => {
      const weight = Number(input.value);
      output.textContent = weight === 0 ? "not at all" : `${weight}×`;
      input.setAttribute("aria-valuetext", output.textContent);
      if (weight === 1) this.#weights.delete(word);
      else this.#weights.set(word, weight);
    });
    return make("label", {}, make("span", { textContent: word, dir: "auto" }), input, output);
  }
}

class Places extends Repainted {
  #board = new RegionBoard(() => this.#list());

  constructor(source) {
    super(source);
    byId("places-board").append(this.#board.canvas);
    byId("places-clear").addEventListener("click", () => this.#board.clear());
  }

  renew() {
    const phrases = phrasesOf(this.source.prompt);
    this.#board.word = phrases.at(-1) ?? null;
    byId("places-words").replaceChildren(
      ...phrases.map((phrase) => {
        const checked = phrase === this.#board.word;
        const radio = make("input", { type: "radio", name: "place-word", value: phrase, checked });
        radio.addEventListener("change", () => {
          this.#board.word = phrase;
        });
        return make("label", { className: "choice" }, radio, make("span", { textContent: phrase, dir: "auto" }));
      }),
    );
    if (this.source.picture) this.#board.show(this.source.picture.source);
  }

  get refusal() {
    return super.refusal ?? (this.#board.regions.size === 0 ? "Choose words, and draw a box for them." : null);
  }

  controls() {
    const boxes = [...this.#board.regions].map(([word, box]) => [word, box.map((value) => Number(value.toFixed(3)))]);
    return [{ kind: "regions", regions: Object.fromEntries(boxes) }];
  }

  #list() {
    byId("places-list").replaceChildren(
      ...[...this.#board.regions].map(([word, [left, top, right, bottom]]) => {
        const place = `${percent(left)} to ${percent(right)} across, ${percent(top)} to ${percent(bottom)} down`;
        const remove = button("remove", () => this.#board.remove(word), { ariaLabel: `Remove the box of ${word}` });
        return make("li", {}, make("strong", { textContent: word, dir: "auto" }), ` ${place} `, remove);
      }),
    );
  }
}

class Brush {
  #board;

  constructor(source) {
    this.source = source;
    this.#board = new MaskBoard(() => {
      const empty = this.#board.isEmpty;
      byId("brush-hint").textContent = empty
        ? "Nothing is covered: all of the picture is painted anew, as far as the strength says."
        : "What is covered is painted anew; no other pixel changes.";
    });
    byId("brush-board").append(this.#board.canvas);
    byId("brush-clear").addEventListener("click", () => this.#board.clear());
    byId("brush-size").addEventListener("input", ({ target }) => {
      this.#board.size = Number(target.value);
    });
    byId("brush-erase").addEventListener("change", ({ target }) => {
      this.#board.erasing = target.checked;
    });
    const strength = byId("brush-strength");
    strength.addEventListener("input", () => {
      byId("brush-strength-said").textContent = strength.value;
    });
    grow(byId("brush-prompt"));
    sendOnEnter(byId("brush-prompt"));
  }

  renew() {
    byId("brush-prompt").value = this.source.prompt;
    if (this.source.picture) this.#board.show(this.source.picture.source);
  }

  get refusal() {
    return byId("brush-prompt").value.trim() === "" ? "Say in a few words what to paint there." : null;
  }

  body() {
    const settings = { ...this.source.settings, init_image: this.source.picture.source };
    settings.strength = Number(byId("brush-strength").value);
    if (!this.#board.isEmpty) settings.mask = this.#board.dataUrl;
    return { kind: "paint", prompt: byId("brush-prompt").value, settings, trace: true, previews: false };
  }
}
