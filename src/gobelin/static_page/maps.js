// Maps: what patches look at, its mean over steps, and words' shares of it packed for word_map.js.

// Attention of one or more steps, added up: `cross` to tokens and `own` to patches, {data, dims} each.
export class Attention {
  #cross = null;
  #own = null;
  #steps = 0;

  add({ cross, own }) {
    if (this.#steps++ === 0) {
      [this.#cross, this.#own] = [cross, own].map(({ data, dims }) => ({ data: Float32Array.from(data), dims }));
      return;
    }
    cross.data.forEach((value, place) => (this.#cross.data[place] += value));
    own.data.forEach((value, place) => (this.#own.data[place] += value));
  }

  // → {cross, own}, means over the steps
  mean() {
    const [cross, own] = [this.#cross, this.#own].map(({ data, dims }) => ({
      data: data.map((sum) => sum / this.#steps),
      dims,
    }));
    return { cross, own };
  }
}

// Pack shares of steps [words, patches] as the element takes them: a byte a patch, word and step, in units of the
// word's greatest share (`tops`).
export function packShares(steps, words, patches) {
  const tops = Array.from({ length: words }, (_, word) =>
    steps.reduce((top, shares) => shares.subarray(word * patches, (word + 1) * patches).reduce(greater, top), 1e-9),
  );
  const levels = new Uint8Array(steps.length * words * patches);
  steps.forEach((shares, step) =>
    shares.forEach((share, place) => {
      levels[step * shares.length + place] = Math.round((share / tops[Math.floor(place / patches)]) * 255);
    }),
  );
  return { tops, shares: toBase64(levels) };
}

const greater = (one, other) => Math.max(one, other);

function toBase64(bytes) {
  let text = "";
  for (const byte of bytes) text += String.fromCharCode(byte);
  return btoa(text);
}
