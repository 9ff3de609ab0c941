// Maps: which word each patch looked at, made of attention as gobelin.look.heatmaps does, and packed for word_map.js.

const TINY = 1.1754943508222875e-38; // the least normal float32

// The maps of one or more steps, added up: `cross` [sites, patches, tokens], `own` [patches, patches].
export class Maps {
  #cross = null;
  #own = null;
  #steps = 0;

  add({ cross, own }) {
    if (this.#steps++ === 0) {
      [this.#cross, this.#own] = [Float32Array.from(cross), Float32Array.from(own)];
      return;
    }
    cross.forEach((value, place) => (this.#cross[place] += value));
    own.forEach((value, place) => (this.#own[place] += value));
  }

  // Each word's share of each patch's attention, sharpened: [words, patches], the mean over steps and sites.
  shares(words, tokens) {
    const patches = Math.sqrt(this.#own.length);
    const sites = this.#cross.length / (patches * tokens);
    const shares = new Float32Array(words.length * patches);
    words.forEach((word, number) => {
      const sum = shares.subarray(number * patches, (number + 1) * patches);
      for (let site = 0; site < sites; site++) {
        const share = this.#shareAt(site, word.tokens, patches, tokens);
        this.#sharpen(share).forEach((value, patch) => (sum[patch] += value / sites));
      }
      sum.forEach((value, patch) => (sum[patch] = Math.min(1, Math.max(0, value))));
    });
    return shares;
  }

  #shareAt(site, positions, patches, tokens) {
    const share = new Float32Array(patches);
    for (let patch = 0; patch < patches; patch++) {
      const row = (site * patches + patch) * tokens;
      for (const position of positions) share[patch] += this.#cross[row + position] / this.#steps;
    }
    return share;
  }

  // A patch keeps its share as far as the patches that it attends to have it too.
  #sharpen(share) {
    const gathered = share.map((_, patch) => {
      let sum = 0;
      const row = patch * share.length;
      for (let other = 0; other < share.length; other++) sum += this.#own[row + other] * share[other];
      return sum / this.#steps;
    });
    const most = gathered.reduce((top, value) => Math.max(top, value), TINY);
    return share.map((value, patch) => (value * gathered[patch]) / most);
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
