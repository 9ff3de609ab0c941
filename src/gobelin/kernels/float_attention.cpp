// Scaled dot-product attention for inference in float32, O = softmax(scale Q K^T) V, by the vectors of AVX-512.
//
// For one head of a sample: Q, O [queries, width] and K, V [keys, width], scale = 1 / sqrt(width); a mask hides keys
// from all queries of a sample. A block of 32 queries, along the lanes of two vectors, goes through the keys, 64 at
// once: S = Q K^T, P = exp(scale (S - largest)), [O, sum] = [O, sum] exp(scale (before - largest)) + P [V, 1], where
// largest and before are the largest of a query's S up to these keys and up to those before (Milakov and Gimelshein
// 2018, "Online normalizer calculation for softmax"). Only a block of S is ever in memory, in the first cache. It is
// scaled after the largest was subtracted: what rounding takes then depends on that difference, not on S.
//
// Products are what takes the time, so each number that is loaded serves several: a key or value is broadcast to two
// vectors of queries, and a vector of queries meets eight of them. Sums over 64 keys are added up apart before they
// join those of all, which keeps more of their digits than one long sum. A block is computed from beginning to end by
// one thread, so that no result depends on how many threads there are.

#include <cfloat>
#include <cmath>
#include <deque>

#include "lanes.hpp"
#include "operands.hpp"
#include "threads.hpp"

namespace {

constexpr int VECTORS = 2;
constexpr int64_t QUERIES = VECTORS * LANES; // of a block
constexpr int64_t KEYS_AT_ONCE = 64;         // with the width of 40 they, their values and P take 28 KB
constexpr float NO_LOGIT = -FLT_MAX;         // finite, so that its difference from a logit is no NaN

using Problem = AttentionProblem<float>;

// ---- Arithmetic ----

// A vector for each 16 of the queries.
struct Pair {
    Vector of[VECTORS];
};

Pair load(const float *from) { return {_mm512_load_ps(from), _mm512_load_ps(from + LANES)}; }

// 2^(factor x): a polynomial over [-1/2, 1/2], minimax, and the exponent's bits; 0 below the normal numbers, and NaN
// for NaN. Its relative error is that of rounding, 1.6e-7 at most, beside that of the factor.
Vector power(Vector x, Vector factor) {
    Vector exponent = _mm512_mul_ps(x, factor);
    __mmask16 normal = _mm512_cmp_ps_mask(exponent, all(-126), _CMP_NLT_UQ);
    Vector whole = _mm512_roundscale_ps(exponent, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    Vector rest = _mm512_fmsub_ps(x, factor, whole);
    Vector power = all(1.32695353e-3f);
    for (float coefficient : {9.67129134e-3f, 5.55071086e-2f, 2.40222469e-1f, 6.93147004e-1f, 1.0f})
        power = _mm512_fmadd_ps(power, rest, all(coefficient));
    return _mm512_maskz_scalef_ps(normal, power, whole);
}

// ---- Rows to columns and back, 16 at a time ----

// Turn 16 rows into columns, which are `stride` apart; a row that is null is zero.
void read_columns(float *columns, int64_t stride, const float *const (&rows)[LANES], int64_t width) {
    for (int64_t column = 0; column < width; column += LANES) {
        PairVector block[LANES];
        for (int64_t row = 0; row < LANES; ++row) {
            __mmask16 there = rows[row] != nullptr ? first_16(width - column) : 0;
            block[row] = _mm512_maskz_loadu_epi32(there, rows[row] + column);
        }
        transpose(block);
        for (int64_t c = 0; c < LANES && column + c < width; ++c)
            _mm512_store_si512(columns + (column + c) * stride, block[c]);
    }
}

// Write columns, which are `stride` apart, times a factor for each lane, as the 16 rows from `start` on.
void write_columns(const RowsOf<float> &rows, int64_t start, const float *columns, int64_t stride, Vector factor) {
    for (int64_t column = 0; column < rows.width; column += LANES) {
        PairVector block[LANES] = {};
        for (int64_t c = 0; c < LANES && column + c < rows.width; ++c)
            block[c] = _mm512_castps_si512(_mm512_mul_ps(_mm512_load_ps(columns + (column + c) * stride), factor));
        transpose(block);
        for (int64_t row = 0; row < LANES && start + row < rows.length; ++row)
            _mm512_mask_storeu_epi32(rows[start + row] + column, first_16(rows.width - column), block[row]);
    }
}

// ---- Keys and values of one head, those that may be seen ----

struct Head {
    Buffer<float> keys;   // [keys / 16, width, 16]
    Buffer<float> values; // [keys, width]
    int64_t count = 0;

    explicit Head(const Sizes &sizes)
        : keys(round_up(sizes.keys, LANES) * sizes.width), values(sizes.keys * sizes.width + LANES) {}
};

void pack_head(Head &packed, const RowsOf<float> &key, const RowsOf<float> &value, const uint8_t *mask) {
    const int64_t width = key.width;
    for (int64_t row = 0; row < key.length;) {
        const float *rows[LANES] = {};
        float *keys = packed.keys + packed.count * width;
        for (int64_t lane = 0; lane < LANES && row < key.length; ++row) {
            if (mask != nullptr && mask[row] == 0) continue;
            rows[lane++] = key[row];
            float *values = packed.values + packed.count++ * width;
            for (int64_t column = 0; column < width; column += LANES) // stores are whole, and the next row's come after
                _mm512_storeu_ps(values + column, _mm512_maskz_loadu_ps(first_16(width - column), value[row] + column));
        }
        if (rows[0] != nullptr) read_columns(keys, LANES, rows, width);
    }
}

// ---- One thread's blocks of queries ----

class Block {
  public:
    explicit Block(const Problem &problem) : problem(problem) {}

    void operator()(const Head &packed, int64_t batch, int64_t head, int64_t start) {
        RowsOf<float> query = head_of(problem.query, batch, head, sizes.queries, sizes.width);
        RowsOf<float> out = head_of(problem.out, batch, head, sizes.queries, sizes.width);
        for (int64_t lane = 0; lane < QUERIES; lane += LANES) {
            const float *rows[LANES];
            for (int64_t row = 0; row < LANES; ++row)
                rows[row] = start + lane + row < sizes.queries ? query[start + lane + row] : nullptr;
            read_columns(query_columns + lane, QUERIES, rows, sizes.width);
        }
        std::memset(sums, 0, (size_t)(sizes.width * QUERIES) * sizeof(float));
        largest = {all(NO_LOGIT), all(NO_LOGIT)}, total = {all(0), all(0)};
        for (int64_t from = 0; from < packed.count; from += KEYS_AT_ONCE)
            add_keys(packed, from, std::min(KEYS_AT_ONCE, packed.count - from));
        for (int vector = 0; vector < VECTORS; ++vector) {
            Vector share = _mm512_div_ps(all(1), total.of[vector]);
            write_columns(out, start + vector * LANES, sums + vector * LANES, QUERIES, share);
        }
    }

  private:
    void add_keys(const Head &packed, int64_t from, int64_t count) {
        Pair before = largest, less;
        compute_logits(packed.keys + from * sizes.width, count);
        for (int vector = 0; vector < VECTORS; ++vector)
            less.of[vector] = power(_mm512_sub_ps(before.of[vector], largest.of[vector]), factor);
        compute_probs(count, less);
        add_values(packed.values + from * sizes.width, count, less);
    }

    // S of `count` keys, and the largest so far.
    void compute_logits(const float *keys, int64_t count) {
        for (int64_t key = 0; key < count; key += ROWS) {
            const float *rows = keys + key / LANES * LANES * sizes.width + key % LANES;
            Vector dots[ROWS][VECTORS] = {};
            for (int64_t column = 0; column < sizes.width; ++column) {
                Pair query = load(query_columns + column * QUERIES);
                for (int row = 0; row < ROWS; ++row)
                    for (int vector = 0; vector < VECTORS; ++vector)
                        dots[row][vector] =
                            _mm512_fmadd_ps(query.of[vector], all(rows[column * LANES + row]), dots[row][vector]);
            }
            for (int row = 0; row < ROWS; ++row)
                for (int vector = 0; vector < VECTORS; ++vector) {
                    _mm512_store_ps(logits + (key + row) * QUERIES + vector * LANES, dots[row][vector]);
                    if (key + row < count) largest.of[vector] = _mm512_max_ps(largest.of[vector], dots[row][vector]);
                }
        }
    }

    // P of `count` keys, in place of S, not yet divided by its sum.
    void compute_probs(int64_t count, const Pair &less) {
        Pair sum = {all(0), all(0)};
        for (int64_t key = 0; key < count; ++key)
            for (int vector = 0; vector < VECTORS; ++vector) {
                float *logit = logits + key * QUERIES + vector * LANES;
                Vector p = power(_mm512_sub_ps(_mm512_load_ps(logit), largest.of[vector]), factor);
                sum.of[vector] = _mm512_add_ps(sum.of[vector], p);
                _mm512_store_ps(logit, p);
            }
        for (int vector = 0; vector < VECTORS; ++vector)
            total.of[vector] = _mm512_fmadd_ps(total.of[vector], less.of[vector], sum.of[vector]);
    }

    // sums [width, 32 queries] = sums * less + P^T V
    void add_values(const float *values, int64_t count, const Pair &less) {
        int64_t column = 0;
        for (; column + 8 <= sizes.width; column += 8) add_columns<8>(column, values, count, less);
        if (sizes.width & 4) add_columns<4>(column, values, count, less), column += 4;
        if (sizes.width & 2) add_columns<2>(column, values, count, less), column += 2;
        if (sizes.width & 1) add_columns<1>(column, values, count, less);
    }

    template <int COLUMNS> void add_columns(int64_t column, const float *values, int64_t count, const Pair &less) {
        Vector added[COLUMNS][VECTORS] = {};
        values += column;
        for (int64_t key = 0; key < count; ++key, values += sizes.width) {
            Pair p = load(logits + key * QUERIES);
            for (int c = 0; c < COLUMNS; ++c)
                for (int vector = 0; vector < VECTORS; ++vector)
                    added[c][vector] = _mm512_fmadd_ps(p.of[vector], all(values[c]), added[c][vector]);
        }
        for (int c = 0; c < COLUMNS; ++c)
            for (int vector = 0; vector < VECTORS; ++vector) {
                float *sum = sums + (column + c) * QUERIES + vector * LANES;
                _mm512_store_ps(sum, _mm512_fmadd_ps(_mm512_load_ps(sum), less.of[vector], added[c][vector]));
            }
    }

    const Problem &problem;
    const Sizes &sizes = problem.sizes;
    const Vector factor = all((float)(1.4426950408889634 / std::sqrt((double)sizes.width))); // log2(e) scale
    Buffer<float> query_columns{sizes.width * QUERIES}, sums{sizes.width * QUERIES}, logits{KEYS_AT_ONCE * QUERIES};
    Pair largest, total;
};

// ---- All heads, by several threads ----

struct Packed {
    const Problem &problem;
    std::deque<Head> &heads;
};

// Keys and values of one head.
struct Packer {
    const Packed &packed;

    void operator()(int64_t i) {
        const Problem &problem = packed.problem;
        const Sizes &sizes = problem.sizes;
        int64_t batch = i / sizes.heads, head = i % sizes.heads;
        pack_head(packed.heads[(size_t)i], head_of(problem.key, batch, head, sizes.keys, sizes.width),
                  head_of(problem.value, batch, head, sizes.keys, sizes.width),
                  problem.mask == nullptr ? nullptr : problem.mask + batch * sizes.keys);
    }
};

int64_t blocks_of(const Sizes &sizes) { return (sizes.queries + QUERIES - 1) / QUERIES; }

// One block of queries of one head.
struct Attender {
    const Packed &packed;
    Block block{packed.problem};

    void operator()(int64_t i) {
        const Sizes &sizes = packed.problem.sizes;
        int64_t head = i / blocks_of(sizes), start = i % blocks_of(sizes) * QUERIES;
        block(packed.heads[(size_t)head], head / sizes.heads, head % sizes.heads, start);
    }
};

} // namespace

// Returns 0, or 1 where there is not enough memory.
extern "C" int float_attention(const Problem *problem, int threads, Parallel parallel) {
    try {
        const Sizes &sizes = problem->sizes;
        std::deque<Head> heads;
        int64_t count = sizes.batch * sizes.heads;
        for (int64_t i = 0; i < count; ++i) heads.emplace_back(sizes);
        Packed packed{*problem, heads};
        run<Packer>(packed, count, threads, parallel);
        return run<Attender>(packed, count * blocks_of(sizes), threads, parallel);
    } catch (const std::bad_alloc &) {
        return 1;
    }
}
