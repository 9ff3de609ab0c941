// Products of bfloat16 matrices with few columns, 16 lanes at a time.
//
// vdpbf16ps multiplies bfloat16 and adds in float32, to each lane the products of a pair. Of two factors one lies along
// the lanes, and pairs of the other are broadcast to them. Hence three layouts of a matrix x [length, width], in pairs,
// padded with zeros:
//
//     rows        [length, pairs]          (x[i, 2p], x[i, 2p + 1])   broadcast, where the sum runs over the width
//     columns     [pairs, 16 rows]         the same, turned           along the lanes, where it runs over the width
//     row pairs   [length / 2, width]      (x[2i, c], x[2i + 1, c])   where the sum runs over the length

#pragma once

#include "vectors.hpp"

namespace {

using PairVector = Words; // 16 pairs of bfloat16

// ---- Arithmetic ----

Vector add_product(Vector sum, PairVector lanes, uint32_t pair) {
    return _mm512_dpbf16_ps(sum, (__m512bh)lanes, (__m512bh)_mm512_set1_epi32((int)pair));
}

// 2^x: a polynomial over [-1/2, 1/2], minimax, and the exponent's bits. NaN stays NaN. Its relative error, 3e-6, is a
// thousandth of the rounding to bfloat16 that follows.
Vector exp2(Vector x) {
    x = _mm512_max_ps(all(-1e30f), x); // -inf has no rest; of two, NaN is the second that is returned
    Vector whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    Vector rest = _mm512_sub_ps(x, whole);
    Vector power = all(9.570104e-3f);
    power = _mm512_fmadd_ps(power, rest, all(5.5917859e-2f));
    power = _mm512_fmadd_ps(power, rest, all(2.40247443e-1f));
    power = _mm512_fmadd_ps(power, rest, all(6.93121791e-1f));
    power = _mm512_fmadd_ps(power, rest, all(9.99999285e-1f));
    return _mm512_scalef_ps(power, whole);
}

// log2(x) of normal x > 0: the exponent, and 2 artanh((m - 1) / (m + 1)) of the mantissa m in [3/4, 3/2].
Vector log2(Vector x) {
    Vector exponent = _mm512_getexp_ps(_mm512_mul_ps(x, all(4.0f / 3)));
    Vector mantissa = _mm512_scalef_ps(x, _mm512_sub_ps(all(0), exponent));
    Vector z = _mm512_div_ps(_mm512_sub_ps(mantissa, all(1)), _mm512_add_ps(mantissa, all(1)));
    Vector square = _mm512_mul_ps(z, z);
    Vector series = all(2 * LOG2_E / 9);
    for (int power = 7; power > 0; power -= 2) series = _mm512_fmadd_ps(series, square, all(2 * LOG2_E / power));
    return _mm512_fmadd_ps(series, z, exponent);
}

// Two rows of 16 numbers, rounded to bfloat16: the first row in the lower half of the bits, the second in the upper.
PairVector rounded(Vector first, Vector second) { return (PairVector)_mm512_cvtne2ps_pbh(second, first); }

// The same numbers in pairs, one of each row.
PairVector in_pairs(PairVector rows) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, //
                                           23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(order, rows);
}

Vector first_of(PairVector pairs) { return _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)); }

Vector second_of(PairVector pairs) {
    return _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32((int)0xffff0000)));
}

// ---- The layouts ----

using Rows = RowsOf<uint16_t>; // of bfloat16

__mmask32 first_32(int64_t count) { return (__mmask32)((1ull << std::clamp<int64_t>(count, 0, 32)) - 1); }

// Layout "rows" of the first `count` rows. Stores are whole: what one writes beyond its row is written again with the
// next, and beyond the last row there is room for it.
inline void pack_rows(uint32_t *packed, const Rows &rows, int64_t count, int64_t pairs) {
    for (int64_t row = 0; row < count; ++row, packed += pairs)
        for (int64_t column = 0; column < rows.width; column += 2 * LANES) {
            __mmask32 there = row < rows.length ? first_32(rows.width - column) : 0;
            _mm512_storeu_si512(packed + column / 2, _mm512_maskz_loadu_epi16(there, rows[row] + column));
        }
}

// Layout "row pairs" of `count` rows from `start` on, in rows of `padded`; stores are whole here too.
inline void pack_row_pairs(uint32_t *packed, const Rows &rows, int64_t start, int64_t count, int64_t padded) {
    for (int64_t row = start; row < start + count; row += 2, packed += padded)
        for (int64_t column = 0; column < rows.width; column += LANES) {
            __mmask16 there = first_lanes(rows.width - column);
            __m256i first = _mm256_maskz_loadu_epi16(row < rows.length ? there : 0, rows[row] + column);
            __m256i second = _mm256_maskz_loadu_epi16(row + 1 < rows.length ? there : 0, rows[row + 1] + column);
            __m512i upper = _mm512_slli_epi32(_mm512_cvtepu16_epi32(second), 16);
            _mm512_storeu_si512(packed + column, _mm512_or_si512(upper, _mm512_cvtepu16_epi32(first)));
        }
}

// Layout "columns" of the 16 rows from `start` on.
inline void pack_columns(uint32_t *packed, const Rows &rows, int64_t start) {
    for (int64_t column = 0; column < rows.width; column += 2 * LANES, packed += LANES * LANES) {
        PairVector block[LANES];
        for (int64_t row = 0; row < LANES; ++row) {
            __mmask32 there = start + row < rows.length ? first_32(rows.width - column) : 0;
            block[row] = _mm512_maskz_loadu_epi16(there, rows[start + row] + column);
        }
        transpose(block);
        for (int64_t pair = 0; pair < LANES; ++pair)
            if (column + 2 * pair < rows.width) _mm512_store_si512(packed + pair * LANES, block[pair]);
    }
}

// Write 16 columns of pairs, from `column` on, as the rows from `start` on.
[[gnu::always_inline]] inline void write_block(const Rows &rows, int64_t start, int64_t column,
                                               PairVector (&block)[16]) {
    transpose(block);
    __mmask32 there = first_32(rows.width - column);
    for (int64_t row = 0; row < LANES; ++row)
        if (start + row < rows.length) _mm512_mask_storeu_epi16(rows[start + row] + column, there, block[row]);
}

// Write sums [width, 16], times a factor for each lane, as the rows from `start` on, and what rounding took from them
// where there is a place for it.
inline void write_columns(const Rows &rows, int64_t start, const float *sums, Vector factor, const Rows *rests = nullptr) {
    for (int64_t column = 0; column < rows.width; column += 2 * LANES, sums += 2 * LANES * LANES) {
        PairVector block[LANES] = {}, rest[LANES] = {};
        for (int64_t pair = 0; pair < LANES; ++pair)
            if (column + 2 * pair < rows.width) {
                Vector first = _mm512_mul_ps(_mm512_load_ps(sums + 2 * pair * LANES), factor);
                Vector second = _mm512_mul_ps(_mm512_load_ps(sums + (2 * pair + 1) * LANES), factor);
                block[pair] = in_pairs(rounded(first, second));
                rest[pair] = in_pairs(rounded(_mm512_sub_ps(first, first_of(block[pair])), //
                                              _mm512_sub_ps(second, second_of(block[pair]))));
            }
        write_block(rows, start, column, block);
        if (rests != nullptr) write_block(*rests, start, column, rest);
    }
}

// Write sums [length, padded], times a factor, as rows.
inline void write_rows(const Rows &rows, const float *sums, int64_t padded, Vector factor) {
    for (int64_t row = 0; row < rows.length; ++row, sums += padded)
        for (int64_t column = 0; column < rows.width; column += LANES) {
            __m256i narrow = (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(_mm512_load_ps(sums + column), factor));
            _mm256_mask_storeu_epi16(rows[row] + column, first_lanes(rows.width - column), narrow);
        }
}

// ---- Products of blocks ----

// sums[i][lane] += sum over the width of rows[i] * columns[lane]
[[gnu::always_inline]] inline void add_dots(Vector (&sums)[ROWS], const uint32_t *columns, const uint32_t *rows,
                                            int64_t pairs) {
    for (int64_t pair = 0; pair < pairs; ++pair) {
        PairVector lanes = _mm512_load_si512(columns + pair * LANES);
        for (int row = 0; row < ROWS; ++row) sums[row] = add_product(sums[row], lanes, rows[row * pairs + pair]);
    }
}

// sums[c][lane] += sum over i of tile[i][lane] * row_pairs[i][c], for WIDTH columns c
template <int WIDTH>
inline void add_columns(float *sums, const uint32_t *tile, const uint32_t *row_pairs, int64_t count, int64_t padded) {
    Vector registers[WIDTH];
    for (int c = 0; c < WIDTH; ++c) registers[c] = _mm512_load_ps(sums + c * LANES);
    for (int64_t i = 0; i < count; ++i, row_pairs += padded) {
        PairVector lanes = _mm512_load_si512(tile + i * LANES);
        for (int c = 0; c < WIDTH; ++c) registers[c] = add_product(registers[c], lanes, row_pairs[c]);
    }
    for (int c = 0; c < WIDTH; ++c) _mm512_store_ps(sums + c * LANES, registers[c]);
}

// The same for all columns, of which there are a multiple of 4.
inline void add_products(float *sums, const uint32_t *tile, const uint32_t *row_pairs, int64_t count, int64_t padded) {
    int64_t c = 0;
    for (; c + 12 <= padded; c += 12) add_columns<12>(sums + c * LANES, tile, row_pairs + c, count, padded);
    if (padded - c == 8) add_columns<8>(sums + c * LANES, tile, row_pairs + c, count, padded);
    if (padded - c == 4) add_columns<4>(sums + c * LANES, tile, row_pairs + c, count, padded);
}

// sums[i][c] += sum over 16 keys of tile[i] * row_pairs[key][c]; the width lies along the lanes
inline void add_row_products(float *sums, const uint32_t *tile, const uint32_t *row_pairs, int64_t count, int64_t padded) {
    constexpr int BLOCK = 4, PAIRS = LANES / 2;
    for (int64_t column = 0; column < padded; column += LANES) {
        PairVector lanes[PAIRS];
        for (int pair = 0; pair < PAIRS; ++pair) lanes[pair] = _mm512_load_si512(row_pairs + pair * padded + column);
        for (int64_t start = 0; start < count; start += BLOCK) {
            Vector registers[BLOCK];
            float *to = sums + start * padded + column;
            for (int row = 0; row < BLOCK; ++row) registers[row] = _mm512_load_ps(to + row * padded);
            for (int pair = 0; pair < PAIRS; ++pair)
                for (int row = 0; row < BLOCK; ++row)
                    registers[row] = add_product(registers[row], lanes[pair], tile[(start + row) * PAIRS + pair]);
            for (int row = 0; row < BLOCK; ++row) _mm512_store_ps(to + row * padded, registers[row]);
        }
    }
}

// The sum of the products of two rows.
inline float dot(const uint16_t *left, const uint16_t *right, int64_t width) {
    Vector sum = all(0);
    for (int64_t column = 0; column < width; column += 2 * LANES) {
        __mmask32 there = first_32(width - column);
        __m512i numbers = _mm512_maskz_loadu_epi16(there, left + column);
        sum = _mm512_dpbf16_ps(sum, (__m512bh)numbers, (__m512bh)_mm512_maskz_loadu_epi16(there, right + column));
    }
    return _mm512_reduce_add_ps(sum);
}

} // namespace
