// PNG files that carry their settings, as gobelin.formats.png writes them.

const SIGNATURE_AND_HEADER = 8 + 25; // bytes: what stands before the chunk of text
const encoder = new TextEncoder();

// Put a text, under a keyword, into a PNG: a chunk iTXt, in UTF-8 (PNG specification, third edition, 11.3.3.4).
export async function withText(png, keyword, text) {
  const bytes = new Uint8Array(await png.arrayBuffer());
  const body = encoder.encode(`iTXt${keyword}\0\0\0\0\0${text}`);
  const chunk = new Uint8Array(body.length + 8);
  const view = new DataView(chunk.buffer);
  view.setUint32(0, body.length - 4); // of what follows the type
  chunk.set(body, 4);
  view.setUint32(body.length + 4, checksum(body));
  return new Blob([bytes.subarray(0, SIGNATURE_AND_HEADER), chunk, bytes.subarray(SIGNATURE_AND_HEADER)], {
    type: "image/png",
  });
}

// CRC-32, bit by bit: texts are short.
function checksum(bytes) {
  let crc = -1;
  for (const byte of bytes) {
    crc ^= byte;
    for (let bit = 0; bit < 8; bit++) crc = (crc >>> 1) ^ (crc & 1 ? 0xedb88320 : 0);
  }
  return ~crc >>> 0;
}
