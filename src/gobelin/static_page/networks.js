// The networks: graphs that ONNX Runtime Web runs, read with a word on how far that is.

import { PageError } from "./sentences.js";

// Half of the cores, four at most: threads wait for each other many times a pass, and the page needs a core to show it.
const threadCount = (cores) => Math.min(4, Math.ceil(cores / 2));
// A module with one instruction of 128 bits (i8x16.splat), which a browser without them does not take.
const VECTORS = new Uint8Array([
  0, 97, 115, 109, 1, 0, 0, 0, 1, 5, 1, 96, 0, 1, 123, 3, 2, 1, 0, 10, 8, 1, 6, 0, 65, 0, 253, 15, 11,
]);

// Open the networks that model.json describes; `tell(share)` is called while their files are read.
export async function openNetworks(model, tell) {
  if (typeof WebAssembly === "undefined" || !WebAssembly.validate(VECTORS)) throw new PageError("vectors");
  const contents = await readFiles(model.files, tell);
  const [program, script] = [".gz", ".js"].map((end) => model.files.find(({ name }) => name.endsWith(end)));
  const ort = await import(addressOf(script)).catch(() => {
    throw new PageError("missing", script.name);
  });
  ort.env.wasm.wasmBinary = contents.get(program.name).buffer;
  ort.env.wasm.numThreads = self.crossOriginIsolated ? threadCount(navigator.hardwareConcurrency || 1) : 1;
  ort.env.logLevel = "error";
  const sessions = {};
  for (const [name, file] of Object.entries(model.graphs)) {
    sessions[name] = await ort.InferenceSession.create(contents.get(file), {
      executionProviders: ["wasm"],
      graphOptimizationLevel: "disabled", // optimizing takes longer than it saves in the first picture
    });
    contents.delete(file);
  }
  const floats = (data, ...shape) => new ort.Tensor("float32", data, shape);
  const [channels, height, width] = model.latents;
  const length = model.tokenizer.maxLength;
  return {
    threads: ort.env.wasm.numThreads,

    // ids of two texts → their embeddings, as a tensor
    async encode([negative, positive]) {
      const ids = new Int32Array(2 * length);
      ids.set(negative);
      ids.set(positive, length);
      const outputs = await sessions.text.run({ token_ids: new ort.Tensor("int32", ids, [2, length]) });
      return outputs.text_embeddings;
    },

    // → {negative, positive} predictions, and the prompt's attention {cross, own}
    async predict(latents, timestep, embeddings) {
      const { prediction, cross, own } = await sessions.unet.run({
        latents: floats(latents, 1, channels, height, width),
        timestep: floats(Float32Array.of(timestep), 1),
        text_embeddings: embeddings,
      });
      const half = latents.length;
      return {
        negative: prediction.data.slice(0, half),
        positive: prediction.data.slice(half),
        attention: { cross, own },
      };
    },

    // attention, and words with their tokens' places → each word's share of each patch, [words, patches]
    async wordMaps({ cross, own }, words) {
      if (words.length === 0) return new Float32Array(0);
      const marks = new Float32Array(words.length * length);
      words.forEach(({ tokens }, word) => tokens.forEach((place) => (marks[word * length + place] = 1)));
      const { shares } = await sessions.maps.run({
        cross: floats(cross.data, ...cross.dims),
        own: floats(own.data, ...own.dims),
        words: floats(marks, words.length, length),
      });
      return shares.data;
    },

    // → bytes of an image: red, green, blue, opacity
    async decode(latents) {
      const { levels } = await sessions.decoder.run({ latents: floats(latents, 1, channels, height, width) });
      return new Uint8ClampedArray(levels.data);
    },
  };
}

// Read the large files, and unpack what is compressed.
async function readFiles(files, tell) {
  const large = files.filter(({ name }) => !name.endsWith(".js"));
  const all = large.reduce((sum, { bytes }) => sum + bytes, 0);
  let read = 0;
  const readOne = async (file) => {
    const parts = [];
    for await (const part of partsOf(file)) {
      parts.push(part);
      tell(Math.min(1, (read += part.length) / all));
    }
    return [file.name, await whole(new Blob(parts), file)];
  };
  return new Map(await Promise.all(large.map(readOne)));
}

// A file's address has its version, so that a cache may keep it for ever.
const addressOf = ({ name, version }) => `./${name}?v=${version}`;

async function* partsOf(file) {
  const response = await fetch(addressOf(file)).catch(() => {
    throw new PageError("unreachable", file.name);
  });
  if (!response.ok) throw new PageError("missing", file.name);
  const reader = response.body.getReader();
  for (;;) {
    const { done, value } = await reader.read().catch(() => {
      throw new PageError("unreachable", file.name);
    });
    if (done) return;
    yield value;
  }
}

async function whole(blob, { name, bytes }) {
  const isPacked = name.endsWith(".gz");
  const content = new Uint8Array(await blob.arrayBuffer());
  // Some hosts say that such a file is compressed, and then it arrives unpacked.
  if (isPacked && WebAssembly.validate(content)) return content;
  if (content.length !== bytes) throw new PageError("damaged", name);
  if (!isPacked) return content;
  try {
    const stream = blob.stream().pipeThrough(new DecompressionStream("gzip"));
    return new Uint8Array(await new Response(stream).arrayBuffer());
  } catch {
    throw new PageError("damaged", name);
  }
}
