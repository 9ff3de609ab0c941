// Rows of bfloat16 in memory as float32 in registers, 16 at a time, and functions of them.

#pragma once

#include "lanes.hpp"

namespace {

Vector load(const uint16_t *from, __mmask16 there) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(there, from)), 16));
}

void store(uint16_t *to, __mmask16 there, Vector numbers) {
    _mm256_mask_storeu_epi16(to, there, (__m256i)_mm512_cvtneps_pbh(numbers));
}

// 1 / (1 + exp(-x)): zero where the power has no inverse, and NaN of NaN.
Vector sigmoid(Vector x) {
    Vector power = _mm512_mul_ps(x, all(-LOG2_E));
    Vector inverse = inverse_of(_mm512_add_ps(all(1), exp2(power)));
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(power, all(126), _CMP_NGE_UQ), inverse);
}

} // namespace
