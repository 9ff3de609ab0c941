// The loom: a picture while it is being painted. What the network predicts fades in, under grain that thins out as the
// noise does, and every step leaves a small picture behind.

import { announce, calm, loadImage, make } from "./elements.js";

const SIDE = 1024; // pixels of the canvas
const FADE = 180; // milliseconds from one step's prediction to the next
const GRAIN = 64; // grains in a row
const MOST_FRAMES = 50; // small pictures: of more steps the last leave none
const FIRST_TIMESTEP = 999; // pure noise

export class Loom {
  #canvas = make("canvas", { width: SIDE, height: SIDE });
  #prompt = make("h2", { className: "loom-prompt", dir: "auto" });
  #line = make("p", { className: "loom-line" });
  #bar = make("progress", { max: 1, value: 0, ariaLabel: "Progress" });
  #heading = make("h3");
  #frames = make("ol", { className: "frames", ariaHidden: "true" });
  #grain = makeGrain();
  #last = null; // what the canvas shows, without grain
  #turn = 0; // of a fade: a later one ends it
  #seen = null; // the source of a picture that is there already, and is looked at
  #said = 0; // quarters of the way that were announced

  constructor() {
    const figure = make("figure", {}, this.#canvas, make("figcaption", {}, this.#line), this.#bar);
    this.element = make(
      "div",
      { className: "loom" },
      this.#prompt,
      figure,
      make("section", {}, this.#heading, this.#frames),
    );
    this.#canvas.role = "img";
  }

  // Before anything is painted: an empty warp.
  rest(text) {
    this.#set(text, "", "");
    this.#bar.style.visibility = "hidden";
    this.#canvas.ariaLabel = "No picture yet";
    this.element.classList.add("empty");
    this.#fitTo(1, 1);
  }

  begin(prompt, seen) {
    this.element.classList.remove("empty");
    this.#set(prompt, "Waiting", "Sent to the server");
    this.#bar.style.visibility = "visible";
    this.#bar.removeAttribute("value");
    this.#seen = seen;
    this.#canvas.ariaLabel = `${seen === null ? "Painting" : "Looking at"}: ${prompt}`;
    this.#frames.replaceChildren();
    this.#last = null;
    this.#said = 0;
    this.#draw(1);
    if (seen !== null) this.#see(seen);
    announce("Waiting for the server");
  }

  async #see(source) {
    const image = await loadImage(source);
    if (this.#seen !== source) return; // another began meanwhile
    this.#fitTo(image.naturalWidth, image.naturalHeight);
    this.#last = image;
    this.#draw(0);
  }

  waiting(seconds) {
    this.#set(null, "The server is busy", `Its queue is full. Trying again in ${seconds} s`);
  }

  queued({ position }) {
    if (position > 1) this.#set(null, "Waiting", `${position - 1} before this one`);
  }

  started({ steps, width, height }) {
    this.#bar.max = steps;
    this.#bar.value = 0;
    if (this.#seen !== null) {
      this.#set(null, "Looking", steps === 1 ? "At one noise level" : `At ${steps} noise levels`);
      announce("Looking");
      return;
    }
    this.#fitTo(width, height);
    this.#set(null, "Denoising", `From noise, in ${steps} steps`);
    const frames = Math.min(steps, MOST_FRAMES);
    this.#frames.replaceChildren(...Array.from({ length: frames }, () => make("li")));
    announce("Denoising");
  }

  async step({ step, steps, timestep, previews }) {
    this.#bar.max = steps;
    this.#bar.value = step;
    if (this.#seen !== null) {
      this.#set(null, "Looking", `At noise level ${Math.round(timestep)} of 999: ${step} of ${steps}`);
      return;
    }
    this.#set(null, "Denoising", `Step ${step} of ${steps}, at noise level ${Math.round(timestep)} of 999`);
    const quarter = Math.floor((4 * step) / steps);
    if (quarter > this.#said && quarter < 4) announce(`${25 * quarter} percent`);
    this.#said = quarter;
    const noise = step === steps ? 0 : timestep / FIRST_TIMESTEP;
    if (!previews?.length) {
      await this.#fade(this.#last, noise);
      return;
    }
    const free = [...this.#frames.children].find((frame) => !frame.hasChildNodes());
    free?.append(make("img", { src: previews[0], alt: "" }));
    const images = await Promise.all(previews.map(loadImage));
    await this.#fade(tiled(images), noise);
  }

  #set(prompt, heading, line) {
    if (prompt !== null) {
      this.#prompt.textContent = prompt;
      this.#prompt.classList.toggle("long", prompt.length > 140);
    }
    [this.#heading.textContent, this.#line.textContent] = [heading, line];
    this.#heading.hidden = heading === "";
  }

  #fitTo(width, height) {
    const scale = SIDE / Math.max(width, height);
    [this.#canvas.width, this.#canvas.height] = [Math.round(width * scale), Math.round(height * scale)];
    if (!this.element.classList.contains("empty")) this.#draw(1);
  }

  #fade(next, noise) {
    this.#turn += 1;
    const turn = this.#turn;
    const before = this.#last;
    this.#last = next;
    if (calm()) {
      this.#draw(noise, null, 1);
      return Promise.resolve();
    }
    const start = performance.now();
    return new Promise((resolve) => {
      const frame = (now) => {
        const part = Math.min(1, Math.max(0, (now - start) / FADE));
        if (turn === this.#turn) this.#draw(noise, before, part);
        if (part < 1 && turn === this.#turn) requestAnimationFrame(frame);
        else resolve();
      };
      requestAnimationFrame(frame);
    });
  }

  #draw(noise, before = null, part = 1) {
    const { width, height } = this.#canvas;
    const context = this.#canvas.getContext("2d");
    context.globalAlpha = 1;
    context.fillStyle = "#808080"; // the mean of noise
    context.fillRect(0, 0, width, height);
    context.imageSmoothingEnabled = false;
    if (before) context.drawImage(before, 0, 0, width, height);
    context.globalAlpha = before ? part : 1;
    if (this.#last) context.drawImage(this.#last, 0, 0, width, height);
    context.globalAlpha = noise;
    if (noise > 0) {
      const cell = Math.max(width, height) / GRAIN;
      context.drawImage(this.#grain, 0, 0, width / cell, height / cell, 0, 0, width, height);
    }
    context.globalAlpha = 1;
  }
}

// Several pictures of one size as one, in rows, of the same form as each of them.
function tiled(images) {
  if (images.length === 1) return images[0];
  const columns = Math.ceil(Math.sqrt(images.length));
  const [{ width, height }] = images;
  const canvas = make("canvas", { width: width * columns, height: height * columns });
  const context = canvas.getContext("2d");
  images.forEach((image, place) => {
    context.drawImage(image, (place % columns) * width, Math.floor(place / columns) * height);
  });
  return canvas;
}

function makeGrain() {
  const canvas = make("canvas", { width: GRAIN, height: GRAIN });
  const context = canvas.getContext("2d");
  const pixels = context.createImageData(GRAIN, GRAIN);
  for (let place = 0; place < pixels.data.length; place += 1) {
    pixels.data[place] = place % 4 === 3 ? 255 : 128 + 110 * (Math.random() + Math.random() - 1);
  }
  context.putImageData(pixels, 0, 0);
  return canvas;
}
