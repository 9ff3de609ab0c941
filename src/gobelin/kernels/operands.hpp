// What Python hands over to every kernel (operands.py has the same structures).

#pragma once

#include "vectors.hpp"

namespace {

struct Sizes {
    int64_t batch, heads, queries, keys, width;
};

// A tensor [batch, heads, length, width] whose rows are contiguous; strides count elements.
template <class Number> struct TensorOf {
    Number *data;
    int64_t batch_stride, head_stride, row_stride;
};

using Tensor = TensorOf<uint16_t>; // of bfloat16

template <class Number>
RowsOf<Number> head_of(const TensorOf<Number> &tensor, int64_t batch, int64_t head, int64_t length, int64_t width) {
    return {tensor.data + batch * tensor.batch_stride + head * tensor.head_stride, tensor.row_stride, length, width};
}

// An attention without gradients.
template <class Number> struct AttentionProblem {
    Sizes sizes;
    TensorOf<Number> query, key, value, out;
    const uint8_t *mask; // [batch, keys], 0 for a key that is hidden; or null
};

// OpenMP's entry, GOMP_parallel: calls work(data) in so many threads. It is handed over and not linked to, so that it
// is the one of the OpenMP that torch has loaded; two of them would each keep threads that spin.
using Parallel = void (*)(void (*work)(void *), void *data, unsigned threads, unsigned flags);

} // namespace
