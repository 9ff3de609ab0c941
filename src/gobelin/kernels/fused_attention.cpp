// Scaled dot-product attention and its gradients, fused: the [queries, keys] matrices are never in memory as a whole.
//
// For one head of a sample, with Q, O, dO [queries, width] and K, V [keys, width] in bfloat16, scale = 1 / sqrt(width):
//
//     forward     S = scale Q K^T     L = log(rowsum(exp(S)))     P = exp(S - L)     O = P V
//     backward    D = rowsum(dO * O)     dP = dO V^T     dS = P * (dP - D)
//                 dV = P^T dO     dQ = scale dS K     dK = scale dS^T Q
//
// Forward keeps O and L, from which backward computes P again, block by block (Dao et al. 2022, "FlashAttention",
// algorithms 1 and 4). P and dS are rounded to bfloat16 before they are multiplied; all sums are float32. A row of dS
// adds up to zero, which removes from dQ what all keys share, but only as exactly as D is known. So forward also keeps
// what rounding took from O: without it, dQ is up to 10 times as far from the truth as by plain products in bfloat16.
//
// One side of S lies along the lanes, the other is broadcast to them (lanes.hpp): queries lie along the lanes going
// forward, so that maxima and sums over keys need no work across lanes, and keys going backward. One thread computes a
// head from beginning to end, so that no result depends on how many threads there are.

#include <algorithm>
#include <atomic>
#include <cmath>

#include "lanes.hpp"
#include "operands.hpp"

namespace {

constexpr int64_t KEYS_AT_ONCE = 256;   // going forward: logits of 16 queries then take 16 KB of the L1 cache
constexpr int64_t QUERIES_AT_ONCE = 64; // going backward: P and dS of 16 keys then take 6 KB
constexpr float NO_LOGIT = -1e30f; // of a key that is padding: finite, so that its difference from a logit is no NaN

// ---- What Python hands over (fused_attention.py has the same structures) ----

struct ForwardProblem {
    Sizes sizes;
    Tensor query, key, value, out, remainder;
    float *log_sum_exp; // [batch, heads, queries]
};

struct BackwardProblem {
    Sizes sizes;
    Tensor query, key, value, out, remainder, grad, dquery, dkey, dvalue;
    const float *log_sum_exp; // [batch, heads, queries]
};

// ---- Forward: 16 queries along the lanes ----

class Forward {
  public:
    explicit Forward(const ForwardProblem &problem) : problem(problem) {}

    void operator()(int64_t batch, int64_t head) {
        Rows query = head_of(problem.query, batch, head, sizes.queries, sizes.width);
        Rows out = head_of(problem.out, batch, head, sizes.queries, sizes.width);
        Rows remainder = head_of(problem.remainder, batch, head, sizes.queries, sizes.width);
        float *log_sum_exp = problem.log_sum_exp + (batch * sizes.heads + head) * sizes.queries;
        pack_rows(key_rows, head_of(problem.key, batch, head, sizes.keys, sizes.width), keys, pairs);
        pack_row_pairs(value_pairs, head_of(problem.value, batch, head, sizes.keys, sizes.width), 0, keys, padded);
        for (int64_t start = 0; start < sizes.queries; start += LANES) {
            pack_columns(query_columns, query, start);
            std::memset(sums, 0, (size_t)(padded * LANES) * sizeof(float));
            Vector largest = all(NO_LOGIT), total = all(0);
            for (int64_t from = 0; from < sizes.keys; from += KEYS_AT_ONCE)
                add_keys(from, std::min(KEYS_AT_ONCE, sizes.keys - from), largest, total);
            write_columns(out, start, sums, _mm512_div_ps(all(1), total), &remainder);
            Vector result = _mm512_mul_ps(_mm512_add_ps(largest, log2(total)), all(LN_2));
            _mm512_mask_storeu_ps(log_sum_exp + start, first_lanes(sizes.queries - start), result);
        }
    }

  private:
    // Add `count` keys. All sums are relative to the largest logit so far, and change when it does.
    void add_keys(int64_t from, int64_t count, Vector &largest, Vector &total) {
        Vector before = largest;
        largest = _mm512_max_ps(before, compute_logits(from, count));
        if (from > 0) {
            Vector less = exp2(_mm512_sub_ps(before, largest));
            total = _mm512_mul_ps(total, less);
            for (int64_t c = 0; c < padded; ++c)
                _mm512_store_ps(sums + c * LANES, _mm512_mul_ps(_mm512_load_ps(sums + c * LANES), less));
        }
        total = _mm512_add_ps(total, compute_probs(count, largest));
        add_products(sums, probs, value_pairs + from / 2 * padded, (count + 1) / 2, padded);
    }

    // S of `count` keys, not yet scaled; returns the largest, scaled.
    Vector compute_logits(int64_t from, int64_t count) {
        Vector largest = all(NO_LOGIT);
        for (int64_t key = 0; key < count; key += ROWS) {
            Vector dots[ROWS] = {};
            add_dots(dots, query_columns, key_rows + (from + key) * pairs, pairs);
            for (int row = 0; row < ROWS; ++row) {
                if (key + row >= count) dots[row] = all(NO_LOGIT);
                largest = _mm512_max_ps(largest, dots[row]);
                _mm512_store_ps(logits + (key + row) * LANES, dots[row]);
            }
        }
        return _mm512_mul_ps(largest, factor);
    }

    // P of `count` keys, not yet divided by its sum, as pairs of keys; returns the sum.
    Vector compute_probs(int64_t count, Vector largest) {
        Vector total = all(0);
        for (int64_t key = 0; key < count; key += ROWS)
            for (int row = 0; row < ROWS; row += 2) {
                const float *pair = logits + (key + row) * LANES;
                Vector first = exp2(_mm512_fmsub_ps(_mm512_load_ps(pair), factor, largest));
                Vector second = exp2(_mm512_fmsub_ps(_mm512_load_ps(pair + LANES), factor, largest));
                total = _mm512_add_ps(total, _mm512_add_ps(first, second));
                _mm512_store_si512(probs + (key + row) / 2 * LANES, in_pairs(rounded(first, second)));
            }
        return total;
    }

    const ForwardProblem &problem;
    const Sizes &sizes = problem.sizes;
    const int64_t pairs = round_up(sizes.width, 2) / 2, padded = round_up(sizes.width, 4);
    const int64_t keys = round_up(sizes.keys, LANES);
    const Vector factor = all(LOG2_E / std::sqrt((float)sizes.width)); // powers are of 2
    Buffer<uint32_t> key_rows{keys * pairs + LANES}, value_pairs{keys / 2 * padded + LANES};
    Buffer<uint32_t> query_columns{LANES * pairs}, probs{KEYS_AT_ONCE / 2 * LANES};
    Buffer<float> logits{KEYS_AT_ONCE * LANES}, sums{LANES * padded};
};

// ---- Backward: 16 keys along the lanes ----

class Backward {
  public:
    explicit Backward(const BackwardProblem &problem) : problem(problem) {}

    void operator()(int64_t batch, int64_t head) {
        auto of_queries = [&](const Tensor &all) { return head_of(all, batch, head, sizes.queries, sizes.width); };
        auto of_keys = [&](const Tensor &all) { return head_of(all, batch, head, sizes.keys, sizes.width); };
        Rows key = of_keys(problem.key), value = of_keys(problem.value);
        Rows dkey = of_keys(problem.dkey), dvalue = of_keys(problem.dvalue);
        pack_queries(of_queries(problem.query), of_queries(problem.grad));
        pack_sums(of_queries(problem.grad), of_queries(problem.out), of_queries(problem.remainder),
                  problem.log_sum_exp + (batch * sizes.heads + head) * sizes.queries);
        for (int64_t start = 0; start < sizes.keys; start += LANES) {
            pack_columns(key_columns, key, start);
            pack_columns(value_columns, value, start);
            pack_row_pairs(key_pairs, key, start, LANES, lanes_padded);
            std::memset(dkey_sums, 0, (size_t)(padded * LANES) * sizeof(float));
            std::memset(dvalue_sums, 0, (size_t)(padded * LANES) * sizeof(float));
            for (int64_t from = 0; from < queries; from += QUERIES_AT_ONCE) {
                int64_t count = std::min(QUERIES_AT_ONCE, queries - from);
                compute_probs(from, count, first_lanes(sizes.keys - start));
                add_products(dvalue_sums, probs, grad_pairs + from / 2 * padded, count / 2, padded);
                add_products(dkey_sums, dlogits, query_pairs + from / 2 * padded, count / 2, padded);
                add_row_products(dquery_sums + from * lanes_padded, dlogits_rows, key_pairs, count, lanes_padded);
            }
            write_columns(dvalue, start, dvalue_sums, all(1));
            write_columns(dkey, start, dkey_sums, all(scale));
        }
        write_rows(of_queries(problem.dquery), dquery_sums, lanes_padded, all(scale));
    }

  private:
    void pack_queries(const Rows &query, const Rows &grad) {
        pack_rows(query_rows, query, queries, pairs);
        pack_rows(grad_rows, grad, queries, pairs);
        pack_row_pairs(query_pairs, query, 0, queries, padded);
        pack_row_pairs(grad_pairs, grad, 0, queries, padded);
        std::memset(dquery_sums, 0, (size_t)(queries * lanes_padded) * sizeof(float));
    }

    // L and D; of queries that are padding P is 1, and dO is 0.
    void pack_sums(const Rows &grad, const Rows &out, const Rows &remainder, const float *log_sum_exp) {
        std::memset(log2_sums, 0, (size_t)queries * sizeof(float));
        std::memset(minus_d, 0, (size_t)queries * sizeof(float));
        for (int64_t row = 0; row < sizes.queries; ++row) {
            log2_sums[row] = log_sum_exp[row] * LOG2_E;
            minus_d[row] = -(dot(grad[row], out[row], sizes.width) + dot(grad[row], remainder[row], sizes.width));
        }
    }

    // P and dS of 16 keys and `count` queries: both as pairs of queries, and dS as rows of pairs of keys too.
    void compute_probs(int64_t from, int64_t count, __mmask16 keys_there) {
        for (int64_t query = from; query < from + count; query += ROWS) {
            Vector p[ROWS] = {}, ds[ROWS];
            for (int row = 0; row < ROWS; ++row) ds[row] = all(minus_d[query + row]);
            add_dots(p, key_columns, query_rows + query * pairs, pairs);
            add_dots(ds, value_columns, grad_rows + query * pairs, pairs);
            for (int row = 0; row < ROWS; ++row) {
                Vector power = _mm512_fmsub_ps(p[row], factor, all(log2_sums[query + row]));
                p[row] = _mm512_maskz_mov_ps(keys_there, exp2(power));
                ds[row] = _mm512_mul_ps(p[row], ds[row]);
            }
            for (int row = 0; row < ROWS; row += 2) {
                int64_t at = (query - from + row) / 2 * LANES;
                PairVector rows = rounded(ds[row], ds[row + 1]);
                _mm512_store_si512(probs + at, in_pairs(rounded(p[row], p[row + 1])));
                _mm512_store_si512(dlogits + at, in_pairs(rows));
                _mm512_store_si512(dlogits_rows + at, rows);
            }
        }
    }

    const BackwardProblem &problem;
    const Sizes &sizes = problem.sizes;
    const int64_t pairs = round_up(sizes.width, 2) / 2, padded = round_up(sizes.width, 4);
    const int64_t lanes_padded = round_up(sizes.width, LANES), queries = round_up(sizes.queries, LANES);
    const float scale = 1 / std::sqrt((float)sizes.width);
    const Vector factor = all(LOG2_E * scale); // powers are of 2
    Buffer<uint32_t> query_rows{queries * pairs + LANES}, grad_rows{queries * pairs + LANES}; // of all queries
    Buffer<uint32_t> query_pairs{queries / 2 * padded + LANES}, grad_pairs{queries / 2 * padded + LANES};
    Buffer<float> log2_sums{queries}, minus_d{queries}, dquery_sums{queries * lanes_padded};
    Buffer<uint32_t> key_columns{LANES * pairs}, value_columns{LANES * pairs}; // of 16 keys
    Buffer<uint32_t> key_pairs{LANES / 2 * lanes_padded};
    Buffer<float> dkey_sums{LANES * padded}, dvalue_sums{LANES * padded};
    Buffer<uint32_t> probs{QUERIES_AT_ONCE / 2 * LANES}, dlogits{QUERIES_AT_ONCE / 2 * LANES}; // of both
    Buffer<uint32_t> dlogits_rows{QUERIES_AT_ONCE / 2 * LANES};
};

// ---- All heads, by several threads ----

template <class Problem> struct Job {
    const Problem &problem;
    std::atomic<int64_t> next_head{0};
    std::atomic<bool> out_of_memory{false};
};

// Work of one thread: take the next head that is left, until none is.
template <class Worker, class Problem> void take_heads(void *data) {
    Job<Problem> &job = *(Job<Problem> *)data;
    const Sizes &sizes = job.problem.sizes;
    try {
        Worker worker(job.problem);
        for (int64_t i; (i = job.next_head.fetch_add(1)) < sizes.batch * sizes.heads;)
            worker(i / sizes.heads, i % sizes.heads);
    } catch (const std::bad_alloc &) {
        job.out_of_memory = true;
    }
}

template <class Worker, class Problem> int run(const Problem &problem, int threads, Parallel parallel) {
    Job<Problem> job{problem};
    threads = (int)std::min<int64_t>(threads, problem.sizes.batch * problem.sizes.heads);
    if (threads > 1)
        parallel(take_heads<Worker, Problem>, &job, (unsigned)threads, 0);
    else
        take_heads<Worker, Problem>(&job);
    return job.out_of_memory;
}

} // namespace

// Both return 0, or 1 where there is not enough memory.
extern "C" int attention_forward(const ForwardProblem *problem, int threads, Parallel parallel) {
    return run<Forward>(*problem, threads, parallel);
}

extern "C" int attention_backward(const BackwardProblem *problem, int threads, Parallel parallel) {
    return run<Backward>(*problem, threads, parallel);
}
