// Pictures enlarged, with heat over them or a patch framed, as the word map draws them.

import { make } from "./elements.js";

const PIXELS_SHOW = 6; // times: a picture enlarged more shows its pixels

export function drawPicture(context, image) {
  const { width, height } = context.canvas;
  context.imageSmoothingEnabled = width / image.width < PIXELS_SHOW;
  context.drawImage(image, 0, 0, width, height);
}

// Values from 0 to 1, one for each patch of the grid [rows, columns], over the picture in grey; `colours` are the word
// map's, in base64.
export function drawHeat(context, image, values, [rows, columns], colours) {
  const levels = Uint8Array.from(atob(colours), (letter) => letter.charCodeAt(0));
  const layer = make("canvas", { width: columns, height: rows });
  const pixels = new ImageData(columns, rows);
  values.forEach((value, patch) => {
    const level = 3 * Math.round(255 * value);
    pixels.data.set([...levels.subarray(level, level + 3), 255 * (0.25 + 0.75 * value ** 0.7)], 4 * patch);
  });
  layer.getContext("2d").putImageData(pixels, 0, 0);
  context.filter = "grayscale(1) brightness(0.75)";
  drawPicture(context, image);
  context.filter = "none";
  context.imageSmoothingEnabled = true;
  context.drawImage(layer, 0, 0, context.canvas.width, context.canvas.height);
}

export function framePatch(context, [row, column], [rows, columns], colour = "#000") {
  const [width, height] = [context.canvas.width / columns, context.canvas.height / rows];
  for (const [line, stroke] of [
    [7, "#fff"],
    [3, colour],
  ]) {
    [context.lineWidth, context.strokeStyle] = [line, stroke];
    context.strokeRect(column * width, row * height, width, height);
  }
}

// A canvas' size for a picture, `side` pixels at the longer side.
export function fitCanvas(canvas, image, side) {
  const scale = side / Math.max(image.width, image.height);
  [canvas.width, canvas.height] = [Math.round(image.width * scale), Math.round(image.height * scale)];
}
