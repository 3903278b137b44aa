// The interface by which CPU code runs tasks in parallel; the caller supplies the threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>

namespace jaxsparse::cpu {

constexpr int64_t kGrain = 4096;  // rows per task: enough to hide its start, few enough to balance two cores

// Runs body(i) once for every i in [0, tasks), on any threads and in any order, and returns when all have run.
// Results must not depend on the order: a task writes what no other task writes.
using ParallelFor = std::function<void(int64_t tasks, const std::function<void(int64_t)>& body)>;

// The same over [0, size) in ranges of at most `grain`: body(begin, end).
inline void parallel_ranges(const ParallelFor& parallel_for, int64_t size, int64_t grain,
                            const std::function<void(int64_t, int64_t)>& body) {
  parallel_for((size + grain - 1) / grain,
               [&](int64_t i) { body(i * grain, std::min(size, (i + 1) * grain)); });
}

}  // namespace jaxsparse::cpu
