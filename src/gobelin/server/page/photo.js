// Looking at a photo: which word of its caption each pixel hears.

import { announce, byId, dataUrl, grow, loadImage, make, sendOnEnter } from "./elements.js";
import { desk } from "./desk.js";
import { remember } from "./gallery.js";
import { Runner } from "./runner.js";
import { Stage } from "./stage.js";

const MOST_SIDE = 1536; // pixels: a photo is made smaller before it is sent, as the model sees it smaller still

export function startPhoto() {
  const form = byId("look-form");
  const caption = byId("caption");
  const runner = new Runner(form);
  const stage = new Stage(byId("look-stage"), { resting: "The photo and the words of its caption appear here." });
  let image = null;
  const picked = pickImage(byId("look-file"), (source) => {
    image = source;
    runner.say("");
  });
  grow(caption);
  sendOnEnter(caption);
  byId("look-own").addEventListener("click", () => {
    if (!desk.picture) {
      runner.say("There is no picture yet: paint one first.", true);
      return;
    }
    picked.show(desk.picture.source);
    if (caption.value === "") caption.value = desk.run.to ?? desk.run.prompt;
  });

  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    if (runner.busy) return;
    if (image === null || caption.value.trim() === "") {
      runner.say(image === null ? "Choose a picture first." : "Say in a few words what is to be seen.", true);
      return;
    }
    const run = await runner.paint({ kind: "look", image, caption: caption.value }, stage);
    if (run === null) return;
    desk.show(run, 0, true);
    announce("The words of the caption can be explored now.");
    await remember(run);
  });
  desk.addEventListener("run", () => {
    if (desk.run.kind !== "look" || runner.busy) return;
    stage.show(desk.run, desk.index);
    if (image === null) {
      picked.show(desk.run.pictures[0].source);
      caption.value = desk.run.prompt;
    }
  });
}

// A place for a picture: chosen, dropped or pasted; `take` gets its data URL, made smaller where it is very large.
export function pickImage(root, take) {
  const input = root.querySelector("input[type=file]");
  const shown = root.querySelector(".picked");
  const problem = root.querySelector(".problem");
  const show = async (source, tell = true) => {
    problem.textContent = "";
    try {
      const fitted = await fit(source);
      shown.replaceChildren(make("img", { src: fitted, alt: "The chosen picture" }));
      if (tell) take(fitted);
    } catch {
      problem.textContent = "This file is no picture that the browser can read.";
    }
  };
  const read = async (file) => file && show(await dataUrl(file));
  input.addEventListener("change", () => {
    read(input.files[0]);
    input.value = "";
  });
  root.dataset.takesFiles = "";
  root.addEventListener("dragover", (event) => {
    event.preventDefault();
    root.classList.add("over");
  });
  root.addEventListener("dragleave", () => root.classList.remove("over"));
  root.addEventListener("drop", (event) => {
    event.preventDefault();
    root.classList.remove("over");
    read(event.dataTransfer.files[0]);
  });
  return { show };
}

async function fit(source) {
  const image = await loadImage(source);
  const scale = MOST_SIDE / Math.max(image.width, image.height);
  if (scale >= 1) return source;
  const canvas = make("canvas", { width: Math.round(image.width * scale), height: Math.round(image.height * scale) });
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.drawImage(image, 0, 0, canvas.width, canvas.height);
  return canvas.toDataURL("image/jpeg", 0.92);
}
