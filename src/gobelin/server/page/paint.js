// Painting: a prompt and settings in, a picture with its words out.

import { announce, button, byId, dataUrl, grow, make, sendOnEnter, wordsOf } from "./elements.js";
import { post } from "./client.js";
import { desk } from "./desk.js";
import { remember } from "./gallery.js";
import { Runner } from "./runner.js";
import { SettingsForm } from "./settings_form.js";
import { Stage } from "./stage.js";

const EXAMPLE_ROWS = matchMedia("(max-width: 640px)").matches ? 2 : 1;
const MOST_NAMED = 5; // words that a model does not know
const KEPT = "gobelin"; // in localStorage: the prompt and the settings that were typed last

export function startPaint() {
  const { info } = desk;
  const [form, prompt, fold] = ["paint-form", "prompt", "settings"].map(byId);
  const settings = new SettingsForm(byId("settings-fields"), info);
  const runner = new Runner(form);
  const stage = new Stage(byId("paint-stage"), {
    resting: "Your picture appears here. Then touch its words, or the picture itself.",
    onAgain: (run) => again(run),
  });

  const summarize = () => {
    byId("settings-summary").textContent = settings.summary;
  };
  const keep = () => {
    summarize();
    try {
      localStorage.setItem(KEPT, JSON.stringify({ prompt: prompt.value, settings: settings.values }));
    } catch {
      // A browser that keeps nothing still paints.
    }
  };
  const again = (run) => {
    fill(run.prompt, { ...run.pictures[0].settings, count: run.pictures.length });
    form.requestSubmit();
  };
  const fill = (text, values) => {
    prompt.value = text;
    settings.values = values;
    prompt.dispatchEvent(new Event("input", { bubbles: true }));
  };

  byId("examples").replaceChildren(
    ...info.examples.map((example) => {
      const choose = () => {
        fill(example, settings.values);
        prompt.focus();
      };
      return button(example, choose, { className: "example", dir: "auto" });
    }),
  );
  keepRows(byId("examples"), EXAMPLE_ROWS);
  prompt.maxLength = info.limits?.prompt_characters ?? 10_000;
  grow(prompt);
  sendOnEnter(prompt);
  form.addEventListener("input", () => {
    keep();
    warn(prompt.value);
  });
  byId("settings-reset").addEventListener("click", () => fill(prompt.value, {}));

  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    if (runner.busy) return;
    settings.forgive();
    if (prompt.value.trim() === "") {
      runner.say("Say in a few words what to paint.", true);
      prompt.focus();
      return;
    }
    const body = { kind: "paint", prompt: prompt.value, settings: settings.values, trace: true, previews: true };
    const run = await runner.paint(body, stage, (field, message) => {
      fold.open ||= settings.blame(field, message);
      return settings.blame(field, message);
    });
    if (run === null) return;
    desk.show(run, 0, true);
    announce(`The picture is painted: ${run.prompt}. Its words can be explored now.`);
    await remember(run);
  });

  desk.addEventListener("run", () => {
    const { run, index } = desk;
    if (run.kind === "paint" && !runner.busy) stage.show(run, index);
  });
  desk.addEventListener("again", ({ detail }) => again(detail.run));
  desk.addEventListener("fill", ({ detail }) => fill(detail.prompt, detail.settings));
  takeDrops(runner);

  const last = kept();
  fill(last?.prompt ?? info.examples[0] ?? "", last?.settings ?? {});
}

// As many of the children as fit in some rows, whatever the width.
function keepRows(root, rows) {
  const fit = () => {
    for (const child of root.children) child.hidden = false;
    const tops = [...root.children].map(({ offsetTop }) => offsetTop);
    const last = [...new Set(tops)][rows - 1] ?? Infinity;
    [...root.children].forEach((child, place) => {
      child.hidden = tops[place] > last;
    });
  };
  new ResizeObserver(fit).observe(root.parentElement);
}

function kept() {
  try {
    return JSON.parse(localStorage.getItem(KEPT));
  } catch {
    return null;
  }
}

// A model of a small world says which words it never saw.
function warn(prompt) {
  const known = desk.info.words_known;
  if (!known) return;
  const there = new Set(known);
  const strange = [...new Set(wordsOf(prompt.toLowerCase()))].filter((word) => !there.has(word));
  const named = strange.slice(0, MOST_NAMED).flatMap((word) => [make("bdi", { textContent: `“${word}”` }), ", "]);
  byId("unknown-words").replaceChildren(
    ...(strange.length > 0 ? ["This model never saw ", ...named.slice(0, -1), ": it will guess."] : []),
  );
}

// Whether files are dragged, and not over a place that takes them for itself.
const ours = ({ dataTransfer, target }) =>
  dataTransfer?.types.includes("Files") && !target.closest?.("[data-takes-files]");

// A picture that is dropped anywhere, or opened, gives its prompt and settings back.
function takeDrops(runner) {
  const read = async (file) => {
    location.hash = "#paint";
    try {
      const { prompt, settings, unknown } = await post("v1/image-settings", { image: await dataUrl(file) });
      desk.dispatchEvent(new CustomEvent("fill", { detail: { prompt: prompt ?? "", settings: settings ?? {} } }));
      byId("settings").open = true;
      const left = unknown?.length > 0 ? ` Not understood: ${unknown.join(", ")}.` : "";
      runner.say(`Read from ${file.name}.${left}`);
    } catch (error) {
      runner.say(error.message, true);
    }
  };
  const veil = byId("veil");
  document.addEventListener("dragover", (event) => {
    if (!ours(event)) return;
    event.preventDefault();
    veil.hidden = false;
  });
  document.addEventListener("dragleave", (event) => {
    if (event.relatedTarget === null) veil.hidden = true;
  });
  document.addEventListener("drop", (event) => {
    veil.hidden = true;
    if (!ours(event)) return;
    event.preventDefault();
    read(event.dataTransfer.files[0]);
  });
  byId("read-settings").addEventListener("change", ({ target }) => {
    if (target.files[0]) read(target.files[0]);
    target.value = "";
  });
}
