// The tokenizer: prompt to token ids, as gobelin.tokenizer has it (byte-pair encoding as CLIP has it, Radford et al.
// 2021, section 2.4). Places in a text are counted in code points, as Python counts them.

const BOS = "<|startoftext|>";
const EOS = "<|endoftext|>";
const ADDED = /<\|startoftext\|>|<\|endoftext\|>/g; // found before anything else, in this case alone
const PIECES = /'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\p{White_Space}\p{L}\p{N}]+/gu;
// Whatever may compose with the character before it: marks, and the vowels and last consonants of Hangul.
const COMPOSABLE = /[\p{M}\u1160-\u11ff]/u;
const WORD_END = "</w>";
const encoder = new TextEncoder();

export class Tokenizer {
  #vocab;
  #ranks;
  #known = new Map();

  // vocab: ids by token; merges: "left right", the first ones first; maxLength: tokens of a text with BOS and EOS
  constructor({ vocab, merges, maxLength }) {
    this.#vocab = vocab;
    this.#ranks = new Map(merges.map((pair, rank) => [pair, rank]));
    this.maxLength = maxLength;
  }

  // The tokens of a text, without BOS and EOS, however many there are: {id, start, end, whole}.
  tokens(text) {
    const tokens = [];
    let [from, place] = [0, 0]; // in UTF-16 units, and in code points
    for (const found of text.matchAll(ADDED)) {
      const before = text.slice(from, found.index);
      tokens.push(...this.#plainTokens(before, place));
      const start = place + [...before].length;
      place = start + found[0].length;
      tokens.push({ id: this.#vocab[found[0]], start, end: place, whole: true });
      from = found.index + found[0].length;
    }
    tokens.push(...this.#plainTokens(text.slice(from), place));
    return tokens;
  }

  // Ids of a text's tokens between BOS and EOS, cut or padded with EOS to the greatest length.
  padded(tokens) {
    const row = new Int32Array(this.maxLength).fill(this.#vocab[EOS]);
    row[0] = this.#vocab[BOS];
    tokens.slice(0, this.maxLength - 2).forEach(({ id }, place) => (row[place + 1] = id));
    return row;
  }

  #plainTokens(text, offset) {
    const tokens = [];
    const { normalised, places } = normalise(text);
    for (const found of normalised.matchAll(PIECES)) {
      const symbols = [];
      const origins = []; // the code point that each byte comes from
      let unit = found.index;
      for (const character of found[0]) {
        for (const byte of encoder.encode(character)) {
          symbols.push(BYTE_SYMBOLS[byte]);
          origins.push(places[unit]);
        }
        unit += character.length;
      }
      let first = 0;
      for (const part of this.#merged(symbols)) {
        const last = first + symbolCount(part) - 1;
        tokens.push({
          id: this.#vocab[part],
          start: offset + origins[first],
          end: offset + origins[last] + 1,
          whole: false,
        });
        first = last + 1;
      }
    }
    return tokens;
  }

  // Merge neighbours, the pair that was learned first before others, until none is left that was learned.
  #merged(symbols) {
    const word = symbols.join("");
    if (this.#known.has(word)) return this.#known.get(word);
    const parts = [...symbols];
    parts[parts.length - 1] += WORD_END;
    for (;;) {
      let [best, at] = [Infinity, -1];
      for (let i = 0; i + 1 < parts.length; i++) {
        const rank = this.#ranks.get(`${parts[i]} ${parts[i + 1]}`) ?? Infinity;
        if (rank < best) [best, at] = [rank, i];
      }
      if (at < 0) break;
      parts.splice(at, 2, parts[at] + parts[at + 1]);
    }
    this.#known.set(word, parts);
    return parts;
  }
}

// Symbols that stand for the 256 bytes: printable ones for themselves, others from 256 on (OpenAI's GPT-2, encoder.py).
const isPrintable = (byte) => (byte > 32 && byte < 127) || (byte > 160 && byte !== 173);
let nextSymbol = 256;
const BYTE_SYMBOLS = Array.from({ length: 256 }, (_, byte) =>
  String.fromCharCode(isPrintable(byte) ? byte : nextSymbol++),
);

function symbolCount(part) {
  return part.endsWith(WORD_END) ? part.length - WORD_END.length : part.length;
}

// Compose (NFC), and put into lower case; `places` says for each UTF-16 unit which code point it comes from.
function normalise(text) {
  const places = [];
  let normalised = "";
  const put = (character, place) => {
    for (const one of character.toLowerCase()) {
      normalised += one;
      for (let unit = 0; unit < one.length; unit++) places.push(place);
    }
  };
  const characters = [...text];
  for (let start = 0; start < characters.length; ) {
    let end = start + 1;
    while (end < characters.length && COMPOSABLE.test(characters[end])) end++;
    const composed = [...characters.slice(start, end).join("").normalize("NFC")];
    const gone = Math.max(0, end - start - composed.length); // into the first one
    composed.forEach((character, number) => {
      put(character, Math.min(end - 1, number === 0 ? start : start + number + gone));
    });
    start = end;
  }
  return { normalised, places };
}
