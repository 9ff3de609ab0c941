// Two pictures side by side, before and after, their word maps linked: what is pointed at in one lights up in both.

import { loadImage, make } from "./elements.js";
import { pointing } from "./stage.js";

const CHANGED = 16; // levels of 255 in a channel by which a pixel counts as changed, as where editing is measured

// `before` and `after` are { title, source, map or null, actions }, actions being elements to put under the picture.
export async function showPair(root, before, after) {
  const sides = [before, after].map(side);
  root.replaceChildren(
    make("div", { className: "pair" }, ...sides.map(({ element }) => element)),
    make("p", { className: "facts", textContent: await difference(before.source, after.source) }),
  );
  const maps = sides.map(({ map }) => map);
  if (maps.every(Boolean)) link(maps);
}

function side({ title, source, map, actions = [] }) {
  const heading = make("h2", { className: "side", textContent: title });
  const shown = map ? make("word-map", { data: map }) : make("img", { className: "plain", src: source, alt: title });
  if (map) shown.append(pointing("paint"));
  const element = make("article", {}, heading, shown, make("div", { className: "downloads" }, ...actions));
  return { element, map: map ? shown : null };
}

function link(maps) {
  maps.forEach((map, place) => {
    const other = maps[1 - place];
    map.addEventListener("word-map-point", ({ detail: { word, patch } }) => {
      other.light(word === null ? null : twin(map.data, other.data, word), twinPatch(map.data, other.data, patch));
    });
  });
}

// The word of another prompt that a word stands for: the same word in the same of its occurrences, or, where both
// prompts are equally long, the one at the same place.
function twin({ words }, { words: others }, word) {
  const occurrence = words.slice(0, word).filter((one) => one === words[word]).length;
  const same = others.flatMap((one, place) => (one === words[word] ? [place] : []))[occurrence];
  return same ?? (words.length === others.length ? word : null);
}

function twinPatch({ rows, columns }, other, patch) {
  if (patch === null) return null;
  const row = Math.floor((Math.floor(patch / columns) * other.rows) / rows);
  return row * other.columns + Math.floor(((patch % columns) * other.columns) / columns);
}

async function difference(before, after) {
  const [one, two] = await Promise.all([before, after].map(pixels));
  if (one.width !== two.width || one.height !== two.height) return "The two pictures differ in size.";
  let changed = 0;
  for (let at = 0; at < one.data.length; at += 4) {
    const furthest = Math.max(...[0, 1, 2].map((channel) => Math.abs(one.data[at + channel] - two.data[at + channel])));
    if (furthest > CHANGED) changed += 1;
  }
  const share = (100 * changed) / (one.width * one.height);
  return `${share.toFixed(share < 10 ? 1 : 0)} % of the pixels changed, by more than ${CHANGED} of 255 levels.`;
}

async function pixels(source) {
  const image = await loadImage(source);
  const canvas = make("canvas", { width: image.width, height: image.height });
  const context = canvas.getContext("2d");
  context.drawImage(image, 0, 0);
  return context.getImageData(0, 0, canvas.width, canvas.height);
}
