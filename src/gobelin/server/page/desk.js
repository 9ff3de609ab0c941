// The desk: what is known of the server, and the run that lies on it, which all views share.
//
// A run is a finished job with all that the page shows of it, so that it can be put away and taken out again:
// { key, kind, prompt, to, body, seconds, when, job, notes, pictures: [{ source, width, height, settings }], maps,
//   previews: [{ step, first, images }], offset }
// `offset` is the number of its first picture in its job.

import { dataUrl } from "./elements.js";
import { getJson, request } from "./client.js";

class Desk extends EventTarget {
  info = null;
  run = null;
  index = 0;

  // Lay a run on the desk; `fresh` says that it was just made.
  show(run, index = 0, fresh = false) {
    [this.run, this.index] = [run, index];
    this.dispatchEvent(new CustomEvent("run", { detail: { fresh } }));
  }

  get picture() {
    return this.run?.pictures[this.index] ?? null;
  }

  get map() {
    return this.run?.maps[this.index] ?? null;
  }
}

export const desk = new Desk();

// Fetch what a finished job made.
export async function gather(job, body, previews = []) {
  const pictures = await Promise.all(
    job.images.map(async ({ url, width, height, settings }) => {
      const source = await dataUrl(await (await request(relative(url))).blob());
      return { source, width, height, settings: settings ?? {} };
    }),
  );
  const maps = await Promise.all((job.maps ?? []).map((url) => getJson(relative(url))));
  // Of a picture that an edit was given, the one in its map is no more than the model's idea of it.
  for (const [place, map] of maps.entries()) map.image = pictures[place].source;
  return {
    key: crypto.randomUUID?.() ?? `${Date.now()}-${Math.random()}`, // there is none where HTTPS is missing
    kind: body.kind,
    prompt: body.prompt ?? body.caption ?? "",
    to: body.to ?? null,
    body: withoutImages(body),
    seconds: job.seconds ?? null,
    notes: job.notes ?? [],
    when: Date.now(),
    job: job.id,
    pictures,
    maps,
    previews,
    offset: 0,
  };
}

// How a run differs from one of its settings alone, in words: its controls, and what was broken in it.
export function differences({ body }) {
  const broken = { shuffle_words: "its words shuffled", silence_site: "a layer silenced", remove_bos: "BOS removed" };
  const controls = (body.controls ?? []).flatMap((control) => {
    if (control.kind === "reweight")
      return Object.entries(control.words).map(([word, weight]) => `“${word}” ${weight}×`);
    if (control.kind === "suppress") return [`without “${control.word}”`];
    return Object.keys(control.regions ?? {}).map((word) => `“${word}” in a place`);
  });
  return [
    ...controls,
    ...(body.broken ? [broken[body.broken]] : []),
    ...(body.settings?.mask ? ["a part painted anew"] : []),
  ];
}

// Whether a run's settings alone paint it again: neither an image nor a control nor an edit took part.
export const isRepeatable = ({ body }) =>
  body.kind === "paint" && !body.broken && !body.settings?.init_image && (body.controls ?? []).length === 0;

// Behind a proxy the server may not be at the root of its host.
const relative = (url) => url.replace(/^\//, "");

// A request without its images, which would be kept twice.
function withoutImages(body) {
  const settings = { ...body.settings };
  for (const name of ["init_image", "mask"]) if (settings[name]) settings[name] = "(an image)";
  const { image: _, ...rest } = body;
  return { ...rest, settings };
}
