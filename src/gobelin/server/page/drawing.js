// Boards to draw on: boxes for words, and a mask painted with a brush; by mouse, finger or keys.

import { loadImage, make } from "./elements.js";
import { drawPicture, fitCanvas } from "./overlay.js";

const SIDE = 768; // pixels of a board's longer side
const COLOURS = ["#e69f00", "#56b4e9", "#009e73", "#f0e442", "#cc79a7", "#d55e00", "#0072b2"]; // as the word map's pins
const TINT = "#ff2fd0"; // of the mask: a colour that few pictures have
const NUDGE = 1 / 16; // of the picture, an arrow key
const LEAST = 1 / 32; // of the picture, the side of a box

const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
const within = (value) => Math.min(1, Math.max(0, value));

class Board {
  constructor(label) {
    this.canvas = make("canvas", { className: "board", tabIndex: 0, ariaLabel: label, width: SIDE, height: SIDE });
    this.canvas.setAttribute("role", "application");
    this.image = null;
    this.canvas.addEventListener("pointerdown", (event) => {
      if (!this.image || event.button !== 0) return;
      this.canvas.setPointerCapture(event.pointerId);
      this.down(this.#place(event));
    });
    this.canvas.addEventListener("pointermove", (event) => {
      if (!this.image) return;
      const place = this.#place(event);
      if (this.canvas.hasPointerCapture(event.pointerId)) this.drag(place);
      else this.hover(place);
    });
    this.canvas.addEventListener("keydown", (event) => {
      if (this.image && this.key(event)) event.preventDefault();
    });
  }

  async show(source) {
    this.image = await loadImage(source);
    fitCanvas(this.canvas, this.image, SIDE);
    this.clear();
  }

  #place({ clientX, clientY }) {
    const box = this.canvas.getBoundingClientRect();
    return [within((clientX - box.left) / box.width), within((clientY - box.top) / box.height)];
  }

  hover() {}

  background() {
    const context = this.canvas.getContext("2d");
    context.globalAlpha = 1;
    drawPicture(context, this.image);
    return context;
  }
}

// One box for a word, or for words that go together: drawn by dragging, moved by arrow keys, made larger and smaller by them with Shift.
export class RegionBoard extends Board {
  regions = new Map(); // word -> [left, top, right, bottom], fractions of the picture
  word = null;
  #from = null;

  constructor(onChange) {
    super(
      "Where the chosen words go. Drag a box; arrow keys move it, with Shift they change its size, Delete removes it.",
    );
    this.onChange = onChange;
  }

  colour(word) {
    return COLOURS[[...this.regions.keys()].indexOf(word) % COLOURS.length];
  }

  clear() {
    this.regions.clear();
    this.#changed();
  }

  remove(word) {
    this.regions.delete(word);
    this.#changed();
  }

  down(place) {
    this.#from = place;
  }

  drag([x, y]) {
    if (this.word === null) return;
    const [left, top] = this.#from;
    const box = [Math.min(left, x), Math.min(top, y), Math.max(left, x), Math.max(top, y)];
    if (box[2] - box[0] < LEAST || box[3] - box[1] < LEAST) return;
    this.regions.set(this.word, box);
    this.#changed();
  }

  key({ key, shiftKey }) {
    if (this.word === null) return false;
    if (key === "Delete" || key === "Backspace") {
      this.remove(this.word);
      return true;
    }
    if (!(key in ARROWS)) return false;
    const [right, down] = ARROWS[key].map((step) => step * NUDGE);
    const [x0, y0, x1, y1] = this.regions.get(this.word) ?? [0.25 - right, 0.25 - down, 0.75 - right, 0.75 - down];
    const far = [Math.max(x0 + NUDGE, Math.min(1, x1 + right)), Math.max(y0 + NUDGE, Math.min(1, y1 + down))];
    const shift = [Math.min(1 - x1, Math.max(-x0, right)), Math.min(1 - y1, Math.max(-y0, down))];
    const moved = [x0 + shift[0], y0 + shift[1], x1 + shift[0], y1 + shift[1]];
    this.regions.set(this.word, shiftKey ? [x0, y0, ...far] : moved);
    this.#changed();
    return true;
  }

  #changed() {
    if (this.image) this.#draw();
    this.onChange();
  }

  #draw() {
    const context = this.background();
    const { width, height } = this.canvas;
    context.font = "600 26px system-ui, sans-serif";
    context.textBaseline = "top";
    for (const [word, [left, top, right, bottom]] of this.regions) {
      const colour = this.colour(word);
      const box = [left * width, top * height, (right - left) * width, (bottom - top) * height];
      context.globalAlpha = 0.28;
      context.fillStyle = colour;
      context.fillRect(...box);
      context.globalAlpha = 1;
      context.lineWidth = 7;
      context.strokeStyle = "#000";
      context.strokeRect(...box);
      context.lineWidth = 4;
      context.strokeStyle = colour;
      context.strokeRect(...box);
      const span = context.measureText(word).width + 16;
      context.fillRect(box[0], box[1], span, 34);
      context.fillStyle = "#111";
      context.fillText(word, box[0] + 8, box[1] + 5);
    }
  }
}

// A mask painted over the picture: white where it is to be painted anew.
export class MaskBoard extends Board {
  size = 0.12; // of the picture's width
  erasing = false;
  #mask = make("canvas");
  #tint = make("canvas"); // the mask in colour
  #last = null;
  #at = [0.5, 0.5];

  constructor(onChange) {
    super("The mask. Drag to paint over what is to be made anew; arrow keys move the brush, Space paints.");
    this.onChange = onChange;
    this.canvas.addEventListener("pointerleave", () => this.image && this.#draw());
    this.canvas.addEventListener("blur", () => this.image && this.#draw());
  }

  clear() {
    this.#mask.getContext("2d", { willReadFrequently: true });
    [this.#mask.width, this.#mask.height] = [this.canvas.width, this.canvas.height];
    [this.#tint.width, this.#tint.height] = [this.canvas.width, this.canvas.height];
    this.#changed();
  }

  get isEmpty() {
    const { width, height } = this.#mask;
    const { data } = this.#mask.getContext("2d", { willReadFrequently: true }).getImageData(0, 0, width, height);
    for (let alpha = 3; alpha < data.length; alpha += 4) if (data[alpha] > 127) return false;
    return true;
  }

  // As a PNG of the picture's size, white on black.
  get dataUrl() {
    const canvas = make("canvas", { width: this.image.width, height: this.image.height });
    const context = canvas.getContext("2d");
    context.fillStyle = "#000";
    context.fillRect(0, 0, canvas.width, canvas.height);
    context.drawImage(this.#mask, 0, 0, canvas.width, canvas.height);
    return canvas.toDataURL("image/png");
  }

  down(place) {
    this.#last = place;
    this.#stroke(place);
  }

  drag(place) {
    this.#stroke(place);
  }

  hover(place) {
    this.#at = place;
    this.#draw(true);
  }

  key({ key }) {
    if (key === " ") {
      this.#last = this.#at;
      this.#stroke(this.#at);
      return true;
    }
    if (!(key in ARROWS)) return false;
    this.#at = this.#at.map((value, axis) => within(value + (ARROWS[key][axis] * NUDGE) / 2));
    this.#draw(true);
    return true;
  }

  #stroke(place) {
    const { width, height } = this.#mask;
    const context = this.#mask.getContext("2d");
    context.globalCompositeOperation = this.erasing ? "destination-out" : "source-over";
    context.strokeStyle = "#fff";
    context.lineCap = context.lineJoin = "round";
    context.lineWidth = this.size * width;
    context.beginPath();
    context.moveTo(this.#last[0] * width, this.#last[1] * height);
    context.lineTo(place[0] * width + 0.01, place[1] * height);
    context.stroke();
    this.#last = this.#at = place;
    this.#changed();
  }

  #changed() {
    this.#draw(true);
    this.onChange();
  }

  #draw(brush = false) {
    const context = this.background();
    const { width, height } = this.canvas;
    const tint = this.#tint.getContext("2d");
    tint.globalCompositeOperation = "copy";
    tint.drawImage(this.#mask, 0, 0);
    tint.globalCompositeOperation = "source-in";
    tint.fillStyle = TINT;
    tint.fillRect(0, 0, width, height);
    context.globalAlpha = 0.7;
    context.drawImage(this.#tint, 0, 0);
    context.globalAlpha = 1;
    if (!brush) return;
    for (const [line, colour] of [
      [4, "#fff"],
      [2, "#000"],
    ]) {
      [context.lineWidth, context.strokeStyle] = [line, colour];
      context.beginPath();
      context.arc(this.#at[0] * width, this.#at[1] * height, (this.size * width) / 2, 0, 2 * Math.PI);
      context.stroke();
    }
  }
}
