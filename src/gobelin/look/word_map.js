// The word-map element: a prompt and its image, in which words light up what they painted and patches rank their words.
//
// Its data is the object that gobelin.look.page.word_map_data makes, given as the property `data` or as JSON in a child
// script of the type application/json. Nothing is loaded, and nothing outside the element is touched.
//
// A page around it may put controls under the image (slot "controls") and a remark beside it (slot "note"). It hears
// of what is pointed at by the event `word-map-point`, and points itself by `light(word, patch)`.
// A page that paints may also give `images`, one for each place of the slider, and data again and again while it paints.

const STYLE = `
  :host { --ink: #1f2328; --pale: #5f6773; --linen: #d8d5cc; --paper: #fbfaf7; --thread: #b3204d; --blush: #f3e3e7;
    --bare: #efece4; display: block; container-type: inline-size; background: var(--paper); color: var(--ink);
    font: 16px/1.5 system-ui, sans-serif; color-scheme: light dark; }
  @media (prefers-color-scheme: dark) {
    :host { --ink: #ebe8e1; --pale: #a5abb5; --linen: #43474d; --paper: #17191c; --thread: #f2789b; --blush: #40232d;
      --bare: #2a2d31; }
  }
  * { box-sizing: border-box; }
  [hidden] { display: none !important; }
  .map { max-width: var(--word-map-width, 980px); margin: auto; padding: var(--word-map-padding, 20px); display: grid;
    gap: 18px 36px; grid-template-columns: minmax(0, var(--word-map-picture, 600px)) minmax(220px, 1fr);
    align-items: start; }
  h2 { grid-column: 1 / -1; margin: 0; margin-inline-start: -4px; font-size: 26px; font-weight: 500; line-height: 1.7;
    overflow-wrap: anywhere; }
  h2.long { font-size: 18px; }
  h2 button { font: inherit; color: inherit; background: none; border: 0; border-bottom: 3px solid var(--linen);
    padding: 0 3px; margin: 0 1px; cursor: pointer; border-radius: 3px 3px 0 0; text-align: inherit; }
  h2 button:hover, h2 button:focus-visible, h2 button[aria-pressed="true"]:not(.pinned) { border-color: var(--thread);
    background: var(--blush); }
  h2 button.pinned { border-color: var(--pin); background: color-mix(in srgb, var(--pin) 22%, transparent); }
  :focus-visible { outline: 2px solid var(--thread); outline-offset: 2px; }
  figure { margin: 0; }
  canvas { width: 100%; display: block; border: 1px solid var(--linen); cursor: crosshair; touch-action: manipulation; }
  figcaption { margin-top: 10px; font-size: 15px; min-height: 45px; }
  .scale, .legend { display: flex; gap: 8px; align-items: center; margin-top: 4px; font-size: 13px; color: var(--pale);
    font-variant-numeric: tabular-nums; white-space: nowrap; min-height: 24px; }
  .scale i { flex: 1; max-width: 220px; height: 10px; }
  .legend { flex-wrap: wrap; }
  .legend button { font: inherit; color: var(--ink); background: none; border: 1px solid var(--linen);
    border-radius: 12px; padding: 1px 9px; min-height: 24px; cursor: pointer; }
  .legend button::before { content: ""; display: inline-block; width: 10px; height: 10px; margin-inline-end: 6px;
    border-radius: 50%; background: var(--pin); box-shadow: 0 0 0 1px var(--pale); }
  .legend button::after { content: " ×" / ""; color: var(--pale); }
  h3 { font-size: 16px; font-weight: 600; margin: 0; }
  .unit { margin: 0 0 10px; font-size: 13px; color: var(--pale); }
  ol { list-style: none; margin: 0; padding: 0; }
  li { display: grid; grid-template-columns: minmax(0, 5.5em) 1fr 3.6em; gap: 10px; align-items: center;
    font-size: 15px; min-height: 28px; }
  li span { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
  li span:last-child { text-align: end; color: var(--pale); font-variant-numeric: tabular-nums; }
  .bar { background: var(--bare); height: 10px; }
  .bar i { display: block; height: 100%; background: var(--thread); }
  label { display: block; margin-top: 6px; font-size: 15px; }
  input { width: 100%; margin: 6px 0 0; accent-color: var(--thread); }
  @container (max-width: 640px) {
    .map { grid-template-columns: minmax(0, 1fr); padding: var(--word-map-padding, 14px); }
    h2 { font-size: 22px; }
  }
`;

const SKELETON = `
  <style>${STYLE}</style>
  <div class="map">
    <h2 dir="auto"></h2>
    <figure>
      <canvas tabindex="0" role="application" aria-label="The image. Arrow keys move over its patches."></canvas>
      <figcaption aria-live="polite"></figcaption>
      <div class="scale" aria-hidden="true"><span></span><i></i><span></span></div>
      <div class="legend" role="group" aria-label="Pinned words" hidden></div>
      <label hidden>Steps: <span></span><input type="range" min="0" value="0" aria-label="Step"></label>
      <slot name="controls"></slot>
    </figure>
    <section><h3></h3><p class="unit"></p><ol></ol><slot name="note"></slot></section>
  </div>
`;

const INVITATION =
  "Point at a word to see what it painted, or at the image to see the words behind it. Press a word to pin it.";
const PINS = ["#e69f00", "#56b4e9", "#009e73", "#f0e442", "#cc79a7", "#d55e00", "#0072b2"]; // Okabe and Ito's
const LONG = 140; // letters of a prompt that is written smaller
const SIDE = 1024; // pixels of the canvas' longer side, or about: sharp on a dense screen too
const PIXELS_SHOW = 6; // times: an image enlarged more shows its pixels, which smoothing would only blur
const EVEN = 1e-5; // shares that differ by less are rounding

const percent = (share) => `${(100 * share).toFixed(share < 0.0995 ? 1 : 0)} %`;
const bytes = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
const descending = (values) => values.map((_, place) => place).toSorted((a, b) => values[b] - values[a]);

function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

// The data of a word map unpacked: words' shares of the patches' attention, by step; step 0 is the mean of the steps.
export class Shares {
  #levels;

  constructor({ shares, tops, rows, columns }) {
    this.#levels = bytes(shares); // a byte is in units of the word's greatest share over all patches and steps
    this.tops = tops;
    this.patches = rows * columns;
  }

  at(step, word, patch) {
    return (this.#levels[(step * this.tops.length + word) * this.patches + patch] / 255) * this.tops[word];
  }

  map(step, word) {
    return Array.from({ length: this.patches }, (_, patch) => this.at(step, word, patch));
  }

  // The same from 0 to 1, its least share to its greatest; an even map is all 0.
  values(step, word) {
    const shares = this.map(step, word);
    const [low, high] = [Math.min(...shares), Math.max(...shares)];
    return shares.map((share) => (high - low > EVEN ? (share - low) / (high - low) : 0));
  }
}

class WordMap extends HTMLElement {
  #data = null;
  #word = null; // the number of the word that is lit up
  #pins = new Map(); // words that stay lit up, by number, with their colours
  #patch = null; // the number of the patch that is pointed at
  #step = 0;
  #keyed = false; // whether the patch was reached by keys
  #buttons = [];
  #ends = null;
  #parts = {};
  #shares = null;
  #colours = null;
  #image = new Image();
  #grey = document.createElement("canvas");
  #heat = document.createElement("canvas");

  constructor() {
    super();
    const root = this.attachShadow({ mode: "open" });
    root.innerHTML = SKELETON;
    for (const [name, selector] of Object.entries({
      prompt: "h2",
      legend: ".legend",
      canvas: "canvas",
      caption: "figcaption",
      scale: ".scale",
      heading: "h3",
      unit: ".unit",
      list: "ol",
      label: "label",
      output: "label span",
      slider: "input",
    })) {
      this.#parts[name] = root.querySelector(selector);
    }
    this.#listen();
  }

  connectedCallback() {
    this.#ends = new AbortController();
    document.addEventListener("keydown", (event) => event.key === "Escape" && this.#clear(), {
      signal: this.#ends.signal,
    });
    if (Object.hasOwn(this, "data")) {
      const given = this.data; // set before the element was defined
      delete this.data;
      this.data = given;
    } else if (this.#data === null) {
      this.#read();
    }
  }

  disconnectedCallback() {
    this.#ends.abort();
  }

  get data() {
    return this.#data;
  }

  // Other maps of the same words, of one layer say, leave lit what is.
  set data(data) {
    const last = this.#data;
    if (last?.words.join("\n") !== data.words.join("\n")) {
      this.#word = null;
      this.#pins.clear();
    }
    if (last?.rows !== data.rows || last.columns !== data.columns) this.#patch = null;
    this.#step = last?.steps === data.steps ? this.#step : 0;
    this.#data = data;
    this.#shares = new Shares(data);
    this.#colours = bytes(data.colours);
    if (JSON.stringify(last?.text) !== JSON.stringify(data.text)) this.#spell();
    this.#offerSteps();
    [this.#heat.width, this.#heat.height] = [data.columns, data.rows];
    this.#parts.unit.textContent = data.weighted
      ? "How likely a patch shows it, by its attention"
      : `Shares of attention${data.sharp ? ", sharpened" : ""}`;
    this.#parts.scale.querySelector("i").style.background = this.#gradient();
    this.#parts.canvas.style.aspectRatio = `${data.columns} / ${data.rows}`; // as the image's, until that is there
    this.#showImage();
    this.#paint();
  }

  #showImage() {
    this.#image.src = this.#data.images?.[this.#step] ?? this.#data.image;
  }

  get shares() {
    return this.#shares;
  }

  // Light up a word and frame a patch, by their numbers or null, as another map does that is shown beside this one.
  light(word, patch = null) {
    [this.#word, this.#patch, this.#keyed] = [word, patch, false];
    this.#paint();
  }

  // The JSON within the element; a page that is still being read may not have come to it.
  #read() {
    const json = this.querySelector('script[type="application/json"]');
    if (json) {
      this.data = JSON.parse(json.textContent);
    } else if (document.readyState === "loading") {
      document.addEventListener("DOMContentLoaded", () => this.#data ?? this.#read(), { signal: this.#ends.signal });
    }
  }

  #listen() {
    const { prompt, canvas, slider } = this.#parts;
    prompt.addEventListener("mouseleave", () => {
      const focused = this.shadowRoot.activeElement;
      this.#show(prompt.contains(focused) && focused.matches(":focus-visible") ? this.#buttons.indexOf(focused) : null);
    });
    for (const kind of ["pointermove", "pointerdown"]) canvas.addEventListener(kind, (event) => this.#point(event));
    canvas.addEventListener("pointerleave", (event) => {
      if (event.pointerType !== "mouse") return;
      this.#patch = null;
      this.#tell();
    });
    canvas.addEventListener("keydown", (event) => this.#move(event));
    slider.addEventListener("input", () => {
      this.#step = Number(slider.value);
      this.#nameStep();
      this.#showImage();
      this.#tell();
    });
    this.#image.addEventListener("load", () => this.#enlarge());
  }

  // The prompt, each word of it a button.
  #spell() {
    this.#buttons = [];
    const pieces = this.#data.text.map(([text, word]) => {
      if (word === null) return text;
      const button = make("button", { type: "button", textContent: text });
      let lit = true; // when it is pressed: by a mouse or a key it is, by a finger the first time not
      button.addEventListener("pointerdown", (event) => {
        lit = event.pointerType === "mouse" || this.#word === word || this.#pins.has(word);
      });
      for (const kind of ["mouseenter", "focus"]) button.addEventListener(kind, () => this.#show(word));
      button.addEventListener("click", () => {
        if (lit) this.#pin(word);
        else this.#show(word);
        lit = true;
      });
      this.#buttons[word] = button;
      return button;
    });
    this.#parts.prompt.replaceChildren(...pieces);
    this.#parts.prompt.classList.toggle("long", this.#data.text.map(([text]) => text).join("").length > LONG);
  }

  // Pin a word, or take its pin out; several pinned ones are shown together as soon as there are two.
  #pin(word) {
    if (!this.#pins.delete(word)) {
      const used = [...this.#pins.values()];
      this.#pins.set(word, PINS.find((colour) => !used.includes(colour)) ?? PINS[used.length % PINS.length]);
    }
    this.#show(this.#pins.size > 1 ? null : this.#pins.has(word) ? word : null);
  }

  #offerSteps() {
    const { label, slider } = this.#parts;
    label.hidden = this.#data.steps === 1;
    [slider.max, slider.value] = [this.#data.steps - 1, this.#step];
    this.#nameStep();
  }

  #nameStep() {
    this.#parts.output.textContent = this.#step === 0 ? "all" : `${this.#step} of ${this.#data.steps - 1}`;
  }

  #gradient() {
    const stops = Array.from({ length: 17 }, (_, n) => this.#colour(n / 16));
    return `linear-gradient(to right, ${stops.map((stop) => `rgb(${stop.join(" ")})`).join(", ")})`;
  }

  #colour(value) {
    const level = 3 * Math.round(value * 255);
    return this.#colours.subarray(level, level + 3);
  }

  // The words of the prompt, and those beside it: not those of a negative prompt, nor BOS, EOS and padding.
  get #ranked() {
    return this.#data.words.slice(0, this.#data.ranked);
  }

  #enlarge() {
    const { canvas } = this.#parts;
    const scale = Math.max(1, Math.round(SIDE / Math.max(this.#image.width, this.#image.height)));
    [canvas.width, canvas.height] = [this.#image.width * scale, this.#image.height * scale];
    canvas.style.aspectRatio = "";
    this.#grey.width = 0; // of the image before
    this.#paint();
  }

  // The image in dim grey, made when a word is first lit up: it takes as long as a step of painting.
  #dimmed() {
    const { canvas } = this.#parts;
    if (this.#grey.width) return this.#grey;
    [this.#grey.width, this.#grey.height] = [canvas.width, canvas.height];
    const dim = this.#grey.getContext("2d", { willReadFrequently: true });
    dim.imageSmoothingEnabled = canvas.width / this.#image.width < PIXELS_SHOW;
    dim.drawImage(this.#image, 0, 0, canvas.width, canvas.height);
    const pixels = dim.getImageData(0, 0, canvas.width, canvas.height);
    const levels = pixels.data;
    for (let i = 0; i < levels.length; i += 4) {
      levels.fill(40 + 0.6 * (0.299 * levels[i] + 0.587 * levels[i + 1] + 0.114 * levels[i + 2]), i, i + 3);
    }
    dim.putImageData(pixels, 0, 0);
    return this.#grey;
  }

  #show(word) {
    this.#word = word;
    this.#tell();
  }

  #clear() {
    this.shadowRoot.activeElement?.blur();
    this.#word = this.#patch = null;
    this.#pins.clear();
    this.#tell();
  }

  // Paint, and say what is pointed at to whoever listens.
  #tell() {
    this.#paint();
    const detail = { word: this.#word, patch: this.#patch, step: this.#step, pins: [...this.#pins.keys()] };
    this.dispatchEvent(new CustomEvent("word-map-point", { detail, bubbles: true }));
  }

  #point(event) {
    const { rows, columns } = this.#data;
    const box = this.#parts.canvas.getBoundingClientRect();
    const column = Math.floor(((event.clientX - box.left) / box.width) * columns);
    const row = Math.floor(((event.clientY - box.top) / box.height) * rows);
    this.#keyed = false;
    this.#patch = Math.min(rows - 1, Math.max(0, row)) * columns + Math.min(columns - 1, Math.max(0, column));
    this.#tell();
  }

  #move(event) {
    const { rows, columns } = this.#data;
    const moves = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
    if (!(event.key in moves)) return;
    event.preventDefault();
    this.#keyed = true;
    let [row, column] = [Math.floor(rows / 2), Math.floor(columns / 2)]; // where keys begin
    if (this.#patch !== null) {
      const [down, right] = moves[event.key];
      row = Math.min(rows - 1, Math.max(0, Math.floor(this.#patch / columns) + down));
      column = Math.min(columns - 1, Math.max(0, (this.#patch % columns) + right));
    }
    this.#patch = row * columns + column;
    this.#tell();
  }

  #paint() {
    if (this.#data === null) return;
    this.#mark();
    this.#rank();
    if (!this.#image.complete || this.#image.naturalWidth === 0) return;
    const { canvas, caption, scale, legend } = this.#parts;
    const context = canvas.getContext("2d");
    const plain = this.#word === null && this.#pins.size === 0;
    context.imageSmoothingEnabled = !plain || canvas.width / this.#image.width < PIXELS_SHOW;
    context.imageSmoothingQuality = "high";
    context.drawImage(plain ? this.#image : this.#dimmed(), 0, 0, canvas.width, canvas.height);
    scale.style.visibility = this.#word === null ? "hidden" : "visible";
    legend.hidden = this.#pins.size === 0;
    if (plain) {
      caption.textContent = INVITATION;
    } else if (this.#word === null) {
      this.#overlayPins(context);
      caption.textContent = `Pinned: ${[...this.#pins.keys()].map((word) => this.#data.words[word]).join(", ")}`;
    } else {
      const [low, high] = this.#overlay(context);
      const [least, , most] = scale.children;
      [least.textContent, most.textContent] = [percent(low), percent(high)];
      const what = this.#word < this.#data.weighted ? "likely" : `of a patch's attention${this.#data.sharp ? ", sharpened" : ""}`;
      caption.textContent = `“${this.#data.words[this.#word]}”: up to ${percent(high)} ${what}, at least ${percent(low)}`;
    }
    if (this.#patch !== null) this.#frame(context);
    if (this.#patch !== null && this.#keyed) caption.textContent = this.#spoken();
  }

  // Which words are lit up or pinned, on their buttons and in the legend.
  #mark() {
    this.#buttons.forEach((button, word) => {
      button.setAttribute("aria-pressed", String(word === this.#word || this.#pins.has(word)));
      button.classList.toggle("pinned", this.#pins.has(word));
      button.style.setProperty("--pin", this.#pins.get(word) ?? "transparent");
    });
    const { legend } = this.#parts;
    const shown = [...this.#pins.keys()].join();
    if (legend.dataset.shown === shown) return; // a button that is replaced loses the focus
    legend.dataset.shown = shown;
    legend.replaceChildren(
      ...[...this.#pins].map(([word, colour]) => {
        const name = this.#data.words[word];
        const button = make("button", { type: "button", textContent: name, ariaLabel: `Unpin ${name}` });
        button.style.setProperty("--pin", colour);
        button.addEventListener("click", () => this.#pin(word));
        return button;
      }),
    );
  }

  // The word's map over the image, from its least to its greatest share.
  #overlay(context) {
    const values = this.#shares.values(this.#step, this.#word);
    this.#drape(context, (patch) => [...this.#colour(values[patch]), 0.25 + 0.75 * values[patch] ** 0.7]);
    const shares = this.#shares.map(this.#step, this.#word);
    return [Math.min(...shares), Math.max(...shares)];
  }

  // The pinned words' maps, each in its colour; where several are, their colours mixed as their shares are.
  #overlayPins(context) {
    const maps = [...this.#pins].map(([word, colour]) => ({
      values: this.#shares.values(this.#step, word),
      colour: [1, 3, 5].map((place) => parseInt(colour.slice(place, place + 2), 16)),
    }));
    this.#drape(context, (patch) => {
      const total = maps.reduce((sum, { values }) => sum + values[patch], 0);
      const mixed = [0, 1, 2].map((channel) =>
        maps.reduce((sum, { values, colour }) => sum + (colour[channel] * values[patch]) / (total || 1), 0),
      );
      return [...mixed, 0.9 * Math.max(...maps.map(({ values }) => values[patch])) ** 0.7];
    });
  }

  // A colour [red, green, blue, alpha] for each patch, over the image.
  #drape(context, colourOf) {
    const layer = this.#heat.getContext("2d");
    const pixels = layer.createImageData(this.#heat.width, this.#heat.height);
    for (let patch = 0; patch < this.#shares.patches; patch += 1) {
      const [red, green, blue, alpha] = colourOf(patch);
      pixels.data.set([red, green, blue, 255 * alpha], 4 * patch);
    }
    layer.putImageData(pixels, 0, 0);
    context.drawImage(this.#heat, 0, 0, context.canvas.width, context.canvas.height);
  }

  #frame(context) {
    const { rows, columns } = this.#data;
    const [width, height] = [context.canvas.width / columns, context.canvas.height / rows];
    const corner = [(this.#patch % columns) * width, Math.floor(this.#patch / columns) * height];
    for (const [line, colour] of [
      [6, "#fff"],
      [2, "#000"],
    ]) {
      [context.lineWidth, context.strokeStyle] = [line, colour];
      context.strokeRect(...corner, width, height);
    }
  }

  // For whoever moves by keys and may not see the list: the patch and its first words.
  #spoken() {
    const { columns } = this.#data;
    const words = this.#ranked;
    const place = `row ${Math.floor(this.#patch / columns) + 1}, column ${(this.#patch % columns) + 1}`;
    const shares = words.map((_, word) => this.#shares.at(this.#step, word, this.#patch));
    const first = descending(shares).slice(0, 3);
    return `${place}: ${first.map((word) => `${words[word]} ${percent(shares[word])}`).join(", ")}`;
  }

  #rank() {
    const words = this.#ranked;
    const means = words.map((_, word) =>
      this.#patch === null
        ? this.#shares.map(this.#step, word).reduce((sum, share) => sum + share, 0) / this.#shares.patches
        : this.#shares.at(this.#step, word, this.#patch),
    );
    const order = descending(means);
    const most = means[order[0]] || 1;
    this.#parts.heading.textContent = this.#patch === null ? "Words, over the whole image" : "Words behind this patch";
    this.#parts.list.replaceChildren(
      ...order.map((word) => {
        const name = make("span", { textContent: words[word], title: words[word], dir: "auto" });
        const fill = make("i");
        fill.style.width = `${(100 * means[word]) / most}%`;
        if (this.#pins.has(word)) fill.style.background = this.#pins.get(word);
        const figure = make("span", { textContent: percent(means[word]) });
        return make("li", {}, name, make("div", { className: "bar" }, fill), figure);
      }),
    );
  }
}

// A notebook brings this file with every result.
if (!customElements.get("word-map")) customElements.define("word-map", WordMap);
