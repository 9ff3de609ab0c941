// The word-map element: a prompt and its image, in which words light up what they painted and patches rank their words.
//
// Its data is the object that gobelin.look.page.word_map_data makes, given as the property `data` or as JSON in a child
// script of the type application/json. Nothing is loaded, and nothing outside the element is touched.
//
// A page that paints may also give `images`, one for each place of the slider, and data again and again while it paints.

const STYLE = `
  :host { --ink: #1f2328; --pale: #5f6773; --linen: #d8d5cc; --paper: #fbfaf7; --thread: #b3204d; --blush: #f3e3e7;
    --bare: #efece4; display: block; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
  * { box-sizing: border-box; }
  [hidden] { display: none !important; }
  .map { max-width: 980px; margin: auto; padding: 20px; display: grid; gap: 18px 36px;
    grid-template-columns: minmax(0, 600px) minmax(240px, 1fr); align-items: start; }
  h2 { grid-column: 1 / -1; margin: 0; margin-inline-start: -4px; font-size: 26px; font-weight: 500; line-height: 1.7;
    overflow-wrap: anywhere; }
  h2 button { font: inherit; color: inherit; background: none; border: 0; border-bottom: 3px solid var(--linen);
    padding: 0 3px; margin: 0 1px; cursor: pointer; border-radius: 3px 3px 0 0; text-align: inherit; }
  h2 button:hover, h2 button:focus-visible, h2 button[aria-pressed="true"] { border-color: var(--thread);
    background: var(--blush); }
  :focus-visible { outline: 2px solid var(--thread); outline-offset: 2px; }
  figure { margin: 0; }
  canvas { width: 100%; display: block; border: 1px solid var(--linen); cursor: crosshair; touch-action: manipulation; }
  figcaption { margin-top: 10px; font-size: 15px; }
  .scale { display: flex; gap: 8px; align-items: center; margin-top: 4px; font-size: 13px; color: var(--pale);
    font-variant-numeric: tabular-nums; white-space: nowrap; height: 20px; }
  .scale i { flex: 1; max-width: 220px; height: 10px; }
  h3 { font-size: 16px; font-weight: 600; margin: 0; }
  .unit { margin: 0 0 10px; font-size: 13px; color: var(--pale); }
  ol { list-style: none; margin: 0; padding: 0; }
  li { display: grid; grid-template-columns: minmax(0, 5.5em) 1fr 3.6em; gap: 10px; align-items: center; font-size: 15px;
    min-height: 28px; }
  li span { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
  li span:last-child { text-align: right; color: var(--pale); font-variant-numeric: tabular-nums; }
  .bar { background: var(--bare); height: 10px; }
  .bar i { display: block; height: 100%; background: var(--thread); }
  label { display: block; margin-top: 6px; font-size: 15px; }
  input { width: 100%; margin: 6px 0 0; accent-color: var(--thread); }
  @media (max-width: 640px) {
    .map { grid-template-columns: minmax(0, 1fr); padding: 14px; }
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
      <label hidden>Steps: <span></span><input type="range" min="0" value="0" aria-label="Step"></label>
    </figure>
    <section><h3></h3><p class="unit"></p><ol></ol></section>
  </div>
`;

const INVITATION = "Point at a word to see what it painted, or at the image to see the words behind it.";
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

class WordMap extends HTMLElement {
  #data = null;
  #word = null; // the number of the word that is lit up
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

  // Other maps of the same words, as of the next step, leave lit what is.
  set data(data) {
    const isSame = JSON.stringify(this.#data?.text) === JSON.stringify(data.text);
    this.#data = data;
    this.#shares = bytes(data.shares);
    this.#colours = bytes(data.colours);
    this.#step = 0;
    if (!isSame) {
      this.#word = this.#patch = null;
      this.#spell();
    }
    this.#offerSteps();
    [this.#heat.width, this.#heat.height] = [data.columns, data.rows];
    this.#parts.unit.textContent = `Shares of attention${data.sharp ? ", sharpened" : ""}`;
    this.#parts.scale.querySelector("i").style.background = this.#gradient();
    this.#showImage();
  }

  #showImage() {
    this.#image.src = this.#data.images?.[this.#step] ?? this.#data.image;
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
      if (!prompt.contains(this.shadowRoot.activeElement)) this.#show(null);
    });
    for (const kind of ["pointermove", "pointerdown"]) canvas.addEventListener(kind, (event) => this.#point(event));
    canvas.addEventListener("pointerleave", (event) => {
      if (event.pointerType !== "mouse") return;
      this.#patch = null;
      this.#paint();
    });
    canvas.addEventListener("keydown", (event) => this.#move(event));
    slider.addEventListener("input", () => {
      this.#step = Number(slider.value);
      this.#nameStep();
      this.#showImage();
      this.#paint();
    });
    this.#image.addEventListener("load", () => this.#enlarge());
  }

  // The prompt, each word of it a button.
  #spell() {
    this.#buttons = [];
    const pieces = this.#data.text.map(([text, word]) => {
      if (word === null) return text;
      const button = make("button", { type: "button", textContent: text });
      for (const kind of ["mouseenter", "focus", "click"]) button.addEventListener(kind, () => this.#show(word));
      this.#buttons[word] = button;
      return button;
    });
    this.#parts.prompt.replaceChildren(...pieces);
  }

  #offerSteps() {
    const { label, slider } = this.#parts;
    label.hidden = this.#data.steps === 1;
    [slider.max, slider.value] = [this.#data.steps - 1, 0];
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

  // A word's share of a patch's attention: a byte of the word's greatest share over all patches and steps.
  #share(word, patch) {
    const { words, rows, columns, tops } = this.#data;
    return (this.#shares[(this.#step * words.length + word) * rows * columns + patch] / 255) * tops[word];
  }

  #all(word) {
    return Array.from({ length: this.#data.rows * this.#data.columns }, (_, patch) => this.#share(word, patch));
  }

  #enlarge() {
    const { canvas } = this.#parts;
    const scale = Math.max(1, Math.round(SIDE / Math.max(this.#image.width, this.#image.height)));
    [canvas.width, canvas.height] = [this.#image.width * scale, this.#image.height * scale];
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
    this.#paint();
  }

  #clear() {
    this.shadowRoot.activeElement?.blur();
    this.#word = this.#patch = null;
    this.#paint();
  }

  #point(event) {
    const { rows, columns } = this.#data;
    const box = this.#parts.canvas.getBoundingClientRect();
    const column = Math.floor(((event.clientX - box.left) / box.width) * columns);
    const row = Math.floor(((event.clientY - box.top) / box.height) * rows);
    this.#keyed = false;
    this.#patch =
      Math.min(rows - 1, Math.max(0, row)) * columns + Math.min(columns - 1, Math.max(0, column));
    this.#paint();
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
    this.#paint();
  }

  #paint() {
    if (!this.#image.complete || this.#data === null) return;
    const { canvas, caption, scale } = this.#parts;
    const context = canvas.getContext("2d");
    const enlarged = canvas.width / this.#image.width;
    context.imageSmoothingEnabled = this.#word !== null || enlarged < PIXELS_SHOW;
    context.imageSmoothingQuality = "high";
    context.drawImage(this.#word === null ? this.#image : this.#dimmed(), 0, 0, canvas.width, canvas.height);
    scale.style.visibility = this.#word === null ? "hidden" : "visible";
    if (this.#word === null) {
      caption.textContent = INVITATION;
    } else {
      const [low, high] = this.#overlay(context);
      const [least, , most] = scale.children;
      [least.textContent, most.textContent] = [percent(low), percent(high)];
      caption.textContent =
        `“${this.#data.words[this.#word]}”: up to ${percent(high)} of a patch's attention` +
        `${this.#data.sharp ? ", sharpened" : ""}, at least ${percent(low)}`;
    }
    if (this.#patch !== null) this.#frame(context);
    if (this.#patch !== null && this.#keyed) caption.textContent = this.#spoken();
    this.#buttons.forEach((button, word) => button.setAttribute("aria-pressed", String(word === this.#word)));
    this.#rank();
  }

  // The word's map over the image, from its least to its greatest share.
  #overlay(context) {
    const shares = this.#all(this.#word);
    const [low, high] = [Math.min(...shares), Math.max(...shares)];
    const layer = this.#heat.getContext("2d");
    const pixels = layer.createImageData(this.#heat.width, this.#heat.height);
    shares.forEach((share, patch) => {
      const value = high - low > EVEN ? (share - low) / (high - low) : 0;
      pixels.data.set(this.#colour(value), 4 * patch);
      pixels.data[4 * patch + 3] = 255 * (0.25 + 0.75 * value ** 0.7);
    });
    layer.putImageData(pixels, 0, 0);
    context.drawImage(this.#heat, 0, 0, context.canvas.width, context.canvas.height);
    return [low, high];
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
    const { words, columns } = this.#data;
    const place = `row ${Math.floor(this.#patch / columns) + 1}, column ${(this.#patch % columns) + 1}`;
    const shares = words.map((_, word) => this.#share(word, this.#patch));
    const first = descending(shares).slice(0, 3);
    return `${place}: ${first.map((word) => `${words[word]} ${percent(shares[word])}`).join(", ")}`;
  }

  #rank() {
    const { words, rows, columns } = this.#data;
    const means = words.map((_, word) =>
      this.#patch === null
        ? this.#all(word).reduce((sum, share) => sum + share, 0) / (rows * columns)
        : this.#share(word, this.#patch),
    );
    const order = descending(means);
    const most = means[order[0]] || 1;
    this.#parts.heading.textContent = this.#patch === null ? "Words, over the whole image" : "Words behind this patch";
    this.#parts.list.replaceChildren(
      ...order.map((word) => {
        const name = make("span", { textContent: words[word], title: words[word], dir: "auto" });
        const fill = make("i");
        fill.style.width = `${(100 * means[word]) / most}%`;
        const figure = make("span", { textContent: percent(means[word]) });
        return make("li", {}, name, make("div", { className: "bar" }, fill), figure);
      }),
    );
  }
}

// A notebook brings this file with every result.
if (!customElements.get("word-map")) customElements.define("word-map", WordMap);
