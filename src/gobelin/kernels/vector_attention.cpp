// Scaled dot-product attention for inference, O = softmax(scale Q K^T) V, by vectors: in float32, and in bfloat16 where
// the CPU multiplies pairs of it and has no tiles (tiled_attention.cpp).
//
// For one head of a sample: Q, O [queries, width] and K, V [keys, width], scale = 1 / sqrt(width); a mask hides keys
// from all queries of a sample. A block of 32 queries, along the lanes of two vectors (16 with AVX2), goes through the keys, 64 at
// once: S = Q K^T, P = exp(scale (S - largest)), [O, sum] = [O, sum] exp(scale (before - largest)) + P [V, 1], where
// largest and before are the largest of a query's S up to these keys and up to those before (Milakov and Gimelshein
// 2018, "Online normalizer calculation for softmax"). Only a block of S is ever in memory, in the first cache. It is
// scaled after the largest was subtracted: what rounding takes then depends on that difference, not on S.
//
// Products are what takes the time, so each word that is loaded serves several: one of a key or value is broadcast to
// two vectors of queries, and a vector of queries meets eight of them. A word is a number of float32, or a pair of
// bfloat16, along which the products' sums run: two columns of Q and K, two rows of P and V. P is rounded for it, all
// sums are float32. Sums over 64 keys are added up apart before they join those of all, which keeps more of their
// digits than one long sum. A block is computed from beginning to end by one thread, so that no result depends on how
// many threads there are.

#include <cfloat>
#include <cmath>
#include <deque>

#include "operands.hpp"
#include "precision.hpp"
#include "threads.hpp"

namespace {

constexpr int VECTORS = 2;
constexpr int64_t QUERIES = VECTORS * LANES; // of a block
constexpr int64_t KEYS_AT_ONCE = 64;         // with the width of 40 they, their values and P take 28 KB in float32
constexpr float NO_LOGIT = -FLT_MAX;         // finite, so that its difference from a logit is no NaN

// A number for each of the queries.
struct Row {
    Vector of[VECTORS];
};

Row all_of(float value) {
    Row row;
    for (Vector &lanes : row.of) lanes = all(value);
    return row;
}

Row load_row(const void *from) {
    Row row;
    for (int vector = 0; vector < VECTORS; ++vector) row.of[vector] = load_once((const float *)from + vector * LANES);
    return row;
}

// ---- What is different in the two precisions ----

template <class Number> struct Attention;

template <> struct Attention<float> : Precision<float> {
    static Words rounded_columns(Vector only) { return words_of(only); }

    // The values of one key, as words. Stores are whole, and the next key's come after.
    static void pack_values(float *words, const float *const *value, int64_t width) {
        for (int64_t column = 0; column < width; column += LANES)
            store_anywhere(words + column, ::load(value[0] + column, first_lanes(width - column)));
    }

    static Vector power(Vector x, Vector factor) { return exact_power(x, factor); }

    static void store_probs(float *to, const Vector (&p)[1]) { ::store(to, p[0]); }
};

#ifdef __AVX512BF16__

template <> struct Attention<uint16_t> : Precision<uint16_t> {
    static Words rounded_columns(Vector first, Vector second) { return in_pairs(rounded(first, second)); }

    // The values of two keys, of which the second may be null, as words.
    static void pack_values(uint32_t *words, const uint16_t *const *value, int64_t width) {
        for (int64_t column = 0; column < width; column += LANES) {
            __mmask16 there = first_lanes(width - column);
            __m256i first = _mm256_maskz_loadu_epi16(there, value[0] + column);
            __m256i second = _mm256_maskz_loadu_epi16(value[1] == nullptr ? 0 : there, value[1] + column);
            __m512i upper = _mm512_slli_epi32(_mm512_cvtepu16_epi32(second), 16);
            _mm512_storeu_si512(words + column, _mm512_or_si512(upper, _mm512_cvtepu16_epi32(first)));
        }
    }

    // Its relative error is a twentieth of that of the rounding that follows.
    static Vector power(Vector x, Vector factor) { return power_below_1(x * factor, OF_BFLOAT16); }

    static void store_probs(uint32_t *to, const Vector (&p)[2]) {
        ::store(to, in_pairs(rounded(p[0], p[1])));
    }
};

#endif

// ---- Rows to columns of words and back, as many at a time as there are lanes ----

// Turn rows into columns, which are `stride` apart; a row that is null is zero.
template <class Number, class Word>
void read_columns(Word *columns, int64_t stride, const Number *const (&rows)[LANES], int64_t width) {
    using Of = Attention<Number>;
    for (int64_t number = 0; number < width; number += LANES * Of::IN_WORD, columns += LANES * stride) {
        Words block[LANES];
        for (int64_t row = 0; row < LANES; ++row)
            block[row] = rows[row] == nullptr ? Words{} : Of::load_words(rows[row] + number, width - number);
        transpose(block);
        for (int64_t word = 0; word < LANES && number + word * Of::IN_WORD < width; ++word)
            store(columns + word * stride, block[word]);
    }
}

// Write columns, which are `stride` apart, times a factor for each lane, as the rows from `start` on. Where a word
// has two numbers, there is a column of zeros after an odd number of columns.
template <class Number>
void write_columns(const RowsOf<Number> &rows, int64_t start, const float *columns, int64_t stride, Vector factor) {
    using Of = Attention<Number>;
    for (int64_t number = 0; number < rows.width; number += LANES * Of::IN_WORD) {
        Words block[LANES] = {};
        for (int64_t word = 0; word < LANES && number + word * Of::IN_WORD < rows.width; ++word) {
            const float *column = columns + (number + word * Of::IN_WORD) * stride;
            Vector first = load(column) * factor;
            if constexpr (Of::IN_WORD == 1)
                block[word] = Of::rounded_columns(first);
            else
                block[word] = Of::rounded_columns(first, load(column + stride) * factor);
        }
        transpose(block);
        for (int64_t row = 0; row < LANES && start + row < rows.length; ++row)
            Of::store_words(rows[start + row] + number, rows.width - number, block[row]);
    }
}

// ---- Keys and values of one head, those that may be seen ----

template <class Number> struct Head {
    using Of = Attention<Number>;
    using Word = typename Of::Word;

    explicit Head(const Sizes &sizes)
        : words(round_up(sizes.width, Of::IN_WORD) / Of::IN_WORD), keys(round_up(sizes.keys, LANES) * words),
          values(round_up(sizes.keys, Of::IN_WORD) / Of::IN_WORD * sizes.width + LANES) {}

    void pack(const RowsOf<Number> &key, const RowsOf<Number> &value, const uint8_t *mask) {
        for (int64_t row = 0; row < key.length;) {
            const Number *key_rows[LANES] = {}, *value_rows[LANES] = {};
            int64_t seen = 0;
            for (; seen < LANES && row < key.length; ++row) {
                if (mask != nullptr && mask[row] == 0) continue;
                key_rows[seen] = key[row];
                value_rows[seen++] = value[row];
            }
            if (seen > 0) read_columns(keys + count * words, LANES, key_rows, key.width);
            for (int64_t i = 0; i < seen; i += Of::IN_WORD)
                Of::pack_values(values + (count + i) / Of::IN_WORD * key.width, value_rows + i, key.width);
            count += seen;
        }
    }

    const int64_t words; // of a key
    int64_t count = 0;
    Buffer<Word> keys;   // [keys / LANES, words, LANES]
    Buffer<Word> values; // [keys / IN_WORD, width]
};

// ---- One thread's blocks of queries ----

template <class Number> class Block {
    using Of = Attention<Number>;
    using Word = typename Of::Word;
    static constexpr int64_t IN_WORD = Of::IN_WORD;

  public:
    explicit Block(const AttentionProblem<Number> &problem) : problem(problem) {}

    void operator()(const Head<Number> &packed, int64_t batch, int64_t head, int64_t start) {
        RowsOf<Number> query = head_of(problem.query, batch, head, sizes.queries, sizes.width);
        RowsOf<Number> out = head_of(problem.out, batch, head, sizes.queries, sizes.width);
        for (int64_t lane = 0; lane < QUERIES; lane += LANES) {
            const Number *rows[LANES];
            for (int64_t row = 0; row < LANES; ++row)
                rows[row] = start + lane + row < sizes.queries ? query[start + lane + row] : nullptr;
            read_columns(query_columns + lane, QUERIES, rows, sizes.width);
        }
        std::memset(sums, 0, (size_t)(columns * QUERIES) * sizeof(float));
        largest = all_of(NO_LOGIT), total = all_of(0);
        for (int64_t from = 0; from < packed.count; from += KEYS_AT_ONCE)
            add_keys(packed, from, std::min(KEYS_AT_ONCE, packed.count - from));
        for (int vector = 0; vector < VECTORS; ++vector) {
            // The largest logit has P = 1: where the sum is below it, all logits were -inf, and nothing is the largest.
            Vector share = choose(is_below(total.of[vector], all(0.5f)), all(NAN), all(1) / total.of[vector]);
            write_columns(out, start + vector * LANES, sums + vector * LANES, QUERIES, share);
        }
    }

  private:
    void add_keys(const Head<Number> &packed, int64_t from, int64_t count) {
        Row before = largest, less;
        compute_logits(packed.keys + from * words, count);
        for (int vector = 0; vector < VECTORS; ++vector)
            less.of[vector] = Of::power(before.of[vector] - largest.of[vector], factor);
        compute_probs(count, less);
        add_values(packed.values + from / IN_WORD * sizes.width, round_up(count, IN_WORD) / IN_WORD, less);
    }

    // S of `count` keys, and the largest so far.
    void compute_logits(const Word *keys, int64_t count) {
        for (int64_t key = 0; key < count; key += ROWS) {
            const Word *rows = keys + key / LANES * LANES * words + key % LANES;
            Vector dots[ROWS][VECTORS] = {};
            for (int64_t word = 0; word < words; ++word) {
                Row query = load_row(query_columns + word * QUERIES);
                for (int row = 0; row < ROWS; ++row)
                    for (int vector = 0; vector < VECTORS; ++vector)
                        dots[row][vector] = Of::add_product(dots[row][vector], query.of[vector], rows[word * LANES + row]);
            }
            for (int row = 0; row < ROWS; ++row)
                for (int vector = 0; vector < VECTORS; ++vector) {
                    store(logits + (key + row) * QUERIES + vector * LANES, dots[row][vector]);
                    if (key + row < count) largest.of[vector] = larger(largest.of[vector], dots[row][vector]);
                }
        }
    }

    // P of `count` keys, in place of S, as words, not yet divided by its sum.
    void compute_probs(int64_t count, const Row &less) {
        Row sum = all_of(0);
        for (int64_t key = 0; key < count; key += IN_WORD)
            for (int vector = 0; vector < VECTORS; ++vector) {
                Vector p[IN_WORD];
                for (int64_t i = 0; i < IN_WORD; ++i) {
                    Vector logit = load(logits + (key + i) * QUERIES + vector * LANES);
                    p[i] = Of::power(logit - largest.of[vector], factor);
                    if (key + i >= count) p[i] = all(0); // the second of a pair that has one key
                    sum.of[vector] += p[i];
                }
                Of::store_probs(probs + key / IN_WORD * QUERIES + vector * LANES, p);
            }
        for (int vector = 0; vector < VECTORS; ++vector)
            total.of[vector] = multiply_add(total.of[vector], less.of[vector], sum.of[vector]);
    }

    // sums [width, queries] = sums * less + P^T V
    void add_values(const Word *values, int64_t count, const Row &less) {
        int64_t column = 0;
        for (; column + ROWS <= sizes.width; column += ROWS) add_columns<ROWS>(column, values, count, less);
        if (ROWS > 4 && sizes.width & 4) add_columns<4>(column, values, count, less), column += 4;
        if (sizes.width & 2) add_columns<2>(column, values, count, less), column += 2;
        if (sizes.width & 1) add_columns<1>(column, values, count, less);
    }

    template <int VALUES> void add_columns(int64_t column, const Word *values, int64_t count, const Row &less) {
        Vector added[VALUES][VECTORS] = {};
        values += column;
        for (int64_t word = 0; word < count; ++word, values += sizes.width) {
            Row p = load_row(probs + word * QUERIES);
            for (int c = 0; c < VALUES; ++c)
                for (int vector = 0; vector < VECTORS; ++vector)
                    added[c][vector] = Of::add_product(added[c][vector], p.of[vector], values[c]);
        }
        for (int c = 0; c < VALUES; ++c)
            for (int vector = 0; vector < VECTORS; ++vector) {
                float *sum = sums + (column + c) * QUERIES + vector * LANES;
                store(sum, multiply_add(load(sum), less.of[vector], added[c][vector]));
            }
    }

    const AttentionProblem<Number> &problem;
    const Sizes &sizes = problem.sizes;
    const int64_t words = round_up(sizes.width, IN_WORD) / IN_WORD, columns = words * IN_WORD;
    const Vector factor = all((float)(1.4426950408889634 / std::sqrt((double)sizes.width))); // log2(e) scale
    Buffer<Word> query_columns{words * QUERIES};
    Buffer<float> sums{columns * QUERIES}, logits{KEYS_AT_ONCE * QUERIES};
    Word *const probs = (Word *)(float *)logits;
    Row largest, total;
};

// ---- All heads, by several threads ----

template <class Number> struct Packed {
    const AttentionProblem<Number> &problem;
    std::deque<Head<Number>> &heads;
};

// Keys and values of one head.
template <class Number> struct Packer {
    const Packed<Number> &packed;

    void operator()(int64_t i) {
        const AttentionProblem<Number> &problem = packed.problem;
        const Sizes &sizes = problem.sizes;
        int64_t batch = i / sizes.heads, head = i % sizes.heads;
        packed.heads[(size_t)i].pack(head_of(problem.key, batch, head, sizes.keys, sizes.width),
                                     head_of(problem.value, batch, head, sizes.keys, sizes.width),
                                     problem.mask == nullptr ? nullptr : problem.mask + batch * sizes.keys);
    }
};

int64_t blocks_of(const Sizes &sizes) { return (sizes.queries + QUERIES - 1) / QUERIES; }

// One block of queries of one head.
template <class Number> struct Attender {
    const Packed<Number> &packed;
    Block<Number> block{packed.problem};

    void operator()(int64_t i) {
        const Sizes &sizes = packed.problem.sizes;
        int64_t head = i / blocks_of(sizes), start = i % blocks_of(sizes) * QUERIES;
        block(packed.heads[(size_t)head], head / sizes.heads, head % sizes.heads, start);
    }
};

// Returns 0, or 1 where there is not enough memory.
template <class Number> int attend(const AttentionProblem<Number> &problem, int threads, Parallel parallel) {
    try {
        const Sizes &sizes = problem.sizes;
        std::deque<Head<Number>> heads;
        int64_t count = sizes.batch * sizes.heads;
        for (int64_t i = 0; i < count; ++i) heads.emplace_back(sizes);
        Packed<Number> packed{problem, heads};
        run<Packer<Number>>(packed, count, threads, parallel);
        return run<Attender<Number>>(packed, count * blocks_of(sizes), threads, parallel);
    } catch (const std::bad_alloc &) {
        return 1;
    }
}

} // namespace

extern "C" int float_attention(const AttentionProblem<float> *problem, int threads, Parallel parallel) {
    return attend(*problem, threads, parallel);
}

#ifdef __AVX512BF16__
extern "C" int bfloat16_attention(const AttentionProblem<uint16_t> *problem, int threads, Parallel parallel) {
    return attend(*problem, threads, parallel);
}
#endif
