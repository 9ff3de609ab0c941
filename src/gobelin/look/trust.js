// How far to trust a model's word maps, in a sentence: the figures that its folder keeps of how well they point.

const WEAK = ["relation", "place"]; // kinds of words whose maps hardly point

// `figures` are those of gobelin.json ("pointing"), or none; `kind` says what is looked at: "paint", a picture that was
// painted, "look", another picture, or "layer", a layer or head alone.
export function trust(figures, kind) {
  if (!Number.isFinite(figures?.noun?.iou))
    return "How well this model's words point was not measured: read its maps as hints.";
  if (kind === "layer") return "How well single layers and heads point was not measured: read them as hints.";
  const { iou, perfect, everywhere } = figures.noun;
  const bounds = perfect
    ? `; a perfect map of this resolution reaches ${share(perfect)}, one that lights up everywhere ${share(everywhere)}`
    : "";
  const weak = WEAK.filter((name) => figures[name]).map((name) => `${name} ${share(figures[name].iou)}`);
  return (
    `How far to trust this: on this model's own pictures the map of a noun and the pixels of its object overlap by ` +
    `${share(iou)} (intersection over union${bounds}).` +
    (weak.length > 0 ? ` Words of other kinds point less: ${weak.join(", ")}.` : "") +
    (kind === "look" ? " On pictures of another kind than the model's own it was not measured." : "")
  );
}

const share = (value) => `${Math.round(100 * value)}\u00a0%`;
