// Small helpers for making and reading parts of the page.

export const byId = (id) => document.getElementById(id);

export function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children.filter((child) => child !== null));
  return element;
}

export const button = (text, onClick, properties = {}) =>
  make("button", { type: "button", textContent: text, onclick: onClick, ...properties });

// Say something to whoever does not see it; what is seen says it for itself.
export function announce(text) {
  byId("spoken").textContent = text;
}

export const calm = () => matchMedia("(prefers-reduced-motion: reduce)").matches;

export const plural = (count, one, many = `${one}s`) => `${count} ${count === 1 ? one : many}`;

// A name of the server's as a label: "guidance_rescale" becomes "Guidance rescale".
export const label = (name) => (name[0].toUpperCase() + name.slice(1)).replaceAll("_", " ");

// The words of a prompt as the server finds them, without weights: what stands between separators and has a letter.
const SEPARATORS = /[\s,;|()[\]{}<>"“”„«»，。、；：！？（）「」]+/u;

const WEIGHT = /:\s*[\d.]+(?=\s*\))/g; // as in (word:1.2)

export function wordsOf(prompt) {
  const plain = prompt.replace(WEIGHT, "");
  const words = plain.split(SEPARATORS).map((word) => word.replace(/^[^\p{L}\p{N}]+|[^\p{L}\p{N}]+$/gu, ""));
  return words.filter(Boolean);
}

// Words that name nothing themselves, and those of relations, whose maps hardly point.
export const SMALL_WORDS = new Set(
  (
    "a above an and at behind below beside between by for from in inside is it its left near of on or over right " +
    "that the there this to under with"
  ).split(" "),
);

// What a prompt names: words that stand together, with no small word or sign between them, as "red circle".
export function phrasesOf(prompt) {
  const small = [...SMALL_WORDS].join("|");
  const pieces = prompt
    .replace(WEIGHT, "")
    .split(new RegExp(`[^\\p{L}\\p{N}\\s'’-]+|(?<!\\S)(?:${small})(?!\\S)`, "giu"));
  return [...new Set(pieces.map((piece) => piece.trim().replace(/\s+/g, " ")).filter(Boolean))];
}

// A textarea as high as its text; where CSS does that, nothing is left to do.
export function grow(area) {
  if (CSS.supports("field-sizing", "content")) return;
  const fit = () => {
    area.style.height = "auto";
    area.style.height = `${area.scrollHeight + 2}px`;
  };
  area.addEventListener("input", fit);
  new ResizeObserver(fit).observe(area);
}

// Enter sends what is typed, as in a search; Shift and Enter begin a new line.
export function sendOnEnter(area) {
  area.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    area.form.requestSubmit();
  });
}

export async function loadImage(source) {
  const image = new Image();
  image.src = source;
  await image.decode();
  return image;
}

export const dataUrl = (blob) =>
  new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.addEventListener("load", () => resolve(reader.result));
    reader.addEventListener("error", () => reject(reader.error));
    reader.readAsDataURL(blob);
  });

export function download(name, href) {
  const link = make("a", { href, download: name });
  document.body.append(link);
  link.click();
  link.remove();
}

export function downloadText(name, text) {
  const address = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  download(name, address);
  setTimeout(() => URL.revokeObjectURL(address), 10_000);
}

// A prompt as a file's name.
export const slug = (text) =>
  text
    .toLowerCase()
    .replace(/[^\p{L}\p{N}]+/gu, "-")
    .slice(0, 60)
    .replace(/^-|-$/g, "") || "picture";
