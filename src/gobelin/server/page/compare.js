// Comparing: the same prompt with several seeds, a row for each value of a setting.

import { announce, byId, grow, label, make } from "./elements.js";
import { runJob } from "./client.js";
import { desk, gather } from "./desk.js";
import { remember } from "./gallery.js";
import { Runner } from "./runner.js";

const FIRST_VALUES = { steps: "5, 10, 25", guidance: "1, 3, 7", guidance_rescale: "0, 0.5, 1" }; // to begin with
const FIRST_SAMPLERS = 3;
const NOT_COMPARED = new Set(["seed", "count", "init_image", "mask", "strength", "height", "width", "tile"]);
const MOST_SEEDS = 8;

export function startCompare() {
  const { info } = desk;
  const form = byId("compare-form");
  const runner = new Runner(form);
  const [prompt, seed, seeds, setting, values] = ["prompt", "seed", "seeds", "setting", "values"].map((name) =>
    byId(`compare-${name}`),
  );
  seeds.max = Math.min(MOST_SEEDS, info.limits?.count ?? MOST_SEEDS);
  grow(prompt);
  const names = Object.keys(info.settings.properties).filter((name) => !NOT_COMPARED.has(name));
  setting.replaceChildren(...names.map((name) => make("option", { value: name, textContent: label(name) })));
  setting.value = names.includes("guidance") ? "guidance" : names[0];
  const suggest = () => {
    const samplers = info.samplers.slice(0, FIRST_SAMPLERS).join(", ");
    values.value = setting.value === "sampler" ? samplers : (FIRST_VALUES[setting.value] ?? "");
  };
  setting.addEventListener("change", suggest);
  suggest();
  desk.addEventListener("run", () => {
    if (prompt.value === "") prompt.value = desk.run.to ?? desk.run.prompt;
  });

  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    if (runner.busy) return;
    const rows = values.value.split(",").map((text) => text.trim());
    if (prompt.value.trim() === "" || rows.some((text) => text === "")) {
      runner.say("Say what to paint, and give values with commas between them: 1, 3, 7.", true);
      return;
    }
    const columns = Array.from({ length: Number(seeds.value) }, (_, place) => Number(seed.value) + place);
    const cells = table(byId("compare-table"), label(setting.value), rows, columns);
    const done = await runner.attempt(async (signal) => {
      for (const [row, text] of rows.entries()) {
        const settings = { seed: columns[0], count: columns.length, [setting.value]: typed(text) };
        const body = { kind: "paint", prompt: prompt.value, settings, trace: true, previews: false };
        const heard = {
          waiting: (seconds) => runner.say(`The server is busy. Trying again in ${seconds} s.`),
          step: ({ step, steps }) => runner.say(`Row ${row + 1} of ${rows.length}, step ${step} of ${steps}.`),
        };
        const run = await gather(await runJob(body, heard, signal), body);
        cells[row].forEach((cell, place) => fill(cell, run, place, `${label(setting.value)} ${text}`));
      }
      return true;
    });
    if (done) runner.say("Choose a picture to look into it.");
    if (done) announce("The table is painted.");
  });
}

const typed = (text) => (Number.isNaN(Number(text)) ? text : Number(text));

// An empty table with its headings; returns its cells, by row.
function table(root, name, rows, columns) {
  const head = make("tr", {}, make("th", { scope: "col", textContent: name }));
  head.append(...columns.map((seed) => make("th", { scope: "col", textContent: `seed ${seed}` })));
  const lines = rows.map((text) => {
    const cells = columns.map(() => make("td", {}, make("div", { className: "blank" })));
    return { cells, line: make("tr", {}, make("th", { scope: "row", textContent: text }), ...cells) };
  });
  root.replaceChildren(make("thead", {}, head), make("tbody", {}, ...lines.map(({ line }) => line)));
  return lines.map(({ cells }) => cells);
}

function fill(cell, run, place, said) {
  const { source, settings } = run.pictures[place];
  const open = async () => {
    desk.show(run, place);
    location.hash = "#paint";
    await remember(run);
  };
  const image = make("img", { src: source, alt: `${said}, seed ${settings.seed}` });
  cell.replaceChildren(make("button", { type: "button", className: "picture", onclick: open }, image));
}
