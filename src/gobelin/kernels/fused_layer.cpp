// A linear layer or a convolution of a narrow network with what stands around it, for inference, in float32 or bfloat16:
//
//     y = gate(W * act(norm(x)) + bias + shift) + residual
//
// norm is a group norm, a layer norm or nothing; act is SiLU or nothing; W is a window of 1×1 or 3×3 pixels; shift is a
// number for each channel of a sample, as a timestep's embedding is; gate is GEGLU, h gelu(g), or nothing.
//
// Where maps have few channels, calls of operations and the ways of their results through memory take longer than the
// arithmetic. Here the map is normalised once, into a frame of zeros where the window looks beyond the edge, and
// multiplied from there: 8 pixels by 48 channels at a time, whose sums stay in registers (4 by 24 with AVX2). Output channels lie along the
// lanes; a word of a pixel is broadcast to them (precision.hpp). Maps lie in memory as [batch, height, width, channels].
// Statistics and sums are float32. A pixel is computed by one thread, so that no bit depends on how many there are.

#include <cmath>

#include "operands.hpp"
#include "precision.hpp"
#include "threads.hpp"

namespace {

constexpr int WIDEST = 3; // vectors of output channels at a time

// ---- What Python hands over (fused_layer.py has the same structures) ----

struct Layer {
    int64_t in_channels, out_channels; // of x and of y
    int64_t side, stride;              // of the window
    int64_t groups;                    // of a group norm; 0 for a layer norm, -1 for none
    float eps;
    int32_t has_silu, is_gated;
    const float *norm_weight, *norm_bias; // [in_channels], with room for whole vectors
    const void *weight;                   // words [vectors of channels in blocks][side, side, in words][lanes of a block]
    const float *bias;                    // of whole vectors, zeros where there is none
};

struct Call {
    const Layer *layer;
    int64_t batch, height, width;      // of x
    int64_t grown_height, grown_width; // to which x is enlarged before the window
    const void *x, *shift, *residual;  // shift [batch, out_channels] or null; residual, as y, or null
    void *y;
};

// ---- Arithmetic ----

// x / (1 + exp(-x)), by the power of what is negative alone
Vector silu(Vector x) {
    Vector power = power_below_1(magnitude(x) * all(-LOG2_E), OF_FLOAT32);
    Vector inverse = inverse_of(all(1) + power);
    return x * choose(is_below(x, all(0)), inverse * power, inverse);
}

// x Phi(x), by erfc of Abramowitz and Stegun, 7.1.26: its error, 1.5e-7, is that of torch's own 1 + erf in float32.
Vector gelu(Vector x) {
    constexpr float OF[] = {1.061405429f / 2, -1.453152027f / 2, 1.421413741f / 2, -0.284496736f / 2, 0.254829592f / 2};
    Vector t = inverse_of(multiply_add(magnitude(x), all(0.3275911f * 0.70710678f), all(1)));
    Vector tail = polynomial(t, OF) * t * power_below_1(x * x * all(-0.5f * LOG2_E), OF_FLOAT32);
    return x * choose(is_below(all(0), x), all(1) - tail, tail);
}

// ---- Norm and activation, of a sample or of some rows, into the frame that the window moves in ----

struct Frame {
    int64_t height, width; // with the edge
    int64_t edge;
    void *data;
};

template <class Number> struct Framed {
    const Call &call;
    const Frame &frame;
};

template <class Number> class Normaliser {
    using Of = Precision<Number>;

  public:
    explicit Normaliser(const Framed<Number> &framed) : call(framed.call), frame(framed.frame) {}

    // Samples of one pixel, rows, are many and small.
    static int64_t samples_at_once(const Call &call) { return std::max<int64_t>(1, 64 / (call.height * call.width)); }

    static int64_t pieces_of(const Call &call) {
        return round_up(call.batch, samples_at_once(call)) / samples_at_once(call);
    }

    void operator()(int64_t piece) {
        const int64_t start = piece * samples_at_once(call), end = std::min(call.batch, start + samples_at_once(call));
        for (int64_t sample = start; sample < end; ++sample) normalise(sample);
    }

  private:
    void normalise(int64_t sample) {
        const Number *x = (const Number *)call.x + sample * call.height * call.width * channels;
        Number *to = (Number *)frame.data + sample * frame.height * frame.width * channels;
        if (layer.groups > 0) find_lines(x);
        if (frame.edge > 0) std::memset(to, 0, (size_t)(frame.height * frame.width * channels) * sizeof(Number));
        // As torch finds the nearest pixel, in float32.
        const float down = (float)call.height / (float)call.grown_height, right = (float)call.width / (float)call.grown_width;
        for (int64_t row = 0; row < call.grown_height; ++row) {
            int64_t from_row = std::min((int64_t)((float)row * down), call.height - 1);
            for (int64_t column = 0; column < call.grown_width; ++column) {
                int64_t from_column = std::min((int64_t)((float)column * right), call.width - 1);
                const Number *from = x + (from_row * call.width + from_column) * channels;
                Number *pixel = to + ((row + frame.edge) * frame.width + column + frame.edge) * channels;
                if (layer.groups == 0) find_line(from);
                write(from, pixel);
            }
        }
    }

    // slope and height of every channel, with which norm(x) = slope x + height
    void find_lines(const Number *x) {
        const int64_t positions = call.height * call.width;
        for (int64_t c = 0; c < channels; c += LANES) {
            Mask there = first_lanes(channels - c);
            Vector sums[4] = {all(0), all(0), all(0), all(0)};
            for (int64_t i = 0; i < positions; ++i)
                sums[i % 4] += Of::load(x + i * channels + c, there);
            store(means + c, total(sums));
        }
        average(means, positions);
        for (int64_t c = 0; c < channels; c += LANES) {
            Mask there = first_lanes(channels - c);
            Vector mean = load(means + c), sums[4] = {all(0), all(0), all(0), all(0)};
            for (int64_t i = 0; i < positions; ++i) {
                Vector rest = Of::load(x + i * channels + c, there) - mean;
                sums[i % 4] = multiply_add(rest, rest, sums[i % 4]);
            }
            store(variances + c, total(sums));
        }
        average(variances, positions);
        for (int64_t c = 0; c < channels; ++c) set_line(c, means[c], 1 / std::sqrt(variances[c] + layer.eps));
    }

    void find_line(const Number *pixel) {
        Vector sum = all(0), squares = all(0);
        for (int64_t c = 0; c < channels; c += LANES)
            sum += Of::load(pixel + c, first_lanes(channels - c));
        float mean = sum_of(sum) / (float)channels;
        for (int64_t c = 0; c < channels; c += LANES) {
            Mask there = first_lanes(channels - c);
            Vector rest = choose(there, Of::load(pixel + c, there) - all(mean), all(0));
            squares = multiply_add(rest, rest, squares);
        }
        float inverse = 1 / std::sqrt(sum_of(squares) / (float)channels + layer.eps);
        for (int64_t c = 0; c < channels; c += LANES) {
            Vector slope = load_anywhere(layer.norm_weight + c) * all(inverse);
            store(slopes + c, slope);
            store(heights + c, subtract_product(load_anywhere(layer.norm_bias + c), all(mean), slope));
        }
    }

    static Vector total(const Vector (&sums)[4]) {
        return (sums[0] + sums[1]) + (sums[2] + sums[3]);
    }

    // Replace every channel's number by the mean over its group.
    void average(float *numbers, int64_t positions) const {
        const int64_t width = channels / layer.groups;
        for (int64_t first = 0; first < channels; first += width) {
            float sum = 0;
            for (int64_t c = first; c < first + width; ++c) sum += numbers[c];
            for (int64_t c = first; c < first + width; ++c) numbers[c] = sum / (float)(width * positions);
        }
    }

    void set_line(int64_t c, float mean, float inverse) {
        slopes[c] = layer.norm_weight[c] * inverse;
        heights[c] = layer.norm_bias[c] - mean * slopes[c];
    }

    void write(const Number *from, Number *to) const {
        for (int64_t c = 0; c < channels; c += LANES) {
            Mask there = first_lanes(channels - c);
            Vector number = Of::load(from + c, there);
            if (layer.groups >= 0) number = multiply_add(number, load(slopes + c), load(heights + c));
            Of::store(to + c, there, layer.has_silu ? silu(number) : number);
        }
    }

    const Call &call;
    const Layer &layer = *call.layer;
    const Frame &frame;
    const int64_t channels = layer.in_channels, padded = round_up(channels, LANES);
    Buffer<float> means{padded}, variances{padded}, slopes{padded}, heights{padded};
};

// ---- Products: some pixels by up to 3 vectors of channels ----

template <class Number> class Multiplier {
    using Of = Precision<Number>;
    using Word = typename Of::Word;

  public:
    explicit Multiplier(const Framed<Number> &framed) : call(framed.call), frame(framed.frame) {}

    static int64_t vectors_of(const Layer &layer) {
        return round_up(layer.out_channels, LANES) / LANES * (layer.is_gated ? 2 : 1);
    }

    static int64_t block_of(const Layer &layer) { return layer.is_gated ? 2 : WIDEST; }

    static int64_t height_of(const Call &call) { return (call.grown_height - 1) / call.layer->stride + 1; }

    static int64_t width_of(const Call &call) { return (call.grown_width - 1) / call.layer->stride + 1; }

    static int64_t tiles_of(const Call &call) {
        return round_up(call.batch * height_of(call) * width_of(call), ROWS) / ROWS;
    }

    // Tiles of pixels that are a piece of work: several, where the sums of each are short.
    static int64_t tiles_at_once(const Call &call) {
        return std::clamp<int64_t>(1024 / (call.layer->side * call.layer->side * call.layer->in_channels), 1, 8) * 8 / ROWS;
    }

    static int64_t pieces_of(const Call &call) {
        int64_t block = block_of(*call.layer), at_once = tiles_at_once(call);
        return round_up(vectors_of(*call.layer), block) / block * (round_up(tiles_of(call), at_once) / at_once);
    }

    // A block's weights stay in the cache while it goes through the pixels.
    void operator()(int64_t piece) const {
        const int64_t at_once = tiles_at_once(call), pieces = round_up(tiles, at_once) / at_once;
        const int64_t vector = piece / pieces * block, first = piece % pieces * at_once;
        for (int64_t tile = first; tile < std::min(first + at_once, tiles); ++tile)
            switch (std::min(block, vectors - vector)) {
            case 1: multiply<1>(vector, tile * ROWS); break;
            case 2: multiply<2>(vector, tile * ROWS); break;
            default: multiply<WIDEST>(vector, tile * ROWS);
            }
    }

  private:
    template <int VECTORS> void multiply(int64_t vector, int64_t start) const {
        const Word *rows[ROWS];
        find_rows(rows, start);
        const Word *weight = (const Word *)layer.weight + vector * layer.side * layer.side * words * LANES;
        Vector sums[ROWS][VECTORS] = {};
        for (int64_t y = 0; y < layer.side; ++y)
            for (int64_t x = 0; x < layer.side; ++x) {
                const int64_t from = (y * frame.width + x) * words;
                for (int64_t word = from; word < from + words; ++word, weight += VECTORS * LANES) {
                    Vector lanes[VECTORS];
                    for (int v = 0; v < VECTORS; ++v) lanes[v] = load_once(weight + v * LANES);
                    for (int row = 0; row < ROWS; ++row)
                        for (int v = 0; v < VECTORS; ++v)
                            sums[row][v] = Of::add_product(sums[row][v], lanes[v], rows[row][word]);
                }
            }
        // Sums are met by constant indices alone: by others, compilers would keep them in memory all along.
        Vector results[ROWS][VECTORS];
        for (int row = 0; row < ROWS; ++row)
            for (int v = 0; v < VECTORS; ++v)
                results[row][v] = sums[row][v] + load(layer.bias + (vector + v) * LANES);
        const int64_t count = std::min<int64_t>(ROWS, positions - start);
        if (layer.is_gated) {
            if constexpr (VECTORS == 2) {
                for (int row = 0; row < ROWS; ++row) results[row][0] *= gelu(results[row][1]);
                write(start, count, vector / 2 * LANES, &results[0][0], VECTORS);
            }
        } else
            for (int v = 0; v < VECTORS; ++v) write(start, count, (vector + v) * LANES, &results[0][v], VECTORS);
    }

    // The upper left pixels of the windows of a tile; beyond the last one, its own again.
    void find_rows(const Word *(&rows)[ROWS], int64_t start) const {
        int64_t sample = start / (height * width), y = start / width % height, x = start % width;
        for (int64_t row = 0; row < ROWS; ++row) {
            const int64_t line = sample * frame.height + y * layer.stride;
            rows[row] = (const Word *)frame.data + (line * frame.width + x * layer.stride) * words;
            if (start + row + 1 >= positions) continue;
            if (++x == width) x = 0, ++y;
            if (y == height) y = 0, ++sample;
        }
    }

    // Write a vector of channels of `count` positions; their sums are `stride` vectors apart.
    void write(int64_t start, int64_t count, int64_t channel, const Vector *sums, int64_t stride) const {
        const int64_t channels = layer.out_channels;
        const Mask there = first_lanes(channels - channel);
        for (int64_t row = 0; row < count; ++row) {
            const int64_t at = (start + row) * channels + channel;
            Vector sum = sums[row * stride];
            if (call.shift != nullptr) {
                const int64_t sample = (start + row) / (height * width);
                sum += Of::load((const Number *)call.shift + sample * channels + channel, there);
            }
            if (call.residual != nullptr) sum += Of::load((const Number *)call.residual + at, there);
            Of::store((Number *)call.y + at, there, sum);
        }
    }

    const Call &call;
    const Layer &layer = *call.layer;
    const Frame &frame;
    const int64_t words = layer.in_channels / Of::IN_WORD, vectors = vectors_of(layer), block = block_of(layer);
    const int64_t height = height_of(call), width = width_of(call), tiles = tiles_of(call);
    const int64_t positions = call.batch * height * width;
};

// Memory of a calling thread that grows and stays: new pages would take longer than what is written into them.
class Room {
  public:
    ~Room() { std::free(data); }

    void *of(int64_t size) {
        if (size > capacity) {
            std::free(data);
            capacity = round_up(size, 4096);
            data = std::aligned_alloc(4096, (size_t)capacity);
            if (data == nullptr) capacity = 0, throw std::bad_alloc();
        }
        return data;
    }

  private:
    void *data = nullptr;
    int64_t capacity = 0;
};

// Returns 0, or 1 where there is not enough memory.
template <class Number> int compute(const Call &call, int threads, Parallel parallel) {
    const Layer &layer = *call.layer;
    try {
        const int64_t edge = layer.side / 2;
        Frame frame{call.grown_height + 2 * edge, call.grown_width + 2 * edge, edge, (void *)call.x};
        const bool as_it_is = layer.groups < 0 && !layer.has_silu && layer.side == 1;
        static thread_local Room room;
        Framed<Number> framed{call, frame};
        if (!as_it_is) {
            frame.data = room.of(call.batch * frame.height * frame.width * layer.in_channels * (int64_t)sizeof(Number));
            if (run<Normaliser<Number>>(framed, Normaliser<Number>::pieces_of(call), threads, parallel)) return 1;
        }
        return run<Multiplier<Number>>(framed, Multiplier<Number>::pieces_of(call), threads, parallel);
    } catch (const std::bad_alloc &) {
        return 1;
    }
}

} // namespace

extern "C" int float_layer(const Call *call, int threads, Parallel parallel) {
    return compute<float>(*call, threads, parallel);
}

#ifdef __AVX512BF16__
extern "C" int bfloat16_layer(const Call *call, int threads, Parallel parallel) {
    return compute<uint16_t>(*call, threads, parallel);
}
#endif

// By which Python lays out weights.
extern "C" const int64_t lanes = LANES, widest = WIDEST;
