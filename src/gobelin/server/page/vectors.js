// A vector of numbers as a strip of coloured cells: red above zero, blue below, paler towards it.

import { make } from "./elements.js";

const SHOWN = 4; // numbers written out beside the strip

export function vectorStrip(values, name) {
  const most = Math.max(...values.map(Math.abs)) || 1;
  const cells = values.map((value) => {
    const cell = make("i", { title: value.toFixed(3) });
    cell.style.setProperty("--strength", `${Math.round((100 * Math.abs(value)) / most)}%`);
    cell.className = value < 0 ? "below" : "above";
    return cell;
  });
  const strip = make("span", { className: "strip-cells", role: "img" }, ...cells);
  const written = values.slice(0, SHOWN).map((value) => value.toFixed(2).replace("-", "−"));
  const rest = values.length > SHOWN ? ` … ${values.length} numbers` : "";
  strip.ariaLabel = `${name}: ${written.join(", ")}${rest}`;
  return make("span", { className: "vector" }, strip, make("small", { textContent: `${written.join(", ")}${rest}` }));
}
