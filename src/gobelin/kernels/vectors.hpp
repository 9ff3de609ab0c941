// Vectors of float32: 16 lanes by AVX-512, 8 by AVX2. What is written in these terms runs on CPUs of both kinds.

#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

namespace {

constexpr float LOG2_E = 1.44269504f, LN_2 = 0.693147181f;

int64_t round_up(int64_t number, int64_t multiple) { return (number + multiple - 1) / multiple * multiple; }

#ifdef __AVX512F__

using Vector = __m512;
using Words = __m512i;    // of 32 bits, one a lane: a number of float32, or a pair of bfloat16
using Mask = __mmask16;   // of lanes
constexpr int64_t LANES = 16;
constexpr int ROWS = 8;   // multiplied at once: so many sums, in registers, hide the latency of adding

Vector all(float value) { return _mm512_set1_ps(value); }
Vector load(const void *from) { return _mm512_load_ps(from); }
Vector load_anywhere(const float *from) { return _mm512_loadu_ps(from); }
Vector load(const float *from, Mask there) { return _mm512_maskz_loadu_ps(there, from); }
Words load_words(const float *from, Mask there) { return _mm512_maskz_loadu_epi32(there, from); }
void store(void *to, Vector numbers) { _mm512_store_ps(to, numbers); }
void store(void *to, Words words) { _mm512_store_si512(to, words); }
void store_anywhere(float *to, Vector numbers) { _mm512_storeu_ps(to, numbers); }
void store(float *to, Mask there, Vector numbers) { _mm512_mask_storeu_ps(to, there, numbers); }
void store_words(float *to, Mask there, Words words) { _mm512_mask_storeu_epi32(to, there, words); }
Vector numbers_of(Words words) { return _mm512_castsi512_ps(words); }
Words words_of(Vector numbers) { return _mm512_castps_si512(numbers); }

// The first lanes, as many as there are, all of them for more.
Mask first_lanes(int64_t count) { return (Mask)((1u << std::clamp<int64_t>(count, 0, LANES)) - 1); }

// Comparisons: a number that is none is not below another.
Mask is_below(Vector x, Vector y) { return _mm512_cmp_ps_mask(x, y, _CMP_LT_OQ); }
Vector choose(Mask mask, Vector yes, Vector no) { return _mm512_mask_mov_ps(no, mask, yes); }

Vector multiply_add(Vector x, Vector y, Vector z) { return _mm512_fmadd_ps(x, y, z); }       // x y + z
Vector multiply_subtract(Vector x, Vector y, Vector z) { return _mm512_fmsub_ps(x, y, z); }  // x y - z
Vector subtract_product(Vector z, Vector x, Vector y) { return _mm512_fnmadd_ps(x, y, z); }  // z - x y
Vector larger(Vector x, Vector y) { return _mm512_max_ps(x, y); } // y, where one of them is no number
Vector magnitude(Vector x) { return _mm512_abs_ps(x); }
Vector nearest_whole(Vector x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
Vector times_power_of_2(Vector x, Vector whole) { return _mm512_scalef_ps(x, whole); }
Words add_to_exponents(Words x, Words whole) { return _mm512_add_epi32(x, _mm512_slli_epi32(whole, 23)); }
float sum_of(Vector x) { return _mm512_reduce_add_ps(x); }

// What several products share.
Vector load_once(const void *from) { return load(from); }

// 1 / x of normal x: of 14 bits, and twice as many after a step of Newton's.
Vector inverse_of(Vector x) {
    Vector near = _mm512_rcp14_ps(x);
    return near * subtract_product(all(2), x, near);
}

// Swap rows and columns of 16 x 16 words: of 2 x 2, of 4 x 4, then of 4 x 4 such blocks.
[[gnu::always_inline]] inline void transpose(Words (&rows)[LANES]) {
    Words twos[16], fours[16], halves[16];
    for (int i = 0; i < 16; i += 2) {
        twos[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
        twos[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; ++j) {
            fours[i + 2 * j] = _mm512_unpacklo_epi64(twos[i + j], twos[i + j + 2]);
            fours[i + 2 * j + 1] = _mm512_unpackhi_epi64(twos[i + j], twos[i + j + 2]);
        }
    for (int i = 0; i < 4; ++i)
        for (int j = i; j < 16; j += 8) {
            halves[j] = _mm512_shuffle_i32x4(fours[j], fours[j + 4], 0x88);
            halves[j + 4] = _mm512_shuffle_i32x4(fours[j], fours[j + 4], 0xdd);
        }
    for (int i = 0; i < 8; ++i) {
        rows[i] = _mm512_shuffle_i32x4(halves[i], halves[i + 8], 0x88);
        rows[i + 8] = _mm512_shuffle_i32x4(halves[i], halves[i + 8], 0xdd);
    }
}

#else // AVX2, with half of the lanes and half of the registers

using Vector = __m256;
using Words = __m256i;
using Mask = __m256i;
constexpr int64_t LANES = 8;
constexpr int ROWS = 4;

Vector all(float value) { return _mm256_set1_ps(value); }
Vector load(const void *from) { return _mm256_load_ps((const float *)from); }
Vector load_anywhere(const float *from) { return _mm256_loadu_ps(from); }
Vector load(const float *from, Mask there) { return _mm256_maskload_ps(from, there); }
Words load_words(const float *from, Mask there) { return _mm256_castps_si256(load(from, there)); }
void store(void *to, Vector numbers) { _mm256_store_ps((float *)to, numbers); }
void store(void *to, Words words) { _mm256_store_si256((Words *)to, words); }
void store_anywhere(float *to, Vector numbers) { _mm256_storeu_ps(to, numbers); }
Vector numbers_of(Words words) { return _mm256_castsi256_ps(words); }
Words words_of(Vector numbers) { return _mm256_castps_si256(numbers); }

// A store of some lanes takes AMD's CPUs as long as ten of all.
void store(float *to, Mask there, Vector numbers) {
    if (_mm256_movemask_ps(numbers_of(there)) == 0xff)
        store_anywhere(to, numbers);
    else
        _mm256_maskstore_ps(to, there, numbers);
}

void store_words(float *to, Mask there, Words words) { store(to, there, numbers_of(words)); }

Mask first_lanes(int64_t count) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32((int)std::clamp<int64_t>(count, 0, LANES)),
                              _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

Mask is_below(Vector x, Vector y) { return words_of(_mm256_cmp_ps(x, y, _CMP_LT_OQ)); }
Vector choose(Mask mask, Vector yes, Vector no) { return _mm256_blendv_ps(no, yes, numbers_of(mask)); }

Vector multiply_add(Vector x, Vector y, Vector z) { return _mm256_fmadd_ps(x, y, z); }
Vector multiply_subtract(Vector x, Vector y, Vector z) { return _mm256_fmsub_ps(x, y, z); }
Vector subtract_product(Vector z, Vector x, Vector y) { return _mm256_fnmadd_ps(x, y, z); }
Vector larger(Vector x, Vector y) { return _mm256_max_ps(x, y); }
Vector magnitude(Vector x) { return _mm256_andnot_ps(all(-0.0f), x); }
Vector nearest_whole(Vector x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
Words add_to_exponents(Words x, Words whole) { return _mm256_add_epi32(x, _mm256_slli_epi32(whole, 23)); }

// Of a product that is a normal number; NaN stays NaN.
Vector times_power_of_2(Vector x, Vector whole) {
    return numbers_of(add_to_exponents(words_of(x), _mm256_cvtps_epi32(whole)));
}

float sum_of(Vector x) {
    __m128 four = _mm256_castps256_ps128(x) + _mm256_extractf128_ps(x, 1);
    __m128 two = four + _mm_movehl_ps(four, four);
    return _mm_cvtss_f32(two + _mm_movehdup_ps(two));
}

Vector inverse_of(Vector x) { return all(1) / x; }

// Load what several products share into a register: compilers would load it for each of them, which takes longer.
Vector load_once(const void *from) {
    Vector numbers = load(from);
    asm("" : "+x"(numbers));
    return numbers;
}

// Swap rows and columns of 8 x 8 words: of 2 x 2, of 4 x 4, then of 2 x 2 such blocks.
[[gnu::always_inline]] inline void transpose(Words (&rows)[LANES]) {
    Words twos[8], fours[8];
    for (int i = 0; i < 8; i += 2) {
        twos[i] = _mm256_unpacklo_epi32(rows[i], rows[i + 1]);
        twos[i + 1] = _mm256_unpackhi_epi32(rows[i], rows[i + 1]);
    }
    for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; ++j) {
            fours[i + 2 * j] = _mm256_unpacklo_epi64(twos[i + j], twos[i + j + 2]);
            fours[i + 2 * j + 1] = _mm256_unpackhi_epi64(twos[i + j], twos[i + j + 2]);
        }
    for (int i = 0; i < 4; ++i) {
        rows[i] = _mm256_permute2x128_si256(fours[i], fours[i + 4], 0x20);
        rows[i + 4] = _mm256_permute2x128_si256(fours[i], fours[i + 4], 0x31);
    }
}

#endif

// ---- Powers of two ----

// Polynomials of 2^x over [-1/2, 1/2], minimax, highest power first; of relative errors 1.5e-7 and 1e-4.
constexpr float OF_FLOAT32[] = {1.32695353e-3f, 9.67129134e-3f, 5.55071086e-2f, 2.40222469e-1f, 6.93147004e-1f, 1};
constexpr float OF_BFLOAT16[] = {5.5860561e-2f, 2.4022651e-1f, 6.9314718e-1f, 1};

template <size_t COUNT> Vector polynomial(Vector x, const float (&coefficients)[COUNT]) {
    Vector value = all(coefficients[0]);
    for (size_t i = 1; i < COUNT; ++i) value = multiply_add(value, x, all(coefficients[i]));
    return value;
}

// 2^(factor x), which is not above 2^127: 0 below the normal numbers, and NaN for NaN. Its relative error is that of
// rounding, 1.6e-7 at most, beside that of the factor.
Vector exact_power(Vector x, Vector factor) {
    Vector exponent = x * factor, whole = nearest_whole(exponent);
    Vector power = polynomial(multiply_subtract(x, factor, whole), OF_FLOAT32);
    return choose(is_below(exponent, all(-126)), all(0), times_power_of_2(power, whole));
}

// 2^exponent of an exponent <= 0, cut off at 2^-126; NaN for NaN.
template <size_t COUNT> Vector power_below_1(Vector exponent, const float (&coefficients)[COUNT]) {
    constexpr float MAGIC = 12582912; // 1.5 * 2^23: added to a number, its whole part is in the sum's lowest bits
    exponent = larger(all(-126), exponent);
    Vector whole = exponent + all(MAGIC);
    Vector power = polynomial(exponent - (whole - all(MAGIC)), coefficients);
    return numbers_of(add_to_exponents(words_of(power), words_of(whole)));
}

// ---- Memory ----

// An array that begins where a cache line does.
template <class Number> class Buffer {
  public:
    explicit Buffer(int64_t count)
        : numbers((Number *)std::aligned_alloc(64, (size_t)round_up(count * (int64_t)sizeof(Number), 64))) {
        if (numbers == nullptr) throw std::bad_alloc();
    }
    ~Buffer() { std::free(numbers); }
    Buffer(const Buffer &) = delete;
    operator Number *() const { return numbers; }

  private:
    Number *numbers;
};

// The rows of a matrix in memory.
template <class Number> struct RowsOf {
    Number *data;
    int64_t stride, length, width;

    Number *operator[](int64_t row) const { return data + row * stride; }
};

} // namespace
