// Group norm, with SiLU after it where wanted, and layer norm, in bfloat16 with float32 statistics, and their gradients.
//
// A matrix x [positions, channels] is one sample of a feature map, channels last, or some rows of a sequence. Over the
// part of it that shares a mean and a variance,
//
//     forward     n = (x - mean) / sqrt(variance + eps)     z = weight n + bias     y = z or silu(z) = z / (1 + exp(-z))
//     backward    dz = dy or dy silu'(z)     dweight = sum(dz n)     dbias = sum(dz)
//                 dn = weight dz     dx = (dn - mean(dn) - n mean(dn n)) / sqrt(variance + eps)
//
// Channels lie along the lanes. dweight and dbias are sums of those of single pieces of work, which are added in the
// order of the pieces, so that no result depends on how many threads there are.

#include <cmath>

#include "bfloat16.hpp"
#include "threads.hpp"

namespace {

constexpr int64_t ROWS_AT_ONCE = 64; // of a layer norm: a piece of work

// ---- What Python hands over (norms.py has the same structure) ----

// Of a group norm: x [pieces, positions, channels]; of a layer norm: x [positions, channels].
struct Problem {
    int64_t pieces, positions, channels, groups;
    float eps;
    int32_t has_silu;
    const uint16_t *x, *grad;      // grad: going backward
    const float *weight, *bias;    // [channels]
    uint16_t *out;                 // y, or dx
    float *mean, *inverse;         // [pieces, groups], or [positions]: 1 / sqrt(variance + eps)
    float *dweight, *dbias;        // [channels]
    float *piece_sums;             // [pieces, 2, channels]: dweight and dbias of each
};

// ---- Arithmetic ----

// Four sums hide the latency of adding.
template <class Value> Vector sum_over(int64_t count, Value value) {
    Vector sums[4] = {all(0), all(0), all(0), all(0)};
    for (int64_t i = 0; i < count; ++i) sums[i % 4] = _mm512_add_ps(sums[i % 4], value(i));
    return _mm512_add_ps(_mm512_add_ps(sums[0], sums[1]), _mm512_add_ps(sums[2], sums[3]));
}

// Add up the pieces' gradients of weight and bias.
void add_pieces(const Problem &problem) {
    std::memset(problem.dweight, 0, (size_t)problem.channels * sizeof(float));
    std::memset(problem.dbias, 0, (size_t)problem.channels * sizeof(float));
    for (int64_t piece = 0; piece < problem.pieces; ++piece) {
        const float *sums = problem.piece_sums + piece * 2 * problem.channels;
        for (int64_t channel = 0; channel < problem.channels; ++channel) {
            problem.dweight[channel] += sums[channel];
            problem.dbias[channel] += sums[problem.channels + channel];
        }
    }
}

// ---- Group norm: a sample is a piece of work ----

class GroupNorm {
  public:
    explicit GroupNorm(const Problem &problem) : problem(problem) {}

  protected:
    // Replace every channel's number by the mean over its group.
    void average(float *numbers) const {
        const int64_t width = problem.channels / problem.groups;
        for (int64_t first = 0; first < problem.channels; first += width) {
            float sum = 0;
            for (int64_t c = first; c < first + width; ++c) sum += numbers[c];
            for (int64_t c = first; c < first + width; ++c) numbers[c] = sum / (float)(width * problem.positions);
        }
    }

    // Spread statistics of groups over their channels.
    void spread(const float *of_groups, float *numbers) const {
        const int64_t width = problem.channels / problem.groups;
        for (int64_t c = 0; c < problem.channels; ++c) numbers[c] = of_groups[c / width];
    }

    // Lines z = slope x + height of the channels.
    void find_lines() {
        for (int64_t c = 0; c < problem.channels; ++c) {
            slope[c] = problem.weight[c] * inverse[c];
            height[c] = problem.bias[c] - mean[c] * slope[c];
        }
    }

    template <class Work> void for_lanes(Work work) const {
        for (int64_t c = 0; c < problem.channels; c += LANES) work(c, first_lanes(problem.channels - c));
    }

    const Problem &problem;
    const int64_t padded = round_up(problem.channels, LANES), size = problem.positions * problem.channels;
    Buffer<float> mean{padded}, inverse{padded}, slope{padded}, height{padded};
};

class GroupNormForward : GroupNorm {
  public:
    using GroupNorm::GroupNorm;

    void operator()(int64_t sample) {
        const uint16_t *x = problem.x + sample * size;
        uint16_t *out = problem.out + sample * size;
        const int64_t channels = problem.channels;
        for_lanes([&](int64_t c, __mmask16 there) {
            auto number = [&](int64_t i) { return load(x + i * channels + c, there); };
            _mm512_store_ps(mean + c, sum_over(problem.positions, number));
        });
        average(mean);
        for_lanes([&](int64_t c, __mmask16 there) {
            Vector centre = _mm512_load_ps(mean + c);
            auto square = [&](int64_t i) {
                Vector rest = _mm512_sub_ps(load(x + i * channels + c, there), centre);
                return _mm512_mul_ps(rest, rest);
            };
            _mm512_store_ps(inverse + c, sum_over(problem.positions, square));
        });
        average(inverse);
        for (int64_t c = 0; c < channels; ++c) inverse[c] = 1 / std::sqrt(inverse[c] + problem.eps);
        for (int64_t group = 0; group < problem.groups; ++group) {
            problem.mean[sample * problem.groups + group] = mean[group * (channels / problem.groups)];
            problem.inverse[sample * problem.groups + group] = inverse[group * (channels / problem.groups)];
        }
        find_lines();
        for_lanes([&](int64_t c, __mmask16 there) {
            Vector a = _mm512_load_ps(slope + c), b = _mm512_load_ps(height + c);
            for (int64_t at = c; at < size; at += channels) {
                Vector z = _mm512_fmadd_ps(a, load(x + at, there), b);
                store(out + at, there, problem.has_silu ? _mm512_mul_ps(z, sigmoid(z)) : z);
            }
        });
    }
};

class GroupNormBackward : GroupNorm {
  public:
    explicit GroupNormBackward(const Problem &problem) : GroupNorm(problem), dz(problem.positions * padded) {}

    void operator()(int64_t sample) {
        const uint16_t *x = problem.x + sample * size, *grad = problem.grad + sample * size;
        uint16_t *out = problem.out + sample * size;
        float *dweight = problem.piece_sums + sample * 2 * problem.channels, *dbias = dweight + problem.channels;
        const int64_t channels = problem.channels;
        spread(problem.mean + sample * problem.groups, mean);
        spread(problem.inverse + sample * problem.groups, inverse);
        find_lines();
        for_lanes([&](int64_t c, __mmask16 there) {
            Vector sum = all(0), products = all(0);
            for (int64_t i = 0; i < problem.positions; ++i) {
                Vector number = load(x + i * channels + c, there);
                Vector d = compute_dz(c, number, load(grad + i * channels + c, there));
                _mm512_store_ps(dz + i * padded + c, d);
                sum = _mm512_add_ps(sum, d);
                products = _mm512_fmadd_ps(d, normed(c, number), products);
            }
            _mm512_mask_storeu_ps(dbias + c, there, sum);
            _mm512_mask_storeu_ps(dweight + c, there, products);
        });
        for (int64_t c = 0; c < channels; ++c) {
            dn_mean[c] = problem.weight[c] * dbias[c];
            dn_n_mean[c] = problem.weight[c] * dweight[c];
        }
        average(dn_mean);
        average(dn_n_mean);
        for_lanes([&](int64_t c, __mmask16 there) {
            Vector along = _mm512_load_ps(dn_n_mean + c), shared = _mm512_load_ps(dn_mean + c);
            Vector factor = _mm512_load_ps(inverse + c), weight = _mm512_maskz_loadu_ps(there, problem.weight + c);
            for (int64_t i = 0; i < problem.positions; ++i) {
                Vector dn = _mm512_fmsub_ps(weight, _mm512_load_ps(dz + i * padded + c), shared);
                dn = _mm512_fnmadd_ps(normed(c, load(x + i * channels + c, there)), along, dn);
                store(out + i * channels + c, there, _mm512_mul_ps(dn, factor));
            }
        });
    }

  private:
    Vector normed(int64_t c, Vector number) const {
        return _mm512_mul_ps(_mm512_sub_ps(number, _mm512_load_ps(mean + c)), _mm512_load_ps(inverse + c));
    }

    // silu'(z) = s + z s (1 - s), of the sigmoid s
    Vector compute_dz(int64_t c, Vector number, Vector grad) const {
        if (!problem.has_silu) return grad;
        Vector z = _mm512_fmadd_ps(_mm512_load_ps(slope + c), number, _mm512_load_ps(height + c));
        Vector s = sigmoid(z), rest = _mm512_fnmadd_ps(z, s, z);
        return _mm512_mul_ps(grad, _mm512_fmadd_ps(s, rest, s));
    }

    Buffer<float> dn_mean{padded}, dn_n_mean{padded}, dz;
};

// ---- Layer norm: some rows are a piece of work ----

class LayerNorm {
  public:
    explicit LayerNorm(const Problem &problem) : problem(problem) {}

  protected:
    template <class Work> void for_rows(int64_t piece, Work work) const {
        int64_t end = std::min(problem.positions, (piece + 1) * ROWS_AT_ONCE);
        for (int64_t row = piece * ROWS_AT_ONCE; row < end; ++row) work(row);
    }

    // The sum over a row of value(first of 16 channels, mask of those that there are).
    template <class Value> float sum_of_row(Value value) const {
        Vector sum = all(0);
        for (int64_t c = 0; c < problem.channels; c += LANES)
            sum = _mm512_add_ps(sum, value(c, first_lanes(problem.channels - c)));
        return _mm512_reduce_add_ps(sum);
    }

    const Problem &problem;
    const float per_channel = 1 / (float)problem.channels;
};

class LayerNormForward : LayerNorm {
  public:
    using LayerNorm::LayerNorm;

    void operator()(int64_t piece) {
        for_rows(piece, [&](int64_t row) {
            const uint16_t *x = problem.x + row * problem.channels;
            uint16_t *out = problem.out + row * problem.channels;
            float mean = per_channel * sum_of_row([&](int64_t c, __mmask16 there) { return load(x + c, there); });
            float variance = per_channel * sum_of_row([&](int64_t c, __mmask16 there) {
                                 Vector rest = _mm512_maskz_sub_ps(there, load(x + c, there), all(mean));
                                 return _mm512_mul_ps(rest, rest);
                             });
            float inverse = 1 / std::sqrt(variance + problem.eps);
            problem.mean[row] = mean;
            problem.inverse[row] = inverse;
            for (int64_t c = 0; c < problem.channels; c += LANES) {
                __mmask16 there = first_lanes(problem.channels - c);
                Vector n = _mm512_mul_ps(_mm512_sub_ps(load(x + c, there), all(mean)), all(inverse));
                Vector weight = _mm512_maskz_loadu_ps(there, problem.weight + c);
                store(out + c, there, _mm512_fmadd_ps(weight, n, _mm512_maskz_loadu_ps(there, problem.bias + c)));
            }
        });
    }
};

class LayerNormBackward : LayerNorm {
  public:
    using LayerNorm::LayerNorm;

    void operator()(int64_t piece) {
        float *dweight = problem.piece_sums + piece * 2 * problem.channels, *dbias = dweight + problem.channels;
        std::memset(dweight, 0, (size_t)(2 * problem.channels) * sizeof(float));
        for_rows(piece, [&](int64_t row) {
            const uint16_t *x = problem.x + row * problem.channels, *grad = problem.grad + row * problem.channels;
            uint16_t *out = problem.out + row * problem.channels;
            Vector mean = all(problem.mean[row]), inverse = all(problem.inverse[row]);
            Vector sum = all(0), products = all(0);
            for (int64_t c = 0; c < problem.channels; c += LANES) {
                __mmask16 there = first_lanes(problem.channels - c);
                Vector n = _mm512_mul_ps(_mm512_sub_ps(load(x + c, there), mean), inverse);
                Vector dz = load(grad + c, there);
                add_to(dbias + c, there, dz);
                add_to(dweight + c, there, _mm512_mul_ps(dz, n));
                Vector dn = _mm512_mul_ps(_mm512_maskz_loadu_ps(there, problem.weight + c), dz);
                sum = _mm512_add_ps(sum, dn);
                products = _mm512_mask3_fmadd_ps(dn, n, products, there);
            }
            Vector shared = all(per_channel * _mm512_reduce_add_ps(sum));
            Vector along = all(per_channel * _mm512_reduce_add_ps(products));
            for (int64_t c = 0; c < problem.channels; c += LANES) {
                __mmask16 there = first_lanes(problem.channels - c);
                Vector n = _mm512_mul_ps(_mm512_sub_ps(load(x + c, there), mean), inverse);
                Vector weight = _mm512_maskz_loadu_ps(there, problem.weight + c);
                Vector dn = _mm512_fmsub_ps(weight, load(grad + c, there), shared);
                store(out + c, there, _mm512_mul_ps(_mm512_fnmadd_ps(n, along, dn), inverse));
            }
        });
    }

  private:
    static void add_to(float *sums, __mmask16 there, Vector numbers) {
        _mm512_mask_storeu_ps(sums, there, _mm512_add_ps(_mm512_maskz_loadu_ps(there, sums), numbers));
    }
};

} // namespace

// All return 0, or 1 where there is not enough memory.
extern "C" int group_norm_forward(const Problem *problem, int threads, Parallel parallel) {
    return run<GroupNormForward>(*problem, problem->pieces, threads, parallel);
}

extern "C" int group_norm_backward(const Problem *problem, int threads, Parallel parallel) {
    int failed = run<GroupNormBackward>(*problem, problem->pieces, threads, parallel);
    if (!failed) add_pieces(*problem);
    return failed;
}

extern "C" int layer_norm_forward(const Problem *problem, int threads, Parallel parallel) {
    return run<LayerNormForward>(*problem, problem->pieces, threads, parallel);
}

extern "C" int layer_norm_backward(const Problem *problem, int threads, Parallel parallel) {
    int failed = run<LayerNormBackward>(*problem, problem->pieces, threads, parallel);
    if (!failed) add_pieces(*problem);
    return failed;
}
