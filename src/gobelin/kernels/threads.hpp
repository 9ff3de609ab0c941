// Work that is shared among threads, in pieces whose results do not depend on who does them.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <new>

#include "operands.hpp"

namespace {

template <class Problem> struct Job {
    const Problem &problem;
    int64_t count;
    std::atomic<int64_t> next{0};
    std::atomic<bool> out_of_memory{false};
};

// Work of one thread: take the next piece that is left, until none is.
template <class Worker, class Problem> void take_pieces(void *data) {
    Job<Problem> &job = *(Job<Problem> *)data;
    try {
        Worker worker{job.problem};
        for (int64_t i; (i = job.next.fetch_add(1)) < job.count;) worker(i);
    } catch (const std::bad_alloc &) {
        job.out_of_memory = true;
    }
}

// Let workers, one a thread, do pieces 0 to count - 1 of a problem. Returns 0, or 1 where there is not enough memory.
template <class Worker, class Problem>
int run(const Problem &problem, int64_t count, int threads, Parallel parallel) {
    Job<Problem> job{problem, count};
    threads = (int)std::min<int64_t>(threads, count);
    if (threads > 1)
        parallel(take_pieces<Worker, Problem>, &job, (unsigned)threads, 0);
    else
        take_pieces<Worker, Problem>(&job);
    return job.out_of_memory;
}

} // namespace
