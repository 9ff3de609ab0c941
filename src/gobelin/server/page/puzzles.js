// Three small puzzles about the picture on the desk: which word painted this, which is behind a patch, where is one.

import { SMALL_WORDS, announce, button, loadImage, make } from "./elements.js";
import { desk } from "./desk.js";
import { drawHeat, drawPicture, fitCanvas, framePatch } from "./overlay.js";
import { Shares } from "./word_map.js";

const SIDE = 512; // pixels of a puzzle's canvas
const RIGHT = 0.5; // of a word's range: a patch above it is the word's
const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

export class Puzzles {
  #root;
  #scored;

  constructor(root) {
    this.#root = root;
  }

  async renew() {
    this.#scored = [];
    const { map } = desk;
    const words = map ? pointed(map) : [];
    if (words.length < 2) {
      this.#root.replaceChildren(
        make("p", {
          textContent: "Paint a prompt that names at least two things, and come back: there must be a choice.",
        }),
      );
      return;
    }
    const image = await loadImage(map.image);
    const [first, second, third] = shuffled([...words, ...words].slice(0, Math.max(3, words.length)));
    const score = make("p", { className: "score", role: "status" });
    this.#root.replaceChildren(
      this.#which(map, image, words, first, score),
      this.#behind(map, image, words, second, score),
      this.#where(map, image, third, score),
      score,
    );
  }

  // A map without its name.
  #which(map, image, words, word, score) {
    const board = new PuzzleBoard(map, image, `A heat map over the picture: which word painted this?`);
    board.heat(word);
    const choices = this.#choices(map, words, word, score, () => {
      const most = Math.round(100 * Math.max(...board.shares.map(0, word)));
      return map.weighted
        ? `Where it is bright, the attention says “${map.words[word]}” by up to ${most} %.`
        : `“${map.words[word]}” has up to ${most} % of the attention where it is bright.`;
    });
    return puzzle("Which word painted this?", board, choices);
  }

  // A patch without its words.
  #behind(map, image, words, word, score) {
    const board = new PuzzleBoard(map, image, "The picture with a patch framed: which word is behind it?");
    const shares = board.shares.map(0, word);
    const patch = shares.indexOf(Math.max(...shares));
    const first = words.toSorted((a, b) => board.shares.at(0, b, patch) - board.shares.at(0, a, patch))[0];
    board.plain();
    board.frame(patch);
    const choices = this.#choices(map, words, first, score, () => {
      const share = Math.round(100 * board.shares.at(0, first, patch));
      return map.weighted
        ? `The attention of this patch says “${map.words[first]}” by ${share} %, more than any other of these.`
        : `This patch gives ${share} % of its attention to “${map.words[first]}”, more than to any other of these.`;
    });
    return puzzle("Which word is behind this patch?", board, choices);
  }

  // A word without its place: point at it.
  #where(map, image, word, score) {
    const name = map.words[word];
    const board = new PuzzleBoard(
      map,
      image,
      `The picture. Arrow keys move the frame, Enter answers: where is “${name}”?`,
    );
    const answer = make("p", { className: "answer", role: "status" });
    const values = board.shares.values(0, word);
    board.plain();
    board.choose((patch) => {
      const isRight = values[patch] > RIGHT;
      board.heat(word);
      board.frame(patch);
      const verdict = isRight ? "Yes." : "No: it is where the map is bright now.";
      const share = Math.round(100 * values[patch]);
      answer.textContent = `${verdict} Here “${name}” is at ${share} % of its greatest value.`;
      this.#score(isRight, score);
    });
    return puzzle(`Where is “${name}”? Press on the picture.`, board, answer);
  }

  #choices(map, words, right, score, explain) {
    const answer = make("p", { className: "answer", role: "status" });
    const offered = words
      .toSorted((a, b) => a - b)
      .map((word) =>
        button(map.words[word], ({ currentTarget }) => {
          for (const each of offered) each.disabled = true;
          const isRight = map.words[word] === map.words[right];
          currentTarget.classList.add(isRight ? "right" : "wrong");
          answer.textContent = `${isRight ? "Yes." : `No, it was “${map.words[right]}”.`} ${explain()}`;
          this.#score(isRight, score);
        }),
      );
    return make(
      "div",
      {},
      make("div", { className: "choices", role: "group", ariaLabel: "Answers" }, ...offered),
      answer,
    );
  }

  #score(isRight, line) {
    this.#scored.push(isRight);
    if (this.#scored.length < 3) return;
    line.textContent = `${this.#scored.filter(Boolean).length} of 3 right.`;
    line.append(
      " ",
      button("Three more", () => this.renew()),
    );
    announce(line.textContent);
  }
}

// Words that have a place of their own: not the small ones, each once, and first those whose maps are most uneven.
function pointed(map) {
  const shares = new Shares(map);
  const uneven = (word) => {
    const all = shares.map(0, word);
    return Math.max(...all) / (all.reduce((sum, share) => sum + share, 0) / all.length || 1);
  };
  const once = map.words.flatMap((word, place) => {
    return SMALL_WORDS.has(word.toLowerCase()) || map.words.indexOf(word) !== place ? [] : [place];
  });
  return once.toSorted((a, b) => uneven(b) - uneven(a)).slice(0, 6);
}

const shuffled = (items) =>
  items
    .map((item) => [Math.random(), item])
    .toSorted(([a], [b]) => a - b)
    .map(([, item]) => item);

const puzzle = (question, board, answers) =>
  make("article", { className: "puzzle" }, make("h3", { textContent: question }), board.canvas, answers);

const clamp = (value, count) => Math.min(count - 1, Math.max(0, Math.floor(value)));

class PuzzleBoard {
  #map;
  #image;
  #context;

  constructor(map, image, name) {
    this.#map = map;
    this.#image = image;
    this.shares = new Shares(map);
    this.canvas = make("canvas", { ariaLabel: name });
    fitCanvas(this.canvas, image, SIDE);
    this.canvas.setAttribute("role", "img");
    this.#context = this.canvas.getContext("2d");
  }

  plain() {
    drawPicture(this.#context, this.#image);
  }

  heat(word) {
    const { rows, columns, colours } = this.#map;
    drawHeat(this.#context, this.#image, this.shares.values(0, word), [rows, columns], colours);
  }

  frame(patch) {
    const { rows, columns } = this.#map;
    framePatch(this.#context, [Math.floor(patch / columns), patch % columns], [rows, columns]);
  }

  // Have one patch chosen, once, by pointer or keys.
  choose(act) {
    const { rows, columns } = this.#map;
    const ended = new AbortController();
    const answer = (patch) => {
      ended.abort();
      this.canvas.classList.remove("asks");
      act(patch);
    };
    let at = [Math.floor(columns / 2), Math.floor(rows / 2)];
    this.canvas.tabIndex = 0;
    this.canvas.setAttribute("role", "application");
    this.canvas.classList.add("asks");
    const listen = (kind, hear) => this.canvas.addEventListener(kind, hear, { signal: ended.signal });
    listen("click", ({ clientX, clientY }) => {
      const box = this.canvas.getBoundingClientRect();
      const column = clamp(((clientX - box.left) / box.width) * columns, columns);
      answer(clamp(((clientY - box.top) / box.height) * rows, rows) * columns + column);
    });
    listen("keydown", (event) => {
      if (event.key in ARROWS) {
        at = [clamp(at[0] + ARROWS[event.key][0], columns), clamp(at[1] + ARROWS[event.key][1], rows)];
        this.plain();
        this.frame(at[1] * columns + at[0]);
        announce(`row ${at[1] + 1}, column ${at[0] + 1}`);
      } else if (event.key === "Enter") {
        answer(at[1] * columns + at[0]);
      } else {
        return;
      }
      event.preventDefault();
    });
  }
}
