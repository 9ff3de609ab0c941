// The stage: a picture being painted, then the picture with its words, what it was made with, and ways to take it away.

import { button, download, downloadText, dataUrl, make, slug } from "./elements.js";
import { getJson, request } from "./client.js";
import { desk, differences } from "./desk.js";
import { Loom } from "./loom.js";
import { trust } from "./trust.js";

const FORGOTTEN = "The server no longer has this run. Paint it again to look into its layers.";

export class Stage {
  #root;
  #resting;
  #loom = new Loom();
  #map = null;
  #run = null;
  #index = 0;
  #onAgain;

  constructor(root, { resting, onAgain = null }) {
    this.#root = root;
    this.#resting = resting;
    this.#onAgain = onAgain;
    this.back();
  }

  // Show a painting while it goes on, or what is looked at: what is returned hears of it, and keeps each step's pictures.
  begin(prompt, seen) {
    const previews = [];
    const loom = this.#loom;
    this.#hold();
    loom.begin(prompt, seen);
    this.#root.replaceChildren(loom.element);
    let drawn = Promise.resolve();
    return {
      previews,
      waiting: (seconds) => loom.waiting(seconds),
      queued: (detail) => loom.queued(detail),
      started: (detail) => loom.started(detail),
      step: (detail) => {
        if (detail.previews?.length)
          previews.push({ step: detail.step, first: detail.first ?? 0, images: detail.previews });
        drawn = loom.step(detail);
      },
      settled: () => drawn,
    };
  }

  // What was there before a painting that came to nothing.
  back() {
    if (this.#run) {
      this.show(this.#run, this.#index);
    } else {
      this.#loom.rest(this.#resting);
      this.#root.replaceChildren(this.#loom.element);
    }
  }

  show(run, index = 0) {
    [this.#run, this.#index] = [run, index];
    this.#hold();
    this.#map = make("word-map", { className: "shown", data: run.maps[index] });
    this.#map.append(this.#controls(), pointing(run.kind));
    this.#root.replaceChildren(this.#strip(), this.#map);
    requestAnimationFrame(() => {
      this.#root.style.minHeight = "";
    });
  }

  // The number of the picture in its job.
  get #number() {
    return this.#index + (this.#run.offset ?? 0);
  }

  // The page below must not jump while one picture takes another's place.
  #hold() {
    this.#root.style.minHeight = `${this.#root.offsetHeight}px`;
  }

  // Several pictures of one job, to choose from.
  #strip() {
    const { pictures } = this.#run;
    if (pictures.length < 2) return "";
    return make(
      "div",
      { className: "strip", role: "group", ariaLabel: "Pictures of this job" },
      ...pictures.map(({ source }, place) => {
        const image = make("img", { src: source, alt: `Picture ${place + 1} of ${pictures.length}` });
        const chooser = make("button", { type: "button", onclick: () => desk.show(this.#run, place) }, image);
        chooser.setAttribute("aria-pressed", String(place === this.#index));
        return chooser;
      }),
    );
  }

  #controls() {
    const { settings, width, height } = this.#run.pictures[this.#index];
    const facts = [
      ...differences(this.#run),
      settings.seed === undefined ? null : `seed ${settings.seed}`,
      settings.steps && settings.sampler ? `${settings.sampler}, ${settings.steps} steps` : null,
      settings.guidance === undefined ? null : `guidance ${settings.guidance}`,
      `${width}×${height} pixels`,
      this.#run.seconds === null ? null : `${this.#run.seconds.toFixed(1)} s`,
    ].filter(Boolean);
    return make(
      "div",
      { slot: "controls", className: "controls" },
      this.#layers(),
      make("p", { className: "facts", textContent: facts.join(" · ") }),
      ...(this.#run.notes ?? []).map((note) => make("p", { className: "facts remark", textContent: `Note: ${note}` })),
      this.#downloads(),
    );
  }

  // One layer and one head in place of the mean.
  #layers() {
    const sites = (desk.info?.sites ?? []).filter(({ kind }) => kind === "cross");
    if (sites.length === 0 || this.#run.kind !== "paint") return "";
    const mean = make("option", { value: "", textContent: "those that point best" });
    const layer = make("select", { name: "layer" }, mean, ...sites.map(siteOption));
    const head = make("select", { name: "head", disabled: true });
    const problem = make("p", { className: "problem", role: "status" });
    const offerHeads = () => {
      const heads = sites.find(({ name }) => name === layer.value)?.heads ?? 0;
      const all = make("option", { value: "", textContent: "mean of all" });
      const each = Array.from({ length: heads }, (_, n) =>
        make("option", { value: n, textContent: `${n + 1} of ${heads}` }),
      );
      head.replaceChildren(all, ...each);
      head.disabled = heads === 0;
    };
    const choose = async () => {
      problem.textContent = "";
      const map = this.#map;
      const wanted = [layer.value, head.value].join();
      try {
        const data = layer.value === "" ? this.#run.maps[this.#index] : await this.#ask(layer.value, head.value);
        if (wanted !== [layer.value, head.value].join()) return;
        map.data = data;
        map.querySelector(".note").replaceWith(pointing(layer.value === "" ? "paint" : "layer"));
      } catch (error) {
        problem.textContent = error.type === "not_found" ? FORGOTTEN : error.message;
        if (error.type === "not_found" && this.#onAgain) {
          problem.append(
            " ",
            button("Paint it again", () => this.#onAgain(this.#run)),
          );
        }
      }
    };
    layer.addEventListener("change", () => {
      offerHeads();
      choose();
    });
    head.addEventListener("change", choose);
    offerHeads();
    return make(
      "div",
      { className: "layers" },
      make("label", {}, make("span", { textContent: "Layers" }), layer),
      make("label", {}, make("span", { textContent: "Head" }), head),
      problem,
    );
  }

  #ask(site, head) {
    const query = new URLSearchParams(head === "" ? { site } : { site, head });
    return getJson(`v1/jobs/${this.#run.job}/maps/${this.#number}?${query}`);
  }

  #downloads() {
    const { prompt, job, pictures } = this.#run;
    const { source, settings } = pictures[this.#index];
    const stem = `${slug(prompt)}-${settings.seed ?? this.#index}`;
    const problem = make("p", { className: "problem", role: "status" });
    const fetched = (what, ending) => async () => {
      problem.textContent = "";
      try {
        const blob = await (await request(`v1/jobs/${job}/${what}/${this.#number}`)).blob();
        const kind = blob.type.split("/")[1]?.replace("jpeg", "jpg") ?? ending;
        download(`${stem}-${what}.${ending ?? kind}`, await dataUrl(blob));
      } catch (error) {
        problem.textContent = error.type === "not_found" ? FORGOTTEN : error.message;
      }
    };
    const offered = [
      button("picture", () => download(`${stem}.png`, source)),
      button("word sheet", fetched("sheet", "png")),
      this.#run.kind === "paint" ? button("animation", fetched("animation")) : null,
      button("page", fetched("page", "html")),
      button("settings", () => downloadText(`${stem}.json`, `${JSON.stringify(settings, null, 2)}\n`)),
    ].filter(Boolean);
    return make(
      "div",
      { className: "downloads", role: "group", ariaLabel: "Download" },
      make("span", { textContent: "Download" }),
      ...offered,
      problem,
    );
  }
}

export function siteOption({ name, downscale }) {
  const patch = downscale > 1 ? `patches of ${downscale}×${downscale} latents` : "a patch a latent";
  return make("option", { value: name, textContent: `${siteTitle(name)}, ${patch}` });
}

// "up_blocks.1.attentions.0.transformer_blocks.0.attn2" as "decoder 1.0, attn2".
export function siteTitle(name) {
  const [, way, place = "", layer] = name.match(/^(down|mid|up)_blocks?\.?(\d+)?\.?attentions\.(\d+)/) ?? [];
  if (!way) return name;
  const part = { down: "encoder", mid: "middle", up: "decoder" }[way];
  return `${part} ${place === "" ? "" : `${place}.`}${layer} ${name.split(".").at(-1)}`;
}

// The honest figure of how well maps point, beside every map: of a picture that was painted, of one that was looked
// at, or of one layer.
export function pointing(kind) {
  return make("p", { slot: "note", className: "note", textContent: trust(desk.info?.pointing, kind) });
}
