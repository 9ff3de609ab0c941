// The gallery: runs that this browser remembers, in IndexedDB, with their pictures, maps and settings.

import { announce, button, byId, downloadText, make, slug } from "./elements.js";
import { desk, differences } from "./desk.js";

const MOST_PREVIEWS = 2e6; // letters of a run's previews that are kept; those of large pictures are not

const UNAVAILABLE = "This browser does not let the page remember pictures; a private window may be why.";

let opening = null;

function store() {
  opening ??= new Promise((resolve, reject) => {
    const asked = indexedDB.open("gobelin", 1);
    asked.addEventListener("upgradeneeded", () => {
      asked.result.createObjectStore("runs", { keyPath: "key" }).createIndex("when", "when");
    });
    asked.addEventListener("success", () => resolve(asked.result));
    asked.addEventListener("error", () => reject(asked.error));
  });
  return opening;
}

// Do something with the runs, and return what it asked for when that is safely written.
async function within(mode, act) {
  const transaction = (await store()).transaction("runs", mode);
  const asked = act(transaction.objectStore("runs"));
  return new Promise((resolve, reject) => {
    transaction.addEventListener("complete", () => resolve(asked.result));
    for (const kind of ["abort", "error"])
      transaction.addEventListener(kind, () => reject(transaction.error ?? asked.error));
  });
}

// Remember a run; says in words where that cannot be, as nothing else depends on it.
export async function remember(run) {
  const letters = run.previews.reduce(
    (sum, { images }) => sum + images.reduce((all, image) => all + image.length, 0),
    0,
  );
  const kept = letters > MOST_PREVIEWS ? { ...run, previews: [] } : run;
  try {
    await within("readwrite", (runs) => runs.put(kept));
    remark("");
  } catch (error) {
    remark(
      error?.name === "QuotaExceededError"
        ? "This browser's store is full, so this picture will be gone after a reload: delete some pictures here."
        : UNAVAILABLE,
    );
  }
}

export async function latest() {
  const runs = await everything();
  return runs.at(-1) ?? null;
}

// All runs, the oldest first.
async function everything() {
  try {
    return await within("readonly", (runs) => runs.index("when").getAll());
  } catch {
    remark(UNAVAILABLE);
    return [];
  }
}

function remark(text) {
  byId("gallery-line").textContent = text;
  if (text) announce(text);
}

export async function showGallery() {
  const runs = await everything();
  byId("gallery-empty").hidden = runs.length > 0;
  byId("gallery-clear").hidden = runs.length === 0;
  byId("gallery-runs").replaceChildren(...runs.toReversed().map(card));
}

function card(run) {
  const shown = run.kind === "edit" ? run.pictures.length - 1 : 0;
  const title = run.to ? `${run.prompt} → ${run.to}` : run.prompt;
  const open = make(
    "button",
    { type: "button", className: "picture", onclick: () => lay(run) },
    make("img", { src: run.pictures[shown].source, alt: "", loading: "lazy" }),
    make("span", { textContent: title, dir: "auto" }),
  );
  const { settings } = run.pictures[shown];
  const when = new Date(run.when).toLocaleString(undefined, { dateStyle: "medium", timeStyle: "short" });
  const forget = async () => {
    await within("readwrite", (all) => all.delete(run.key));
    announce(`${title} was deleted`);
    await showGallery();
    byId("gallery-heading").focus();
  };
  return make(
    "li",
    {},
    open,
    make("p", { className: "facts", textContent: [...differences(run), `seed ${settings.seed}`, when].join(" · ") }),
    make(
      "div",
      { className: "downloads" },
      button("settings", () => downloadText(`${slug(run.prompt)}.json`, `${JSON.stringify(settings, null, 2)}\n`), {
        ariaLabel: `Settings of ${title}`,
      }),
      button("delete", forget, { ariaLabel: `Delete ${title}` }),
    ),
  );
}

function lay(run) {
  desk.show(run);
  location.hash = run.kind === "look" ? "#look" : run.kind === "edit" ? "#change" : "#paint";
}

export function startGallery() {
  byId("gallery-clear").addEventListener("click", async () => {
    if (!confirm("Delete all pictures that this browser remembers?")) return;
    await within("readwrite", (runs) => runs.clear());
    await showGallery();
  });
}
