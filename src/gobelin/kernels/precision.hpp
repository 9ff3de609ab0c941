// Matrices of float32 and of bfloat16 by the same code: rows of words, along which the sums of products run.
//
// A word is a number of float32, or a pair of bfloat16, whose products vdpbf16ps adds up. Sums are float32.

#pragma once

#include "vectors.hpp"

#ifdef __AVX512BF16__
#include "lanes.hpp"
#endif

namespace {

template <class Number> struct Precision;

template <> struct Precision<float> {
    using Word = float;
    static constexpr int64_t IN_WORD = 1;

    static Words load_words(const float *from, int64_t numbers) { return ::load_words(from, first_lanes(numbers)); }

    static void store_words(float *to, int64_t numbers, Words words) {
        ::store_words(to, first_lanes(numbers), words);
    }

    static Vector load(const float *from, Mask there) { return ::load(from, there); }

    static void store(float *to, Mask there, Vector numbers) { ::store(to, there, numbers); }

    static Vector add_product(Vector sum, Vector lanes, float word) { return multiply_add(lanes, all(word), sum); }
};

#ifdef __AVX512BF16__

template <> struct Precision<uint16_t> {
    using Word = uint32_t;
    static constexpr int64_t IN_WORD = 2;

    static Words load_words(const uint16_t *from, int64_t numbers) {
        return _mm512_maskz_loadu_epi16(first_32(numbers), from);
    }

    static void store_words(uint16_t *to, int64_t numbers, Words words) {
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

#endif

} // namespace
