// Numbers in bfloat16 as whole ones of 8 bits, each sample with a scale and a zero point of its own:
//
//     q = round(x / scale) + zero point, in 0 ... 255     scale = (highest - lowest) / 255
//
// lowest and highest are those of the sample, and zero, which is exact: convolutions pad with it.

#include <cmath>
#include <limits>

#include "bfloat16.hpp"
#include "threads.hpp"

namespace {

constexpr int64_t AT_ONCE = 1 << 15; // numbers of a sample that are a piece of work
constexpr float INFINITE = std::numeric_limits<float>::infinity();

// ---- What Python hands over (quantize.py has the same structure) ----

struct Problem {
    int64_t samples, count;  // count: numbers in a sample
    const uint16_t *numbers; // [samples, count]
    uint8_t *out;            // the same
    float *scales;           // [samples]; NaN for a sample with one in it
    int32_t *zero_points;    // [samples]
    float *extremes;         // [samples * pieces_of(count), 2]: the lowest and the highest of each piece
};

int64_t pieces_of(int64_t count) { return (count + AT_ONCE - 1) / AT_ONCE; }

class Piece {
  public:
    explicit Piece(const Problem &problem) : problem(problem) {}

  protected:
    template <class Work> void for_lanes(int64_t piece, Work work) const {
        int64_t pieces = pieces_of(problem.count), sample = piece / pieces, start = piece % pieces * AT_ONCE;
        int64_t end = std::min(problem.count, start + AT_ONCE);
        for (int64_t i = start; i < end; i += LANES) work(sample * problem.count + i, first_lanes(end - i));
    }

    const Problem &problem;
};

class Extremes : Piece {
  public:
    using Piece::Piece;

    void operator()(int64_t piece) {
        Vector lowest = all(0), highest = all(0);
        __mmask16 unordered = 0;
        for_lanes(piece, [&](int64_t at, __mmask16 there) {
            Vector x = load(problem.numbers + at, there);
            lowest = _mm512_min_ps(lowest, x);
            highest = _mm512_max_ps(highest, x);
            unordered |= _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
        });
        problem.extremes[2 * piece] = _mm512_reduce_min_ps(lowest);
        problem.extremes[2 * piece + 1] = unordered ? std::nanf("") : _mm512_reduce_max_ps(highest);
    }
};

class Rounding : Piece {
  public:
    using Piece::Piece;

    void operator()(int64_t piece) {
        int64_t sample = piece / pieces_of(problem.count);
        Vector inverse = all(1 / problem.scales[sample]), zero_point = all((float)problem.zero_points[sample]);
        for_lanes(piece, [&](int64_t at, __mmask16 there) {
            Vector shifted = _mm512_fmadd_ps(load(problem.numbers + at, there), inverse, zero_point);
            __m512i whole = _mm512_max_epi32(_mm512_cvtps_epi32(shifted), _mm512_setzero_si512());
            _mm_mask_storeu_epi8(problem.out + at, there, _mm512_cvtusepi32_epi8(whole));
        });
    }
};

} // namespace

// Returns 0, or 1 where there is not enough memory.
extern "C" int quantize(const Problem *problem, int threads, Parallel parallel) {
    int64_t pieces = pieces_of(problem->count);
    if (run<Extremes>(*problem, problem->samples * pieces, threads, parallel)) return 1;
    for (int64_t sample = 0; sample < problem->samples; ++sample) {
        const float *extremes = problem->extremes + 2 * sample * pieces;
        float lowest = 0, highest = 0;
        for (int64_t piece = 0; piece < pieces; ++piece) {
            lowest = std::min(lowest, extremes[2 * piece]);
            if (!(extremes[2 * piece + 1] <= highest)) highest = extremes[2 * piece + 1]; // NaN, too
            if (std::isnan(highest)) break;
        }
        float scale = (highest - lowest) / 255;
        problem->scales[sample] = scale == 0 ? 1 : scale;
        problem->zero_points[sample] = scale > 0 && scale < INFINITE ? (int32_t)std::nearbyint(-lowest / scale) : 0;
    }
    return run<Rounding>(*problem, problem->samples * pieces, threads, parallel);
}
