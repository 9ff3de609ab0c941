// Standard noise, number for number as torch.randn draws it on a CPU from a generator of a seed.

const [SIZE, SHIFT] = [624, 397];
const BLOCK = 16; // numbers that are made of one another
const { fround } = Math;

// The Mersenne Twister (Matsumoto and Nishimura 1998, mt19937), seeded as PyTorch seeds it.
export class Generator {
  #state = new Uint32Array(SIZE);
  #next = SIZE;

  // seed: a whole number from 0, as a Number or a BigInt; its last 32 bits count
  constructor(seed) {
    this.#state[0] = Number(BigInt.asUintN(32, BigInt(seed)));
    for (let i = 1; i < SIZE; i++) {
      const before = this.#state[i - 1] ^ (this.#state[i - 1] >>> 30);
      this.#state[i] = Math.imul(1812433253, before) + i;
    }
  }

  // The next 32 bits.
  random() {
    if (this.#next === SIZE) this.#renew();
    let bits = this.#state[this.#next++];
    bits ^= bits >>> 11;
    bits ^= (bits << 7) & 0x9d2c5680;
    bits ^= (bits << 15) & 0xefc60000;
    return (bits ^ (bits >>> 18)) >>> 0;
  }

  #renew() {
    const state = this.#state;
    for (let i = 0; i < SIZE; i++) {
      const bits = (state[i] & 0x80000000) | (state[(i + 1) % SIZE] & 0x7fffffff);
      state[i] = state[(i + SHIFT) % SIZE] ^ (bits >>> 1) ^ (bits & 1 ? 0x9908b0df : 0);
    }
    this.#next = 0;
  }
}

// Draw `count` numbers, 16 or more, as ATen's normal_fill does (native/cpu/DistributionTemplates.h): uniform ones in
// their order, of which each block becomes normal by Box and Muller's method; the last 16 are drawn again where they are
// no block.
export function drawNoise(generator, count) {
  if (count < BLOCK) throw new RangeError(`${count} numbers asked for: PyTorch draws fewer than 16 by another method`);
  const noise = new Float32Array(count);
  const fill = (part) => part.forEach((_, place) => (part[place] = (generator.random() & 0xffffff) * 2 ** -24));
  fill(noise);
  for (let start = 0; start + BLOCK <= count; start += BLOCK) makeNormal(noise.subarray(start, start + BLOCK));
  if (count % BLOCK) {
    const last = noise.subarray(count - BLOCK);
    fill(last);
    makeNormal(last);
  }
  return noise;
}

// The first eight numbers of a block give the radius, the others the angle: normal_fill_16_AVX2, as all x86 CPUs of the
// last ten years run it. Other CPUs' noise differs in the last digits.
function makeNormal(block) {
  for (let i = 0; i < BLOCK / 2; i++) {
    const radius = fround(Math.sqrt(-2 * logarithm(fround(1 - block[i]))));
    const [sine, cosine] = sineAndCosine(fround(TWO_PI * block[i + BLOCK / 2]));
    block[i] = radius * cosine;
    block[i + BLOCK / 2] = radius * sine;
  }
}

// a·b + c, rounded once: compilers make this of ATen's products and sums. The product is exact in float64.
const fused = (a, b, c) => fround(a * b + c);

// A polynomial in x, its coefficients from the highest power down.
function polynomial(x, coefficients) {
  let sum = coefficients[0];
  for (let i = 1; i < coefficients.length; i++) sum = fused(sum, x, coefficients[i]);
  return sum;
}

const TWO_PI = fround(2 * Math.PI);
const ROOT_OF_HALF = fround(Math.SQRT1_2);
const LOGARITHM = [
  7.0376836292e-2, -1.151461031e-1, 1.167699874e-1, -1.2420140846e-1, 1.4249322787e-1, -1.6668057665e-1, 2.0000714765e-1,
  -2.4999993993e-1, 3.3333331174e-1,
].map(fround);
const LN_2 = [0.693359375, -2.1219444e-4].map(fround); // in two parts
const QUARTER_TURN = [-0.78515625, -2.418756484985351e-4, -3.774894977445941e-8].map(fround); // -π/4, in three
const COSINE = [2.443315711809948e-5, -1.388731625493765e-3, 4.166664568298827e-2].map(fround);
const SINE = [-1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1].map(fround);
const number = new Float32Array(1);
const bits = new Uint32Array(number.buffer);

// The logarithm of a number from 0 to 1, as Cephes computes it (native/cpu/avx_mathfun.h, log256_ps).
function logarithm(value) {
  number[0] = value;
  let exponent = (bits[0] >>> 23) - 126;
  bits[0] = (bits[0] & 0x7fffff) | 0x3f000000;
  let [x] = number;
  if (x < ROOT_OF_HALF) {
    exponent--;
    x = fround(x + fround(x - 1));
  } else {
    x = fround(x - 1);
  }
  const square = fround(x * x);
  const cube = fround(polynomial(x, LOGARITHM) * x);
  const tail = fused(-0.5, square, fused(cube, square, fround(exponent * LN_2[1])));
  return fused(exponent, LN_2[0], fround(x + tail));
}

// Sine and cosine of an angle from 0 to 2π, by eighths of a turn (native/cpu/avx_mathfun.h, sincos256_ps).
function sineAndCosine(angle) {
  const eighth = (Math.trunc(fround(angle * fround(4 / Math.PI))) + 1) & ~1;
  const x = QUARTER_TURN.reduce((rest, part) => fused(eighth, part, rest), angle);
  const square = fround(x * x);
  const even = fround(polynomial(square, COSINE) * square);
  const near1 = fround(1 + fused(even, square, -fround(square * 0.5)));
  const near0 = fused(fround(polynomial(square, SINE) * square), x, x);
  const [sine, cosine] = eighth & 2 ? [near1, near0] : [near0, near1];
  return [eighth & 4 ? -sine : sine, (eighth - 2) & 4 ? cosine : -cosine];
}
