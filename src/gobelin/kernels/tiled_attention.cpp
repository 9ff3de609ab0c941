// Scaled dot-product attention for inference, O = softmax(scale Q K^T) V, by the matrix tiles of AMX.
//
// For one head of a sample: Q, O [queries, width] and K, V [keys, width] in bfloat16, scale = 1 / sqrt(width); a mask
// hides keys from all queries of a sample. A block of 32 queries goes through the keys, 64 at once: logits by tiles,
// P = 2^(logits - shift) by vectors, [O, sum] += P [V, 1] by tiles. Only a block of logits is ever in memory, in the
// first cache; while vectors compute the powers of one, tiles compute the next.
//
// Softmax is the same whatever is subtracted from the logits of a query, as long as powers neither overflow nor vanish.
// Usually the largest logit is, for which all logits are needed first, or sums have to be rescaled (Milakov and
// Gimelshein 2018, "Online normalizer calculation for softmax"). Here it is a bound of it: |q| max |k| is not less, as
// Cauchy and Schwarz showed. Powers stay below 2^60 by it, and as bfloat16 has float32's exponents, they are as exact
// at 2^-50 as at 1. Where the bound is so far above the largest logit that the powers of a query do vanish, or where it
// is no number, the largest logits are found by a pass of their own.
//
// P is rounded to bfloat16 before it is multiplied, sums are float32. A block is computed from beginning to end by one
// thread, so that no result depends on how many threads there are.

#include <cmath>
#include <deque>

#include "lanes.hpp"
#include "operands.hpp"
#include "threads.hpp"
#include "tiles.hpp"

namespace {

constexpr int64_t STEP = 2 * TILE;     // queries of a block, and keys of a step
constexpr int64_t KEYS_AT_ONCE = 64;   // whose powers are multiplied with values together
constexpr float HIGHEST = 60;          // log2 of the largest power
constexpr float LOWEST_SUM = 0x1p-60f; // a sum of powers that is smaller may have lost some of them
constexpr float SMALLEST = -126;       // log2 of the smallest normal number
constexpr float NO_LOGIT = -1e30f;     // of a key that is hidden
constexpr uint16_t ONE = 0x3f80;       // in bfloat16
constexpr int NOT_FINITE = 0x99;       // of a class of numbers: NaN or infinite

using Problem = AttentionProblem<uint16_t>;

// ---- Keys and values of one head, in the order in which tiles are loaded ----

struct Shape {
    explicit Shape(const Sizes &sizes)
        : keys(round_up(sizes.keys, 2 * TILE)), pairs(round_up(sizes.width, 2 * TILE) / 2),
          padded(round_up(sizes.width + 1, TILE)) {}
    int64_t keys, pairs, padded; // of which keys in 32, pairs in 16; one column more than the width holds ones
};

// A key that is hidden is zero, and so are its value and its one: nothing is left of it, whatever it was.
struct Head {
    Buffer<uint32_t> key_columns, value_pairs; // [keys / 16, pairs, 16], [keys / 2, padded]: layouts of lanes.hpp
    Buffer<uint8_t> seen;                      // [keys]: 0 for one that is hidden, or padding
    float longest_key = 0;                     // max |k|, or NaN

    explicit Head(const Shape &shape)
        : key_columns(shape.keys * shape.pairs), value_pairs(shape.keys / 2 * shape.padded + LANES),
          seen(shape.keys) {}
};

// The length of a row.
float length_of(const uint16_t *row, int64_t width) { return std::sqrt(dot(row, row, width)); }

void pack_head(Head &packed, const Shape &shape, const Rows &key, const Rows &value, const uint8_t *mask) {
    for (int64_t row = 0; row < shape.keys; ++row)
        packed.seen[row] = row < key.length && (mask == nullptr || mask[row] != 0);
    std::memset(packed.key_columns, 0, (size_t)(shape.keys * shape.pairs) * sizeof(uint32_t));
    for (int64_t start = 0; start < shape.keys; start += TILE)
        pack_columns(packed.key_columns + start * shape.pairs, key, start);
    pack_row_pairs(packed.value_pairs, value, 0, shape.keys, shape.padded);
    auto *values = (uint16_t *)(uint32_t *)packed.value_pairs;
    float longest = 0;
    for (int64_t row = 0; row < shape.keys; ++row) {
        uint16_t *numbers = values + row / 2 * 2 * shape.padded + row % 2; // every second one is of this row
        for (int64_t column = value.width; column < shape.padded; ++column) numbers[2 * column] = 0;
        if (packed.seen[row]) {
            numbers[2 * value.width] = ONE;
            float length = length_of(key[row], key.width);
            if (length > longest || std::isnan(length)) longest = length;
        } else if (row < key.length) {
            for (int64_t column = 0; column < value.width; ++column) numbers[2 * column] = 0;
            uint32_t *pairs = packed.key_columns + row / TILE * TILE * shape.pairs + row % TILE;
            for (int64_t pair = 0; pair < shape.pairs; ++pair) pairs[pair * LANES] = 0;
        }
    }
    packed.longest_key = longest;
}

// ---- Tiles: of 16 rows and 16 columns of float32, or of pairs of bfloat16, by number ----

// As assembly, since compilers' own functions for it take no template's number, and GCC's do not say that they read and
// write memory.
template <int NUMBER> void load(const void *from, int64_t stride) {
    asm volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"i"(NUMBER), "r"(from), "r"(stride) : "memory");
}
template <int NUMBER> void store(void *to, int64_t stride) {
    asm volatile("tilestored %%tmm%c0, (%1,%2,1)" ::"i"(NUMBER), "r"(to), "r"(stride) : "memory");
}
template <int NUMBER> void zero() { asm volatile("tilezero %%tmm%c0" ::"i"(NUMBER)); }

// sums += left * right, where the rows of right are pairs of rows
template <int SUMS, int LEFT, int RIGHT> void multiply() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(SUMS), "i"(LEFT), "i"(RIGHT));
}

// ---- One thread's blocks of queries ----

constexpr float MAGIC = 12582912; // 1.5 * 2^23: added to a number, its whole part is in the lowest bits of the sum

class Block {
  public:
    Block(const Problem &problem, const Shape &shape)
        : problem(problem), shape(shape), query_rows(STEP * shape.pairs + LANES),
          logits(2 * STEP * STEP), probs(STEP * KEYS_AT_ONCE / 2), outs(STEP * shape.padded) {}

    void operator()(const Head &packed, int64_t batch, int64_t head, int64_t start) {
        Rows query = head_of(problem.query, batch, head, sizes.queries, sizes.width);
        Rows rows{query[start], query.stride, std::min(STEP, sizes.queries - start), sizes.width};
        pack_rows(query_rows, rows, STEP, shape.pairs);
        bool bounded = find_bounds(packed, rows);
        if (bounded) attend<false>(packed);
        if (!bounded || has_lost(rows.length)) {
            find_maxima(packed);
            attend<true>(packed);
        }
        write(head_of(problem.out, batch, head, sizes.queries, sizes.width), start);
    }

  private:
    // A shift for each query, by the bound of its logits; false where there is none.
    bool find_bounds(const Head &packed, const Rows &rows) {
        for (int64_t row = 0; row < STEP; ++row) {
            float length = row < rows.length ? length_of(rows[row], rows.width) : 0;
            float bound = factor * length * packed.longest_key * 1.01f; // and what rounding may add to it
            if (!(bound < 1e6f)) return false;
            shifts[row] = std::max(0.0f, std::ceil(bound - HIGHEST)); // whole, for power()
            magics[row] = MAGIC - shifts[row];
            floors[row] = (SMALLEST + shifts[row]) / factor;
        }
        return true;
    }

    // Shifts that are the largest logits.
    void find_maxima(const Head &packed) {
        for (int64_t row = 0; row < STEP; ++row) shifts[row] = NO_LOGIT;
        for (int64_t from = 0; from < shape.keys; from += STEP) {
            compute_logits(packed, from, logits);
            for (int64_t row = 0; row < STEP; ++row)
                for (int64_t key = 0; key < STEP; ++key) {
                    float logit = factor * logits[(key / TILE * STEP + row) * LANES + key % TILE];
                    if (packed.seen[from + key] && !(logit <= shifts[row])) shifts[row] = logit;
                }
        }
    }

    // Whether powers have vanished, or overflowed with their values.
    bool has_lost(int64_t queries) const {
        for (int64_t row = 0; row < queries; ++row) {
            if (!(sum_of(row) >= LOWEST_SUM)) return true;
            for (int64_t column = 0; column < shape.padded; column += LANES)
                if (_mm512_fpclass_ps_mask(_mm512_load_ps(outs + row * shape.padded + column), NOT_FINITE)) return true;
        }
        return false;
    }

    float sum_of(int64_t row) const { return outs[row * shape.padded + sizes.width]; }

    // outs [queries, padded], with the sums of powers, by the shifts.
    template <bool EXACT> void attend(const Head &packed) {
        std::memset(outs, 0, (size_t)(STEP * shape.padded) * sizeof(float));
        float *now = logits, *next = logits + STEP * STEP;
        compute_logits(packed, 0, now);
        for (int64_t from = 0; from < shape.keys; from += KEYS_AT_ONCE) {
            int64_t end = std::min(from + KEYS_AT_ONCE, shape.keys);
            for (int64_t key = from; key < end; key += STEP, std::swap(now, next)) {
                uint32_t *powers = probs + (key - from) / 2 * STEP;
                if (key + STEP < shape.keys)
                    compute_both<EXACT>(packed, key + STEP, next, now, powers);
                else
                    compute_probs<EXACT>(now, 0, STEP, powers);
            }
            add_values(packed, from, end - from);
        }
    }

    void compute_logits(const Head &packed, int64_t key, float *to) const {
        zero<0>(), zero<1>(), zero<2>(), zero<3>();
        for (int64_t pair = 0; pair < shape.pairs; pair += TILE) multiply_rows(packed, key, pair);
        store_logits(to);
    }

    // Add the products of 16 pairs to the tiles 0 to 3, the logits of 32 queries and 32 keys.
    void multiply_rows(const Head &packed, int64_t key, int64_t pair) const {
        const int64_t stride = shape.pairs * (int64_t)sizeof(uint32_t);
        const uint32_t *rows = query_rows + pair;
        const uint32_t *columns = packed.key_columns + key * shape.pairs + pair * LANES;
        load<4>(rows, stride);
        load<6>(columns, 64);
        multiply<0, 4, 6>();
        load<5>(rows + TILE * shape.pairs, stride);
        multiply<1, 5, 6>();
        load<7>(columns + shape.pairs * LANES, 64);
        multiply<2, 4, 7>();
        multiply<3, 5, 7>();
    }

    // Logits [2, 32 queries, 16 keys], not yet scaled.
    static void store_logits(float *to) {
        constexpr int64_t of_tile = TILE * LANES;
        store<0>(to, 64), store<1>(to + of_tile, 64), store<2>(to + 2 * of_tile, 64), store<3>(to + 3 * of_tile, 64);
    }

    // The logits of a step that is ahead, and P of the one that is there: tiles work while vectors do.
    template <bool EXACT>
    void compute_both(const Head &packed, int64_t key, float *ahead, const float *from, uint32_t *powers) const {
        zero<0>(), zero<1>(), zero<2>(), zero<3>();
        int64_t times = shape.pairs / TILE;
        for (int64_t i = 0; i < times; ++i) {
            multiply_rows(packed, key, i * TILE);
            compute_probs<EXACT>(from, STEP * i / times, STEP * (i + 1) / times, powers);
        }
        store_logits(ahead);
    }

    // P of 32 keys and of some queries, [32 queries, 16 pairs], not yet divided by its sum.
    template <bool EXACT>
    void compute_probs(const float *from, int64_t start, int64_t end, uint32_t *to) const {
        for (int64_t i = start; i < end; ++i) {
            Vector first = _mm512_load_ps(from + i * LANES), second = _mm512_load_ps(from + (STEP + i) * LANES);
            first = EXACT ? exact_power(first, i) : power(first, i);
            second = EXACT ? exact_power(second, i) : power(second, i);
            _mm512_store_si512(to + i * LANES, rounded(first, second));
        }
    }

    // 2^(logit * scale - shift) for any shift; a hidden key's logit, 0, may be above it. Of two, NaN is returned if it is
    // the second.
    Vector exact_power(Vector logit, int64_t row) const {
        return exp2(_mm512_min_ps(all(0), _mm512_fmsub_ps(logit, scale, all(shifts[row]))));
    }

    // 2^(logit * scale - shift) for a whole shift, cut off at 2^-126 and below 2^60. Its relative error is 1e-4, a
    // twentieth of that of the rounding that follows.
    Vector power(Vector logit, int64_t row) const {
        Vector magic = all(magics[row]);
        logit = _mm512_max_ps(logit, all(floors[row]));
        Vector whole = _mm512_fmadd_ps(logit, scale, magic);
        Vector rest = _mm512_fmadd_ps(logit, scale, _mm512_sub_ps(magic, whole));
        Vector power = all(5.5860561e-2f);
        power = _mm512_fmadd_ps(power, rest, all(2.4022651e-1f));
        power = _mm512_fmadd_ps(power, rest, all(6.9314718e-1f));
        power = _mm512_fmadd_ps(power, rest, all(1));
        __m512i exponent = _mm512_slli_epi32(_mm512_castps_si512(whole), 23);
        return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(power), exponent));
    }

    // outs [queries, padded] += probs * values, up to 48 columns at once.
    void add_values(const Head &packed, int64_t from, int64_t count) {
        const uint32_t *values = packed.value_pairs + from / 2 * shape.padded;
        int64_t column = 0;
        for (; column + 3 * TILE <= shape.padded; column += 3 * TILE) add_columns<3>(values, column, count);
        if (shape.padded - column == 2 * TILE) add_columns<2>(values, column, count);
        if (shape.padded - column == TILE) add_columns<1>(values, column, count);
    }

    template <int TILES> void add_columns(const uint32_t *values, int64_t column, int64_t count) {
        const int64_t stride = shape.padded * 4;
        float *upper = outs + column, *lower = upper + TILE * shape.padded;
        load<0>(upper, stride);
        load<3>(lower, stride);
        if (TILES > 1) load<1>(upper + TILE, stride), load<4>(lower + TILE, stride);
        if (TILES > 2) load<2>(upper + 2 * TILE, stride), load<5>(lower + 2 * TILE, stride);
        for (int64_t key = 0; key < count; key += 2 * TILE) {
            const uint32_t *of_keys = values + key / 2 * shape.padded + column;
            const uint32_t *p = probs + key / 2 * STEP;
            load<6>(p, 64);
            load<7>(of_keys, stride);
            multiply<0, 6, 7>();
            if (TILES > 1) load<7>(of_keys + TILE, stride), multiply<1, 6, 7>();
            if (TILES > 2) load<7>(of_keys + 2 * TILE, stride), multiply<2, 6, 7>();
            load<6>(p + TILE * LANES, 64);
            if (TILES > 2) multiply<5, 6, 7>();
            if (TILES > 2) load<7>(of_keys + TILE, stride);
            if (TILES > 1) multiply<4, 6, 7>(), load<7>(of_keys, stride);
            multiply<3, 6, 7>();
        }
        store<0>(upper, stride);
        store<3>(lower, stride);
        if (TILES > 1) store<1>(upper + TILE, stride), store<4>(lower + TILE, stride);
        if (TILES > 2) store<2>(upper + 2 * TILE, stride), store<5>(lower + 2 * TILE, stride);
    }

    void write(const Rows &out, int64_t start) const {
        for (int64_t row = 0; row < STEP && start + row < out.length; ++row) {
            Vector share = all(1 / sum_of(row));
            for (int64_t column = 0; column < out.width; column += LANES) {
                Vector sum = _mm512_load_ps(outs + row * shape.padded + column);
                __m256i narrow = (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(sum, share));
                _mm256_mask_storeu_epi16(out[start + row] + column, first_lanes(out.width - column), narrow);
            }
        }
    }

    const TileConfiguration configuration;
    const Problem &problem;
    const Sizes &sizes = problem.sizes;
    const Shape &shape;
    const float factor = LOG2_E / std::sqrt((float)sizes.width); // powers are of 2
    const Vector scale = all(factor);
    Buffer<uint32_t> query_rows;
    Buffer<float> logits;
    Buffer<uint32_t> probs;
    Buffer<float> outs;
    float shifts[STEP], magics[STEP], floors[STEP];
};

// ---- All heads, by several threads ----

struct Packed {
    const Problem &problem;
    const Shape &shape;
    std::deque<Head> &heads;
};

// Keys and values of one head.
struct Packer {
    const Packed &packed;

    void operator()(int64_t i) {
        const Problem &problem = packed.problem;
        const Sizes &sizes = problem.sizes;
        int64_t batch = i / sizes.heads, head = i % sizes.heads;
        pack_head(packed.heads[(size_t)i], packed.shape, head_of(problem.key, batch, head, sizes.keys, sizes.width),
                  head_of(problem.value, batch, head, sizes.keys, sizes.width),
                  problem.mask == nullptr ? nullptr : problem.mask + batch * sizes.keys);
    }
};

int64_t blocks_of(const Sizes &sizes) { return (sizes.queries + STEP - 1) / STEP; }

// One block of queries of one head.
struct Attender {
    const Packed &packed;
    Block block{packed.problem, packed.shape};

    void operator()(int64_t i) {
        const Sizes &sizes = packed.problem.sizes;
        int64_t head = i / blocks_of(sizes), start = i % blocks_of(sizes) * STEP;
        block(packed.heads[(size_t)head], head / sizes.heads, head % sizes.heads, start);
    }
};

} // namespace

extern "C" int has_tiles() { return ask_for_tiles(); }

// Returns 0, or 1 where there is not enough memory.
extern "C" int tiled_attention(const Problem *problem, int threads, Parallel parallel) {
    try {
        const Sizes &sizes = problem->sizes;
        Shape shape(sizes);
        std::deque<Head> heads;
        int64_t count = sizes.batch * sizes.heads;
        for (int64_t i = 0; i < count; ++i) heads.emplace_back(shape);
        Packed packed{*problem, shape, heads};
        run<Packer>(packed, count, threads, parallel);
        return run<Attender>(packed, count * blocks_of(sizes), threads, parallel);
    } catch (const std::bad_alloc &) {
        return 1;
    }
}
