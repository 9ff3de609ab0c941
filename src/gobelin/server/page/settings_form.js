// The form of an image's settings, made from the JSON schema that the server gives of them.

import { label, make } from "./elements.js";

const ELSEWHERE = new Set(["init_image", "mask", "strength"]); // are drawn, not typed
const WIDE = new Set(["negative_prompt"]);

export class SettingsForm {
  #fields = new Map();
  #info;

  constructor(root, info) {
    this.#info = info;
    for (const [name, schema] of Object.entries(info.settings.properties)) {
      const field = ELSEWHERE.has(name) ? null : this.#field(name, schema);
      if (field === null) continue;
      this.#fields.set(name, field);
      root.append(field.element);
    }
  }

  // What was said, by name; what was left out is the model's choice.
  get values() {
    const said = [...this.#fields].map(([name, { read }]) => [name, read()]);
    return Object.fromEntries(said.filter(([, value]) => value !== null));
  }

  set values(values) {
    for (const [name, { write }] of this.#fields) write(values[name] ?? null);
  }

  // In a few words, for the fold that the form is in.
  get summary() {
    const said = Object.entries(this.values).map(([name, value]) => `${label(name).toLowerCase()} ${value}`);
    return said.join(", ") || "as the model recommends";
  }

  // Show what is wrong with a field; false where there is no such field.
  blame(name, message) {
    this.forgive();
    const field = this.#fields.get(name);
    if (!field) return false;
    field.problem.textContent = message;
    field.input.setAttribute("aria-invalid", "true");
    return true;
  }

  forgive() {
    for (const { problem, input } of this.#fields.values()) {
      problem.textContent = "";
      input.removeAttribute("aria-invalid");
    }
  }

  #field(name, schema) {
    const kind = this.#kind(name, schema);
    if (kind === null) return null;
    const id = `setting-${name}`;
    const recommended = this.#info.recommended?.[name] ?? schema.default ?? null;
    const input = kind.choices ? chosen(kind.choices, recommended) : typed(kind, recommended);
    Object.assign(input, { id, name });
    const problem = make("p", { className: "problem", id: `${id}-problem` });
    const hint = make("p", { className: "hint", id: `${id}-hint`, textContent: hintOf(schema, kind) });
    input.setAttribute("aria-describedby", `${id}-hint ${id}-problem`);
    const element = make(
      "div",
      { className: WIDE.has(name) ? "field wide" : "field" },
      make("label", { htmlFor: id, textContent: label(name) }),
      input,
      problem,
      hint,
    );
    const read = () => {
      const text = input.value.trim();
      return text === "" ? null : kind.number ? Number(text) : text;
    };
    const write = (value) => {
      input.value = value === null || typeof value === "object" ? "" : value;
    };
    return { element, input, problem, read, write };
  }

  // The schema without what else may stand in the setting's place: null, or a list for several images.
  #kind(name, schema) {
    if (name === "sampler") return { choices: this.#info.samplers };
    const all = (schema.anyOf ?? [schema]).map((one) => resolved(one, this.#info.settings));
    const one =
      all.find(({ type }) => type === "integer" || type === "number") ?? all.find(({ type }) => type === "string");
    const choices = all.find((each) => each.enum)?.enum;
    if (choices) return { choices };
    if (!one) return null;
    if (one.type === "string") return {};
    const { minimum, maximum, multipleOf } = { ...schema, ...one };
    return { number: true, minimum, maximum, step: multipleOf ?? (one.type === "integer" ? 1 : "any") };
  }
}

// The first part of a setting's description: what follows says what holds without it, which the field shows.
function hintOf({ description = "" }, { choices }) {
  const hint = description.split(";")[0];
  return choices ? hint.replace(/: .*/s, "") : hint;
}

function resolved(schema, root) {
  return schema.$ref
    ? schema.$ref
        .slice(2)
        .split("/")
        .reduce((part, key) => part[key], root)
    : schema;
}

function typed({ number, minimum, maximum, step }, recommended) {
  const input = make("input", { type: number ? "number" : "text", autocomplete: "off" });
  if (number) {
    for (const [key, value] of Object.entries({ min: minimum, max: maximum, step })) {
      if (value !== undefined && Math.abs(value) !== Infinity) input[key] = value;
    }
    if (minimum >= 0 && step === 1) input.inputMode = "numeric";
  } else {
    input.dir = "auto";
  }
  if (recommended !== null && typeof recommended !== "object") input.placeholder = recommended;
  return input;
}

function chosen(choices, recommended) {
  const first = make("option", {
    value: "",
    textContent: recommended === null ? "as recommended" : `${recommended}, as recommended`,
  });
  return make("select", {}, first, ...choices.map((value) => make("option", { value, textContent: value })));
}
