// What Python hands over to every kernel (operands.py has the same structures).

#pragma once

#include "lanes.hpp"

namespace {

struct Sizes {
    int64_t batch, heads, queries, keys, width;
};

// A tensor [batch, heads, length, width] of bfloat16, whose rows are contiguous; strides count elements.
struct Tensor {
    uint16_t *data;
    int64_t batch_stride, head_stride, row_stride;
};

inline Rows head_of(const Tensor &tensor, int64_t batch, int64_t head, int64_t length, int64_t width) {
    return {tensor.data + batch * tensor.batch_stride + head * tensor.head_stride, tensor.row_stride, length, width};
}

// OpenMP's entry, GOMP_parallel: calls work(data) in so many threads. It is handed over and not linked to, so that it
// is the one of the OpenMP that torch has loaded; two of them would each keep threads that spin.
using Parallel = void (*)(void (*work)(void *), void *data, unsigned threads, unsigned flags);

} // namespace
