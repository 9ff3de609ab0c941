// GEGLU in bfloat16, hidden * gelu(gate), and its gradients, with the exact GELU: gelu(x) = x Phi(x), of the normal
// distribution's Phi(x) = erfc(-x / sqrt(2)) / 2. A row of the input is the hidden numbers, then the gates.
//
//     backward    dhidden = dy gelu(gate)     dgate = dy hidden (Phi(gate) + gate phi(gate))

#include "bfloat16.hpp"
#include "threads.hpp"

namespace {

constexpr int64_t ROWS_AT_ONCE = 64; // a piece of work

// ---- What Python hands over (geglu.py has the same structure) ----

struct Problem {
    int64_t rows, width;
    const uint16_t *both, *grad; // [rows, 2 width]; [rows, width], going backward
    uint16_t *out;               // [rows, width], or [rows, 2 width]
};

// Phi(x) by Chebyshev's polynomial of log(erfc), Press et al., "Numerical Recipes", 6.2 (erfcc): relative error 1e-7.
Vector normal_below(Vector x) {
    const float of[] = {0.17087277f, -0.82215223f, 1.48851587f, -1.13520398f, 0.27886807f,
                        -0.18628806f, 0.09678418f, 0.37409196f, 1.00002368f, -1.26551223f};
    Vector z = _mm512_min_ps(all(30), _mm512_mul_ps(_mm512_abs_ps(x), all(0.70710678f))); // beyond it is 0 or 1
    Vector t = inverse_of(_mm512_fmadd_ps(z, all(0.5f), all(1))), power = all(of[0]);
    for (int i = 1; i < 10; ++i) power = _mm512_fmadd_ps(power, t, all(of[i]));
    power = _mm512_mul_ps(_mm512_fnmadd_ps(z, z, power), all(LOG2_E));
    Vector tail = _mm512_mul_ps(_mm512_mul_ps(t, all(0.5f)), exp2(power));
    return _mm512_mask_sub_ps(tail, _mm512_cmp_ps_mask(x, all(0), _CMP_GT_OQ), all(1), tail);
}

// phi(x), the density
Vector normal_at(Vector x) {
    return _mm512_mul_ps(all(0.39894228f), exp2(_mm512_mul_ps(_mm512_mul_ps(x, x), all(-0.5f * LOG2_E))));
}

class Geglu {
  public:
    explicit Geglu(const Problem &problem) : problem(problem) {}

  protected:
    template <class Work> void for_lanes(int64_t piece, Work work) const {
        int64_t end = std::min(problem.rows, (piece + 1) * ROWS_AT_ONCE);
        for (int64_t row = piece * ROWS_AT_ONCE; row < end; ++row)
            for (int64_t c = 0; c < problem.width; c += LANES)
                work(row * problem.width + c, row * 2 * problem.width + c, first_lanes(problem.width - c));
    }

    const Problem &problem;
};

class Forward : Geglu {
  public:
    using Geglu::Geglu;

    void operator()(int64_t piece) {
        for_lanes(piece, [&](int64_t at, int64_t of_both, __mmask16 there) {
            Vector gate = load(problem.both + of_both + problem.width, there);
            Vector hidden = load(problem.both + of_both, there);
            store(problem.out + at, there, _mm512_mul_ps(hidden, _mm512_mul_ps(gate, normal_below(gate))));
        });
    }
};

class Backward : Geglu {
  public:
    using Geglu::Geglu;

    void operator()(int64_t piece) {
        for_lanes(piece, [&](int64_t at, int64_t of_both, __mmask16 there) {
            Vector gate = load(problem.both + of_both + problem.width, there);
            Vector hidden = load(problem.both + of_both, there), grad = load(problem.grad + at, there);
            Vector below = normal_below(gate), slope = _mm512_fmadd_ps(gate, normal_at(gate), below);
            store(problem.out + of_both, there, _mm512_mul_ps(grad, _mm512_mul_ps(gate, below)));
            store(problem.out + of_both + problem.width, there, _mm512_mul_ps(grad, _mm512_mul_ps(hidden, slope)));
        });
    }
};

} // namespace

// Both return 0, or 1 where there is not enough memory.
extern "C" int geglu_forward(const Problem *problem, int threads, Parallel parallel) {
    return run<Forward>(*problem, (problem->rows + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE, threads, parallel);
}

extern "C" int geglu_backward(const Problem *problem, int threads, Parallel parallel) {
    return run<Backward>(*problem, (problem->rows + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE, threads, parallel);
}
