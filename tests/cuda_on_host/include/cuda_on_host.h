// CUDA's names on a plain C++ compiler, so that tests run the kernels' own source where there is no GPU.
//
// Blocks run one after the other; the threads of a block are coroutines that run in turn from barrier to barrier, the
// lanes of a warp from one warp collective to the next. The blocks of a cooperative launch or of a cluster have an operating
// system's thread each, for their shared memory, and run in turn from one of their barriers to the next. What this shows:
// indexing, bounds, the protocol of barriers and asynchronous copies (copies land as late as CUDA allows), and, by running
// threads and blocks backwards (cuda_on_host_backwards), results that depend on an order CUDA does not promise. What it
// cannot show: speed, and the exact order in which tensor cores add.
#pragma once

#include <math.h>
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static thread_local
#define __launch_bounds__(...)

using std::max;
using std::min;
inline float max(float a, float b) { return std::fmax(a, b); }  // of NaN and a number the number, as on a GPU
inline double max(double a, double b) { return std::fmax(a, b); }
inline float min(float a, float b) { return std::fmin(a, b); }
inline double min(double a, double b) { return std::fmin(a, b); }

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorNotSupported = 801
};
inline const char* cudaGetErrorString(cudaError_t) { return "an error on the host"; }
using cudaStream_t = struct StreamOnHost*;

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct uint4 {
  unsigned x, y, z, w;
};
struct int2 {
  int x, y;
};
struct int4 {
  int x, y, z, w;
};
struct float2 {
  float x, y;
};
struct float4 {
  float x, y, z, w;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
enum cudaLaunchAttributeID { cudaLaunchAttributeCooperative, cudaLaunchAttributeClusterDimension };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int cooperative;
    struct {
      unsigned x, y, z;
    } clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

// The device has three multiprocessors that hold one block each.
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrMaxSharedMemoryPerBlockOptin };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  return *value = attribute == cudaDevAttrMultiProcessorCount ? 3 : 227 * 1024, cudaSuccess;
}
template <typename F>
cudaError_t cudaFuncSetAttribute(F, cudaFuncAttribute, int) {
  return cudaSuccess;
}
template <typename F>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, F, int, size_t) {
  return *blocks = 1, cudaSuccess;
}

inline thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;
inline bool cuda_on_host_backwards = false;
inline bool cuda_on_host_has_clusters = true;

namespace cuda_on_host {

[[noreturn]] inline void die(const char* why) {
  std::fprintf(stderr, "cuda_on_host: %s\n", why);
  std::abort();
}

inline std::mutex one_launch_at_a_time;

// Whose turn it is among the blocks that run together: those of a cooperative launch, or of a cluster.
struct Turns {
  std::mutex mutex;
  std::condition_variable changed;
  int blocks = 0, at = 0;

  void wait_for(int turn) {
    std::unique_lock<std::mutex> lock(mutex);
    changed.wait(lock, [&] { return at == turn; });
  }
  void pass_on() {
    const std::lock_guard<std::mutex> lock(mutex);
    at = (at + 1) % blocks;
    changed.notify_all();
  }
};
inline Turns turns;
inline thread_local int own_turn = 0;

struct Thread {
  static constexpr size_t kStack = 128 << 10;
  std::unique_ptr<char[]> stack;  // made when first run, then kept from block to block
  jmp_buf here;
  bool done = false;
  int barrier = 0;       // line of the barrier it waits at
  bool in_warp = false;  // a barrier of its warp's, not of the block's
  bool has_arrived = false;  // at a barrier of its cluster
  std::vector<std::vector<std::function<void()>>> copies{1};  // asynchronous ones by group, the last still open
};

inline std::function<void()> body;
inline thread_local jmp_buf scheduler;
inline thread_local std::vector<Thread> threads(1024);
inline thread_local Thread* running = nullptr;
inline thread_local int votes[2];  // of __syncthreads_count, for this and the next barrier
inline thread_local int barriers = 0;

constexpr int kLanes = 32;
struct Warp {
  uint64_t values[2][kLanes];  // what its lanes show each other, in this and the next collective
  int collectives = 0;
};
inline thread_local std::vector<Warp> warps(1024 / kLanes);
inline thread_local char* dynamic_shared = nullptr;

// Dynamic shared memory of blocks that run together, at like addresses modulo 1024. Undefined before a block and after it.
class SharedOfBlocks {
 public:
  void resize(int blocks, size_t bytes) {
    bytes_ = (bytes + 1023) / 1024 * 1024;
    memory_.assign(blocks * bytes_ + 1024, kUndefined);
  }
  char* of(int rank) { return memory_.data() + (-reinterpret_cast<uintptr_t>(memory_.data()) & 1023) + rank * bytes_; }
  void forget(int rank) { std::memset(of(rank), kUndefined, bytes_); }
  // The same place in another block's.
  const char* elsewhere(const void* own, int rank) {
    const size_t offset = static_cast<const char*>(own) - dynamic_shared;
    if (offset >= bytes_) die("an address that is not in dynamic shared memory");
    return of(rank) + offset;
  }

 private:
  static constexpr char kUndefined = static_cast<char>(0xa5);
  std::vector<char> memory_;
  size_t bytes_ = 0;
};
inline SharedOfBlocks shared_of_blocks;

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

// Runs a thread to its next barrier, to its warp's next collective, or to its end.
inline void run_thread(int t) {
  running = &threads[t];
  threadIdx.x = t;
  resume();
}

// Runs a warp until each lane is done or waits at a barrier of the block; returns how many wait, and at which line.
inline int run_warp(int first, int count, int* line) {
  for (;;) {
    int waiting = 0, in_warp = 0;
    for (int i = 0; i < count; ++i) {
      const int t = first + (cuda_on_host_backwards ? count - 1 - i : i);
      if (threads[t].done) continue;
      run_thread(t);
      if (threads[t].done) continue;
      if (waiting++ > 0 && threads[t].barrier != *line) die("threads of a warp wait at different barriers");
      *line = threads[t].barrier;
      in_warp += threads[t].in_warp;
    }
    if (in_warp == 0) return waiting;
    if (in_warp != kLanes) die("a warp's collective without all of its lanes");
    ++warps[first / kLanes].collectives;
  }
}

inline void run_block(int count) {
  for (int t = 0; t < count; ++t) {
    threads[t].done = threads[t].has_arrived = false;
    threads[t].copies.resize(1);
    threads[t].copies.back().clear();
  }
  const int warps_in_block = (count + kLanes - 1) / kLanes;
  for (int alive = count; alive > 0;) {
    int line = 0;
    alive = 0;
    for (int i = 0; i < warps_in_block; ++i) {
      const int first = kLanes * (cuda_on_host_backwards ? warps_in_block - 1 - i : i);
      int warp_line = 0;
      const int waiting = run_warp(first, std::min(kLanes, count - first), &warp_line);
      if (waiting > 0 && alive > 0 && warp_line != line) die("threads of a block wait at different barriers");
      if (waiting > 0) line = warp_line;
      alive += waiting;
    }
    ++barriers;
    votes[barriers % 2] = 0;
  }
}

// Runs `number` blocks together; each has its turn up to every barrier that they share and to its end.
inline void run_blocks_in_turn(dim3 grid, dim3 block, unsigned first, unsigned number) {
  turns.blocks = static_cast<int>(number);
  turns.at = 0;
  std::vector<std::thread> all;
  for (int turn = 0; turn < turns.blocks; ++turn) {
    all.emplace_back([=] {
      gridDim = grid;
      blockDim = block;
      own_turn = turn;
      const int rank = cuda_on_host_backwards ? turns.blocks - 1 - turn : turn;
      blockIdx.x = first + rank;
      dynamic_shared = shared_of_blocks.of(rank);
      turns.wait_for(turn);
      run_block(static_cast<int>(block.x));
      shared_of_blocks.forget(rank);
      turns.pass_on();
    });
  }
  for (std::thread& block_thread : all) block_thread.join();
}

inline int barrier(int line, bool vote) {
  int& ballot = votes[barriers % 2];
  ballot += vote;
  running->barrier = line;
  running->in_warp = false;
  wait();
  return ballot;
}

// What every lane of the warp shows, once all lanes have come; valid until the lane's next collective but one.
inline const uint64_t* show(int line, uint64_t value) {
  const unsigned thread = threadIdx.x;
  Warp& warp = warps[thread / kLanes];
  const int buffer = warp.collectives % 2;
  warp.values[buffer][thread % kLanes] = value;
  running->barrier = line;
  running->in_warp = true;
  wait();
  return warp.values[buffer];
}
inline unsigned lane() { return threadIdx.x % kLanes; }

template <typename T>
uint64_t to_bits(T value) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return bits;
}
template <typename T>
T from_bits(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

template <typename T>
T shuffle(int line, T value, unsigned from) {
  const uint64_t* shown = show(line, to_bits(value));
  return from < kLanes ? from_bits<T>(shown[from]) : value;
}

inline unsigned ballot(int line, bool vote) {
  const uint64_t* shown = show(line, vote);
  unsigned bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= static_cast<unsigned>(shown[i]) << i;
  return bits;
}

inline unsigned reduce_or(int line, unsigned value) {
  const uint64_t* shown = show(line, value);
  for (int i = 0; i < kLanes; ++i) value |= static_cast<unsigned>(shown[i]);
  return value;
}

inline unsigned reduce_max(int line, unsigned value) {
  const uint64_t* shown = show(line, value);
  for (int i = 0; i < kLanes; ++i) value = std::max(value, static_cast<unsigned>(shown[i]));
  return value;
}

}  // namespace cuda_on_host

#define __syncthreads() cuda_on_host::barrier(__LINE__, false)
#define __syncthreads_count(vote) cuda_on_host::barrier(__LINE__, vote)

template <typename T>
void __stcs(T* to, T value) {
  *to = value;
}

// Collectives of a whole warp only: the mask must name all lanes.
#define __shfl_sync(mask, value, from) cuda_on_host::shuffle(__LINE__, value, from)
#define __shfl_up_sync(mask, value, by) cuda_on_host::shuffle(__LINE__, value, cuda_on_host::lane() - (by))
#define __shfl_down_sync(mask, value, by) cuda_on_host::shuffle(__LINE__, value, cuda_on_host::lane() + (by))
#define __shfl_xor_sync(mask, value, bits) cuda_on_host::shuffle(__LINE__, value, cuda_on_host::lane() ^ (bits))
#define __ballot_sync(mask, vote) cuda_on_host::ballot(__LINE__, vote)
#define __reduce_or_sync(mask, value) cuda_on_host::reduce_or(__LINE__, value)
#define __reduce_max_sync(mask, value) cuda_on_host::reduce_max(__LINE__, value)
#define __syncwarp() cuda_on_host::show(__LINE__, 0)

template <typename... Params>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...), Params... args) {
  const std::lock_guard<std::mutex> lock(cuda_on_host::one_launch_at_a_time);
  blockDim = config->blockDim;
  gridDim = config->gridDim;
  cuda_on_host::body = [&] { kernel(args...); };
  const bool together = config->numAttrs > 0;
  const bool is_cluster = together && config->attrs->id == cudaLaunchAttributeClusterDimension;
  const unsigned number = is_cluster ? config->attrs->val.clusterDim.x : together ? gridDim.x : 1;
  if (gridDim.x % number != 0) cuda_on_host::die("a grid of broken clusters");
  cuda_on_host::shared_of_blocks.resize(static_cast<int>(number), config->dynamicSmemBytes);
  cuda_on_host::dynamic_shared = cuda_on_host::shared_of_blocks.of(0);
  for (unsigned b = 0; b < gridDim.x; b += number) {
    const unsigned first = cuda_on_host_backwards ? gridDim.x - number - b : b;
    if (together) {
      cuda_on_host::run_blocks_in_turn(config->gridDim, config->blockDim, first, number);
    } else {
      blockIdx.x = first;
      cuda_on_host::run_block(static_cast<int>(blockDim.x));
    }
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
T atomicMax(T* at, T value) {
  const T before = *at;
  *at = std::max(before, value);
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
template <typename T>
T atomicCAS(T* at, T expected, T value) {
  const T before = *at;
  if (before == expected) *at = value;
  return before;
}

inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(uint64_t{a} * b >> 32); }
inline float rsqrtf(float v) { return 1 / sqrtf(v); }
inline float __expf(float v) { return expf(v); }
inline float __fdividef(float a, float b) { return a / b; }
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __popcll(unsigned long long v) { return __builtin_popcountll(v); }
inline int __clz(unsigned v) { return v == 0 ? 32 : __builtin_clz(v); }
inline int __clzll(unsigned long long v) { return v == 0 ? 64 : __builtin_clzll(v); }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline int __ffsll(unsigned long long v) { return __builtin_ffsll(v); }
