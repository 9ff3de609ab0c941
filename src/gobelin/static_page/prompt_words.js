// The words of a prompt, and the tokens that each became: gobelin.words, and the end of gobelin.tokenizer.
// Places are counted in code points.

const SEPARATOR = /[\p{White_Space}\u001c-\u001f,;|()[\]{}<>"“”„«»，。、；：！？（）「」]/u;
const SPOKEN = /[\p{L}\p{M}\p{N}\p{So}]/u; // letters, marks, numbers, and emoji

// Split into words: at spaces, commas and brackets; punctuation around a word is not part of it. {word, start, end}
function* splitWords(characters, offset = 0) {
  for (let place = 0; place < characters.length; ) {
    if (SEPARATOR.test(characters[place])) {
      place++;
      continue;
    }
    let end = place;
    while (end < characters.length && !SEPARATOR.test(characters[end])) end++;
    let [first, last] = [place, end];
    while (first < last && !SPOKEN.test(characters[first])) first++;
    while (last > first && !SPOKEN.test(characters[last - 1])) last--;
    if (first < last) {
      yield { word: characters.slice(first, last).join(""), start: offset + first, end: offset + last };
    }
    place = end;
  }
}

// Find the words of a text, each with the positions of its tokens, BOS being 0; a word without a token is left out.
export function findWords(text, tokens) {
  const characters = [...text];
  const words = [];
  let first = 0;
  for (const word of splitAround(characters, tokens)) {
    while (first < tokens.length && tokens[first].end <= word.start) first++;
    let last = first;
    while (last < tokens.length && tokens[last].start < word.end) last++;
    if (last > first) {
      words.push({ ...word, tokens: Array.from({ length: last - first }, (_, number) => first + number + 1) });
    }
    first = last;
  }
  return words;
}

// Split, but for tokens that are a word each.
function* splitAround(characters, tokens) {
  let after = 0;
  for (const { start, end } of tokens.filter((token) => token.whole)) {
    yield* splitWords(characters.slice(after, start), after);
    const spoken = characters.slice(start, end).flatMap((one, place) => (SPOKEN.test(one) ? [start + place] : []));
    const [first, last] = [spoken[0], spoken.at(-1) + 1];
    yield { word: characters.slice(first, last).join(""), start: first, end: last };
    after = end;
  }
  yield* splitWords(characters.slice(after), after);
}

// Split a text into its words with their numbers, and what is between them with null.
export function splitPrompt(text, words) {
  const characters = [...text];
  const pieces = [];
  let end = 0;
  words.forEach((word, number) => {
    pieces.push([characters.slice(end, word.start).join(""), null]);
    pieces.push([characters.slice(word.start, word.end).join(""), number]);
    end = word.end;
  });
  pieces.push([characters.slice(end).join(""), null]);
  return pieces.filter(([piece]) => piece);
}
