// Errors in words: what is wrong, and what to do.

const COPY_AGAIN = "copy the whole folder to the host again";
const SENTENCES = {
  vectors: () =>
    "This browser has no WebAssembly with vectors (SIMD), which painting needs: take a newer one, such as Chrome 111, " +
    "Firefox 119 or Safari 16.4.",
  memory: () => "There is not enough memory to paint: close other tabs, and load this page again.",
  missing: (name) => `This page's file ${name} is missing: ${COPY_AGAIN}.`,
  damaged: (name) => `This page's file ${name} is damaged or cut short: ${COPY_AGAIN}.`,
  unreachable: (name) => `This page's file ${name} could not be read, as the connection failed: load this page again.`,
  empty: () => "The prompt is empty: say in a few words what to paint.",
  half: () => "The prompt holds half a character: give whole ones.",
  long: (most) => `The prompt is too long: give ${most} characters at most.`,
};

// An error that is a sentence already.
export class PageError extends Error {
  constructor(kind, subject) {
    super(SENTENCES[kind](subject));
  }
}

// Say any error in a sentence: memory that ran out in ours, others with their own words at the end.
export function sentenceOf(error) {
  if (error instanceof PageError) return error.message;
  const said = String(error?.message ?? error);
  const isMemory = error instanceof RangeError || /out of memory|bad_alloc|allocat|\bOOM\b/i.test(said);
  return isMemory ? SENTENCES.memory() : `Painting failed: ${said.slice(0, 300)}`;
}
