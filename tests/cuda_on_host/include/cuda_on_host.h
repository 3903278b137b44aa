// CUDA's names on a plain C++ compiler, so that tests run the kernels' own source where there is no GPU.
//
// Blocks run one after the other; the threads of a block are coroutines that run in turn from barrier to barrier. What
// this shows: indexing, bounds, the protocol of barriers and asynchronous copies (copies land as late as CUDA allows),
// and, by running threads and blocks backwards (cuda_on_host_backwards), results that depend on an order CUDA does not
// promise. What it cannot show: speed, and the exact order in which tensor cores add.
#pragma once

#include <math.h>
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __launch_bounds__(threads)

using std::max;
using std::min;

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
inline const char* cudaGetErrorString(cudaError_t) { return "an error on the host"; }
using cudaStream_t = struct StreamOnHost*;

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct uint4 {
  unsigned x, y, z, w;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;
inline bool cuda_on_host_backwards = false;

namespace cuda_on_host {

[[noreturn]] inline void die(const char* why) {
  std::fprintf(stderr, "cuda_on_host: %s\n", why);
  std::abort();
}

inline std::mutex one_launch_at_a_time;  // shared memory is static, and so are the threads

struct Thread {
  static constexpr size_t kStack = 128 << 10;
  std::unique_ptr<char[]> stack;  // made when first run, then kept from block to block
  jmp_buf here;
  bool done = false;
  int barrier = 0;  // line of the barrier it waits at
  std::vector<std::vector<std::function<void()>>> copies{1};  // asynchronous ones by group, the last still open
};

inline jmp_buf scheduler;
inline std::vector<Thread> threads(1024);
inline Thread* running = nullptr;
inline std::function<void()> body;
inline int votes[2];  // of __syncthreads_count, for this and the next barrier
inline int barriers = 0;

// Contexts start a thread on its own stack; from then on setjmp and longjmp switch, without a system call.
[[gnu::noinline]] inline void wait() {
  if (_setjmp(running->here) == 0) _longjmp(scheduler, 1);
}

inline void thread_main() {
  for (;;) {
    body();
    running->done = true;
    wait();
  }
}

[[gnu::noinline]] inline void resume() {
  if (_setjmp(scheduler) != 0) return;
  if (running->stack != nullptr) _longjmp(running->here, 1);
  running->stack.reset(new char[Thread::kStack]);
  ucontext_t start;
  getcontext(&start);
  start.uc_stack.ss_sp = running->stack.get();
  start.uc_stack.ss_size = Thread::kStack;
  makecontext(&start, thread_main, 0);
  setcontext(&start);
}

inline void run_block(int count) {
  for (int t = 0; t < count; ++t) {
    threads[t].done = false;
    threads[t].copies.resize(1);
    threads[t].copies.back().clear();
  }
  for (int alive = count; alive > 0;) {
    int line = 0;
    alive = 0;
    for (int i = 0; i < count; ++i) {
      const int t = cuda_on_host_backwards ? count - 1 - i : i;
      running = &threads[t];
      if (running->done) continue;
      threadIdx.x = t;
      resume();
      if (running->done) continue;
      if (alive++ > 0 && running->barrier != line) die("threads of a block wait at different barriers");
      line = running->barrier;
    }
    ++barriers;
    votes[barriers % 2] = 0;
  }
}

inline int barrier(int line, bool vote) {
  int& ballot = votes[barriers % 2];
  ballot += vote;
  running->barrier = line;
  wait();
  return ballot;
}

}  // namespace cuda_on_host

#define __syncthreads() cuda_on_host::barrier(__LINE__, false)
#define __syncthreads_count(vote) cuda_on_host::barrier(__LINE__, vote)

template <typename... Params>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...), Params... args) {
  const std::lock_guard<std::mutex> lock(cuda_on_host::one_launch_at_a_time);
  blockDim = config->blockDim;
  gridDim = config->gridDim;
  cuda_on_host::body = [&] { kernel(args...); };
  for (unsigned b = 0; b < gridDim.x; ++b) {
    blockIdx.x = cuda_on_host_backwards ? gridDim.x - 1 - b : b;
    cuda_on_host::run_block(static_cast<int>(blockDim.x));
  }
  return cudaSuccess;
}

inline cudaError_t cudaMemsetAsync(void* data, int value, size_t bytes, cudaStream_t) {
  std::memset(data, value, bytes);
  return cudaSuccess;
}

template <typename T>
T atomicAdd(T* at, T value) {
  const T before = *at;
  *at += value;
  return before;
}
template <typename T>
T atomicMin(T* at, T value) {
  const T before = *at;
  *at = std::min(before, value);
  return before;
}
template <typename T>
T atomicOr(T* at, T value) {
  const T before = *at;
  *at |= value;
  return before;
}
inline unsigned long long atomicCAS(unsigned long long* at, unsigned long long expected, unsigned long long value) {
  const unsigned long long before = *at;
  if (before == expected) *at = value;
  return before;
}

inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __ffs(int v) { return __builtin_ffs(v); }
