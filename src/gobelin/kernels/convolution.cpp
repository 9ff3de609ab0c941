// Convolutions of 3 x 3 in bfloat16, channels last, stride 1, and their gradients, by AMX.
//
// Feature maps lie in a row of positions, one below the other, with one position of zeros after every row of pixels and
// a row of zeros after every sample: what is beyond an edge is then zero wherever one looks from, also to the left,
// which is the end of the row above. A neighbour is at the same distance from every position, so that a convolution is
// a product of matrices. With x at position p, of `stride` positions a row,
//
//     out[p] = bias + sum over (dy, dx) of weight[dy, dx] x[p + dy stride + dx]
//     dx[p] = sum over (dy, dx) of transposed weight[dy, dx] dout[p - dy stride - dx]
//     dweight[dy, dx] = sum over p of dout[p] x[p + dy stride + dx]
//
// The neighbours (-1, 0, 1) in a row lie one after the other: for a dy they are one vector of 3 times the channels.
// Weights are float32 and rounded on the way; sums are float32. Sums run in one order, whatever the number of threads.

#include "bfloat16.hpp"
#include "threads.hpp"
#include "tiles.hpp"

namespace {

constexpr int64_t SIDE = 3, PLACES = SIDE * SIDE;
constexpr int64_t POSITIONS = 1024; // of the samples that make a piece of work
constexpr int64_t POSITIONS_AT_ONCE = 2048; // that are added to dweight: both factors stay in the L2 cache

// ---- What Python hands over (convolution.py has the same structure) ----

struct Problem {
    int64_t batch, height, width, inputs, outputs;
    const uint16_t *x, *grad;   // [batch, height, width, inputs], [..., outputs]
    const float *weight, *bias; // [outputs, inputs, 3, 3], [outputs] or null
    uint16_t *out;              // [..., outputs], or dx [..., inputs]
    float *dweight, *dbias;
};

// The row of positions of some samples.
struct Grid {
    const int64_t height, width, stride, of_sample;

    explicit Grid(const Problem &problem)
        : height(problem.height), width(problem.width), stride(width + 1), of_sample((height + 1) * stride) {}

    int64_t before() const { return stride + 1; } // zeros that are looked at before the first position
};

// ---- Forward, and back to the input: the same with weights that are turned round ----

// Weights as right factor: tile by tile of outputs, for every dy, steps of 32 of the (dx, input) that lie in a row.
class PackedWeight {
  public:
    PackedWeight(const Problem &problem, bool backward)
        : problem(problem), backward(backward), inputs(backward ? problem.outputs : problem.inputs),
          outputs(backward ? problem.inputs : problem.outputs), in_row(SIDE * inputs),
          row_steps((in_row + DEPTH - 1) / DEPTH), steps(SIDE * row_steps),
          tiles((outputs + TILE - 1) / TILE), numbers(tiles * steps * TILE * DEPTH) {}

    void pack(int64_t tile) const {
        const int64_t to_output = backward ? PLACES : inputs * PLACES, to_input = backward ? outputs * PLACES : PLACES;
        const __m512i numbers_0_to_15 = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
        const __m512i lanes = _mm512_mullo_epi32(_mm512_set1_epi32((int)to_output), numbers_0_to_15);
        const __mmask16 there = first_lanes(outputs - tile * TILE);
        const float *first = problem.weight + tile * TILE * to_output;
        for (int64_t dy = 0; dy < SIDE; ++dy) {
            // Of 16 outputs, the k-th of the numbers that lie in a row.
            auto weights = [&](int64_t k) {
                if (k >= in_row) return all(0);
                const int64_t dx = k / inputs, place = dy * SIDE + dx;
                const float *from = first + k % inputs * to_input + (backward ? PLACES - 1 - place : place);
                return _mm512_mask_i32gather_ps(all(0), there, lanes, from, 4);
            };
            uint16_t *to = numbers + (tile * steps + dy * row_steps) * TILE * DEPTH;
            for (int64_t k = 0; k < row_steps * DEPTH; k += 2, to += DEPTH)
                _mm512_store_si512(to, in_pairs(rounded(weights(k), weights(k + 1))));
        }
    }

    const Problem &problem;
    const bool backward;
    const int64_t inputs, outputs, in_row, row_steps, steps, tiles;
    Buffer<uint16_t> numbers;
};

struct Packing {
    const PackedWeight &weight;
    void operator()(int64_t tile) { weight.pack(tile); }
};

// How the pixels are cut into pieces of work: some samples, or a band of rows of one.
struct Cut {
    const int64_t samples, rows, bands, count;

    explicit Cut(const Problem &problem, const Grid &grid)
        : samples(std::clamp<int64_t>(POSITIONS / grid.of_sample, 1, problem.batch)),
          rows(samples > 1 ? grid.height : std::clamp<int64_t>(POSITIONS / grid.stride, 1, grid.height)),
          bands((grid.height + rows - 1) / rows), count((problem.batch + samples - 1) / samples * bands) {}
};

class Convolution {
  public:
    explicit Convolution(const PackedWeight &weight)
        : weight(weight), problem(weight.problem), grid(problem), cut(problem, grid),
          of_sample((cut.rows + 1) * grid.stride), positions(round_up(cut.samples * of_sample, ROW_TILES * TILE)),
          size((2 * grid.before() + positions) * weight.inputs + 2 * DEPTH), padded(size), steps(weight.steps),
          pixels(positions), sums(ROW_TILES * TILE * COLUMN_TILES * TILE) {
        std::memset(padded, 0, (size_t)size * sizeof(uint16_t));
        for (int64_t k = 0; k < weight.steps; ++k)
            steps[k] = k / weight.row_steps * grid.stride * weight.inputs + k % weight.row_steps * DEPTH;
        for (int64_t p = 0; p < positions; ++p) {
            const int64_t sample = p / of_sample, y = p % of_sample / grid.stride, x = p % of_sample % grid.stride;
            const bool is_pixel = sample < cut.samples && y < cut.rows && x < grid.width;
            pixels[p] = is_pixel ? (int32_t)((sample * grid.height + y) * grid.width + x) : -1;
        }
    }

    void operator()(int64_t piece) {
        const int64_t sample = piece / cut.bands * cut.samples, count = std::min(cut.samples, problem.batch - sample);
        const int64_t row = piece % cut.bands * cut.rows, rows = std::min(cut.rows, grid.height - row);
        const int64_t first = (sample * grid.height + row) * grid.width;
        const uint16_t *in = (weight.backward ? problem.grad : problem.x) + first * weight.inputs;
        for (int64_t s = 0; s < count; ++s)
            for (int64_t y = -1; y < rows + 1; ++y)
                read(in + (s * grid.height + y) * grid.width * weight.inputs, s * of_sample + y * grid.stride,
                     row + y >= 0 && row + y < grid.height);
        uint16_t *out = problem.out + first * weight.outputs;
        const int64_t pixels_there = ((count - 1) * grid.height + rows) * grid.width;
        for (int64_t p = 0; p < count * of_sample; p += ROW_TILES * TILE)
            for (int64_t tile = 0; tile < weight.tiles; tile += COLUMN_TILES) {
                const int64_t columns = std::min(COLUMN_TILES, weight.tiles - tile);
                Left left{padded + p * weight.inputs, weight.inputs, TILE * weight.inputs, steps};
                Right right{weight.numbers + tile * weight.steps * TILE * DEPTH, DEPTH, weight.steps * TILE * DEPTH,
                            TILE * DEPTH};
                multiply_tiles<false>(ROW_TILES, columns, sums, COLUMN_TILES * TILE, left, right, weight.steps);
                write(out, pixels_there, p, tile * TILE);
            }
    }

  private:
    // Copy a row of pixels to its positions, or clear them.
    void read(const uint16_t *from, int64_t position, bool is_there) {
        uint16_t *to = padded + (grid.before() + position) * weight.inputs;
        const size_t bytes = (size_t)(grid.width * weight.inputs) * sizeof(uint16_t);
        is_there ? std::memcpy(to, from, bytes) : std::memset(to, 0, bytes);
    }

    // Write the sums at 32 positions, of up to 48 outputs from `output` on.
    void write(uint16_t *out, int64_t pixels_there, int64_t position, int64_t output) const {
        for (int64_t row = 0; row < ROW_TILES * TILE; ++row) {
            const int64_t pixel = pixels[position + row];
            if (pixel < 0 || pixel >= pixels_there) continue;
            for (int64_t c = 0; c < COLUMN_TILES * TILE && output + c < weight.outputs; c += LANES) {
                __mmask16 there = first_lanes(weight.outputs - output - c);
                Vector sum = _mm512_load_ps(sums + row * COLUMN_TILES * TILE + c);
                if (!weight.backward && problem.bias != nullptr)
                    sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(there, problem.bias + output + c));
                store(out + pixel * weight.outputs + output + c, there, sum);
            }
        }
    }

    const TileConfiguration configuration{};
    const PackedWeight &weight;
    const Problem &problem;
    const Grid grid;
    const Cut cut;
    const int64_t of_sample, positions, size;
    Buffer<uint16_t> padded;
    Buffer<int64_t> steps;
    Buffer<int32_t> pixels;
    Buffer<float> sums;
};

int convolve(const Problem &problem, bool backward, int threads, Parallel parallel) try {
    PackedWeight weight(problem, backward);
    if (run<Packing>(weight, weight.tiles, threads, parallel)) return 1;
    return run<Convolution>(weight, Cut(problem, Grid(problem)).count, threads, parallel);
} catch (const std::bad_alloc &) {
    return 1;
}

// ---- Back to the weight ----

// Both factors: x turned, [inputs, positions], and grad in pairs of positions, [positions / 2, outputs, 2]; these twice,
// beginning with an even and with an odd position, so that whatever the distance of a neighbour, tiles begin where cache
// lines do: to load others takes six times as long. They are of some samples at a time; what is no pixel stays zero.
class Factors {
  public:
    explicit Factors(const Problem &problem)
        : problem(problem), grid(problem), inputs(round_up(problem.inputs, TILE)),
          outputs(round_up(problem.outputs, TILE)),
          samples(round_up(std::clamp<int64_t>(POSITIONS_AT_ONCE / grid.of_sample, 1, problem.batch), 2)),
          positions(round_up(samples * grid.of_sample, DEPTH)), before(round_up(grid.before(), 2) + 2),
          length(before + positions + before), row(positions % (2 * DEPTH) == 0 ? positions + DEPTH : positions),
          turned(inputs * row), even(length * outputs), odd(length * outputs),
          sums((problem.batch + 1) / 2 * outputs) {
        clear();
    }

    // Take on the samples from `first` on; returns how many pairs of samples they are.
    int64_t begin(int64_t first) {
        begun = first;
        const int64_t count = std::min(samples, problem.batch - first);
        if (count < samples) clear();
        return (count + 1) / 2;
    }

    // Pack two samples, which is an even number of positions.
    void pack(int64_t of_samples) const {
        const int64_t sample = 2 * of_samples, first = begun + sample, pixels = grid.height * grid.width;
        const int64_t count = std::min<int64_t>(2, problem.batch - first);
        const uint16_t *x = problem.x + first * pixels * problem.inputs;
        const uint16_t *grad = problem.grad + first * pixels * problem.outputs;
        float *sum = sums + first / 2 * outputs;
        std::memset(sum, 0, (size_t)outputs * sizeof(float));
        for (int64_t pixel = 0; pixel < count * pixels; pixel += grid.width) {
            const int64_t y = pixel % pixels / grid.width;
            const int64_t position = (sample + pixel / pixels) * grid.of_sample + y * grid.stride;
            turn(x + pixel * problem.inputs, position);
            pair(grad + pixel * problem.outputs, position, sum);
        }
    }

    // The sum of grad over all pixels.
    float sum_of(int64_t output) const {
        float sum = 0;
        for (int64_t i = 0; i < (problem.batch + 1) / 2; ++i) sum += sums[i * outputs + output];
        return sum;
    }

    const Problem &problem;
    const Grid grid;
    const int64_t inputs, outputs, samples, positions, before, length, row; // of `turned`: an odd number of cache lines
    Buffer<uint16_t> turned, even, odd;

  private:
    void clear() {
        std::memset(turned, 0, (size_t)(inputs * row) * sizeof(uint16_t));
        std::memset(even, 0, (size_t)(length * outputs) * sizeof(uint16_t));
        std::memset(odd, 0, (size_t)(length * outputs) * sizeof(uint16_t));
    }

    // A row of pixels; blocks of 16 positions and 32 channels are turned in registers.
    void turn(const uint16_t *x, int64_t position) const {
        const __m512i halves = _mm512_set_epi16(31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1, //
                                                30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
        for (int64_t column = 0; column < grid.width; column += LANES)
            for (int64_t c = 0; c < problem.inputs; c += 2 * LANES) {
                PairVector block[LANES];
                for (int64_t i = 0; i < LANES; ++i) {
                    __mmask32 there = column + i < grid.width ? first_32(problem.inputs - c) : 0;
                    block[i] = _mm512_maskz_loadu_epi16(there, x + (column + i) * problem.inputs + c);
                }
                transpose(block);
                __mmask16 there = first_lanes(grid.width - column);
                for (int64_t channel = c; channel < std::min(c + 2 * LANES, problem.inputs); channel += 2) {
                    __m512i both = _mm512_permutexvar_epi16(halves, block[(channel - c) / 2]);
                    uint16_t *to = turned + channel * row + position + column;
                    _mm256_mask_storeu_epi16(to, there, _mm512_castsi512_si256(both));
                    if (channel + 1 < problem.inputs)
                        _mm256_mask_storeu_epi16(to + row, there, _mm512_extracti64x4_epi64(both, 1));
                }
            }
    }

    // A row of pixels, each with the one before it and with the one after; before the first and after the last is zero.
    void pair(const uint16_t *grad, int64_t position, float *sum) const {
        const __m512i lower = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, //
                                               39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
        const __m512i upper = _mm512_add_epi16(lower, _mm512_set1_epi16(LANES));
        constexpr uint32_t ONES = 0x3f803f80;
        for (int64_t c = 0; c < outputs; c += 2 * LANES) {
            const __mmask32 there = first_32(problem.outputs - c);
            const bool is_whole = c + LANES < outputs;
            PairVector last = _mm512_setzero_si512();
            Vector totals[2] = {all(0), all(0)};
            for (int64_t i = 0; i <= grid.width; ++i) {
                PairVector next = i < grid.width ? _mm512_maskz_loadu_epi16(there, grad + i * problem.outputs + c)
                                            : _mm512_setzero_si512();
                const int64_t p = position + i - 1;
                PairVector first = _mm512_permutex2var_epi16(last, lower, next);
                PairVector second = _mm512_permutex2var_epi16(last, upper, next);
                uint16_t *to = (p % 2 == 0 ? even : odd) + ((before + p + 1) / 2 * outputs + c) * 2;
                _mm512_store_si512(to, first);
                if (is_whole) _mm512_store_si512(to + 2 * LANES, second);
                if (p % 2 == 0) { // every pixel is in one of these
                    totals[0] = add_product(totals[0], first, ONES);
                    totals[1] = add_product(totals[1], second, ONES);
                }
                last = next;
            }
            for (int half = 0; half < 1 + is_whole; ++half) {
                float *to = sum + c + half * LANES;
                _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), totals[half]));
            }
        }
    }

    Buffer<float> sums; // [pairs of samples, outputs]: of grad
    int64_t begun = 0;
};

struct FactorPacking {
    const Factors &factors;
    void operator()(int64_t samples) { factors.pack(samples); }
};

// The sums of all blocks of 32 inputs and 48 outputs, for all 9 places of a kernel. A block is a piece of work.
class WeightGradient {
  public:
    static constexpr int64_t WIDTH = COLUMN_TILES * TILE, HEIGHT = ROW_TILES * TILE, SIZE = HEIGHT * WIDTH;

    explicit WeightGradient(const Problem &problem, const Factors &factors)
        : problem(problem), factors(factors), across((problem.outputs + WIDTH - 1) / WIDTH),
          blocks((problem.inputs + HEIGHT - 1) / HEIGHT * across),
          steps(factors.positions / DEPTH), sums(blocks * PLACES * SIZE) {
        for (int64_t k = 0; k < factors.positions / DEPTH; ++k) steps[k] = k * DEPTH;
    }

    template <bool ADD> void add(int64_t block) const {
        const int64_t input = block / across * HEIGHT, output = block % across * WIDTH;
        const int64_t rows = std::min(ROW_TILES, (factors.inputs - input) / TILE);
        const int64_t columns = std::min(COLUMN_TILES, (factors.outputs - output) / TILE);
        for (int64_t place = 0; place < PLACES; ++place) {
            const int64_t dy = place / SIDE - 1, dx = place % SIDE - 1;
            const int64_t of_grad = factors.before - dy * factors.grid.stride - dx;
            const uint16_t *pairs = of_grad % 2 == 0 ? factors.even : factors.odd;
            Left left{factors.turned + input * factors.row, factors.row, TILE * factors.row, steps};
            Right right{pairs + ((of_grad + 1) / 2 * factors.outputs + output) * 2, 2 * factors.outputs, 2 * TILE,
                        DEPTH * factors.outputs};
            float *to = sums + (block * PLACES + place) * SIZE;
            multiply_tiles<ADD>(rows, columns, to, WIDTH, left, right, factors.positions / DEPTH);
        }
    }

    void write(int64_t block) const {
        const int64_t input = block / across * HEIGHT, output = block % across * WIDTH;
        for (int64_t o = output; o < std::min(output + WIDTH, problem.outputs); ++o)
            for (int64_t i = input; i < std::min(input + HEIGHT, problem.inputs); ++i)
                for (int64_t place = 0; place < PLACES; ++place)
                    problem.dweight[(o * problem.inputs + i) * PLACES + place] =
                        sums[(block * PLACES + place) * SIZE + (i - input) * WIDTH + o - output];
    }

    const Problem &problem;
    const Factors &factors;
    const int64_t across, blocks;

  private:
    Buffer<int64_t> steps;
    Buffer<float> sums;
};

template <bool ADD> struct Adding {
    const WeightGradient &gradient;
    const TileConfiguration configuration{};
    void operator()(int64_t block) { gradient.add<ADD>(block); }
};

struct Writing {
    const WeightGradient &gradient;
    void operator()(int64_t block) { gradient.write(block); }
};

int compute_weight_gradient(const Problem &problem, int threads, Parallel parallel) try {
    Factors factors(problem);
    const WeightGradient gradient(problem, factors);
    for (int64_t first = 0; first < problem.batch; first += factors.samples) {
        run<FactorPacking>((const Factors &)factors, factors.begin(first), threads, parallel);
        const auto add = first == 0 ? run<Adding<false>, WeightGradient> : run<Adding<true>, WeightGradient>;
        add(gradient, gradient.blocks, threads, parallel);
    }
    run<Writing>(gradient, gradient.blocks, threads, parallel);
    for (int64_t o = 0; o < problem.outputs; ++o) problem.dbias[o] = factors.sum_of(o);
    return 0;
} catch (const std::bad_alloc &) {
    return 1;
}

} // namespace

// Whether this process may use AMX.
extern "C" int has_tiles() { return ask_for_tiles(); }

// All return 0, or 1 where there is not enough memory.
extern "C" int convolution_forward(const Problem *problem, int threads, Parallel parallel) {
    return convolve(*problem, false, threads, parallel);
}
extern "C" int convolution_backward_input(const Problem *problem, int threads, Parallel parallel) {
    return convolve(*problem, true, threads, parallel);
}
extern "C" int convolution_backward_weight(const Problem *problem, int threads, Parallel parallel) {
    return compute_weight_gradient(*problem, threads, parallel);
}
