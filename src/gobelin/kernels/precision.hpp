// Matrices of float32 and of bfloat16 by the same code: rows of words, along which the sums of products run.
//
// A word is a number of float32, or a pair of bfloat16, whose products vdpbf16ps adds up. Sums are float32.

#pragma once

#include "lanes.hpp"

namespace {

template <class Number> struct Precision;

template <> struct Precision<float> {
    using Word = float;
    static constexpr int64_t IN_WORD = 1;

    static PairVector load_words(const float *from, int64_t numbers) {
        return _mm512_maskz_loadu_epi32(first_16(numbers), from);
    }

    static void store_words(float *to, int64_t numbers, PairVector words) {
        _mm512_mask_storeu_epi32(to, first_16(numbers), words);
    }

    static Vector load(const float *from, __mmask16 there) { return _mm512_maskz_loadu_ps(there, from); }

    static void store(float *to, __mmask16 there, Vector numbers) { _mm512_mask_storeu_ps(to, there, numbers); }

    static Vector add_product(Vector sum, Vector lanes, float word) { return _mm512_fmadd_ps(lanes, all(word), sum); }
};

template <> struct Precision<uint16_t> {
    using Word = uint32_t;
    static constexpr int64_t IN_WORD = 2;

    static PairVector load_words(const uint16_t *from, int64_t numbers) {
        return _mm512_maskz_loadu_epi16(first_32(numbers), from);
    }

    static void store_words(uint16_t *to, int64_t numbers, PairVector words) {
        _mm512_mask_storeu_epi16(to, first_32(numbers), words);
    }

    static Vector load(const uint16_t *from, __mmask16 there) {
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(there, from)), 16));
    }

    static void store(uint16_t *to, __mmask16 there, Vector numbers) {
        _mm256_mask_storeu_epi16(to, there, (__m256i)_mm512_cvtneps_pbh(numbers));
    }

    static Vector add_product(Vector sum, Vector lanes, uint32_t word) {
        return ::add_product(sum, _mm512_castps_si512(lanes), word);
    }
};

// Polynomials of 2^x over [-1/2, 1/2], minimax, highest power first; of relative errors 1.5e-7 and 1e-4.
constexpr float OF_FLOAT32[] = {1.32695353e-3f, 9.67129134e-3f, 5.55071086e-2f, 2.40222469e-1f, 6.93147004e-1f, 1};
constexpr float OF_BFLOAT16[] = {5.5860561e-2f, 2.4022651e-1f, 6.9314718e-1f, 1};

// 2^(factor x): the polynomial, and the exponent's bits; 0 below the normal numbers, and NaN
// for NaN. Its relative error is that of rounding, 1.6e-7 at most, beside that of the factor.
Vector exact_power(Vector x, Vector factor) {
    Vector exponent = _mm512_mul_ps(x, factor);
    __mmask16 normal = _mm512_cmp_ps_mask(exponent, all(-126), _CMP_NLT_UQ);
    Vector whole = _mm512_roundscale_ps(exponent, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    Vector rest = _mm512_fmsub_ps(x, factor, whole);
    Vector power = all(OF_FLOAT32[0]);
    for (int i = 1; i < 6; ++i) power = _mm512_fmadd_ps(power, rest, all(OF_FLOAT32[i]));
    return _mm512_maskz_scalef_ps(normal, power, whole);
}

// 2^exponent of an exponent <= 0, cut off at 2^-126; NaN for NaN.
template <size_t COUNT> Vector power_below_1(Vector exponent, const float (&coefficients)[COUNT]) {
    constexpr float MAGIC = 12582912; // 1.5 * 2^23: added to a number, its whole part is in the sum's lowest bits
    exponent = _mm512_max_ps(all(-126), exponent); // of two, NaN is the second that is returned
    Vector whole = _mm512_add_ps(exponent, all(MAGIC));
    Vector rest = _mm512_sub_ps(exponent, _mm512_sub_ps(whole, all(MAGIC))), power = all(coefficients[0]);
    for (size_t i = 1; i < COUNT; ++i) power = _mm512_fmadd_ps(power, rest, all(coefficients[i]));
    __m512i bits = _mm512_slli_epi32(_mm512_castps_si512(whole), 23);
    return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(power), bits));
}

} // namespace
