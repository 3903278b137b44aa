// Sums over rows per channel, and batch norm, see channels.h, each in one cooperative kernel: the sums of each share of the
// rows, then, after a barrier of the grid, those of all shares, in a fixed order. A thread reads 16 bytes of a row, with
// several rows in flight.
//
// Statistics take one pass over x. A share sums differences from its first row, which is as near to the mean as any other;
// shares are combined by Chan's formula around the mean of the first share. So a large mean causes no cancellation.
//
// For batch norm, every block sums all shares of its own channels and goes over its rows once more, backwards. Rows come
// through shared memory (cp.async), which holds the last of them, for small arrays all, until the second pass.
//
// Measured on an H200, float16, in us; in parentheses the steps: column sums by a kernel as here, a few numbers a channel and
// a pass over the rows by XLA:
//
//     rows x channels        12,000 x 32   47,872 x 128   183,262 x 64   183,262 x 96   183,262 x 256
//     forward                6.8 (7.4)     11.8 (16.7)    17.9 (26.3)    28.6 (40.5)    73 (94)
//     with a residual        6.7 (6.5)     12.9 (17.0)    28.3 (28.7)    44.4 (41.8)    113 (101)
//     backward, ReLU         7.2 (7.9)     13.7 (19.1)    28.8 (36)      46.0 (57)      114 (133)
//
// Forward and backward of SparseResNet21D on two PandaSet scans went from 3.82 ms and 326 kernels to 3.64 and 238. About 6 us
// of each are the launch, the barrier and latencies; large arrays are bound by memory. Tried, of 183,262 x 64 and 96:
//     rows through registers, kept in shared memory as they are summed: 37 and 61 backward. What is kept leaves L1 too little
//         room for loads in flight; with nothing kept 32 and 56
//     a block of 32 channels, 64 bytes, also where there are more than 64: 171 backward where 183,262 x 256 take 122
//     places and slots computed for each row, not stepped: 10 to 30 % more instructions, 0.5 to 1 us
//     backward behind a residual: the sum of the two cotangents and the ReLU's gate as part of it, in place of a kernel by XLA
//         before it. 5 us less where arrays fit L2 (190,208 x 32: 26.7 to 22.4), 7 to 13 more at 119,808 and 183,262 x 96,
//         since fewer rows stay in shared memory. SparseResNet21D 3.61 ms to 3.59, SparseResUNet42 8.26 to 8.33
//
// Rows that stay in shared memory leave L2 first (copy_last_use), so that it keeps those that the second pass reads again.
// Between kernels that write the inputs and read the result, forward, with a residual, backward: 183,262 x 96 29.6, 48.4, 49.6
// to 27.8, 46.9, 47.4; 119,808 x 96 17.8, 29.8, 32.2 to 17.8, 27.9, 30.2; SparseResUNet42 8.36 ms to 8.29. Not better, or worse
// for the network: the other rows with evict_last, rows of the second pass or results with evict_first.
//
// With a gate, ct counts only where an affine map of x is positive. This gives the sums behind a ReLU without storing its
// masked cotangents: forward and backward of SparseResUNet42 on two KITTI scans went from 9.11 ms to 8.91.
//
// Not built: statistics in the epilogue of the convolution. They would only save reading y, 0.5 to 5 us, since combining the
// sums of its blocks needs another kernel. By the SASS, means and squares of a block's columns, by Chan's formula from pairs
// of rows up, take 320 instructions per warp at 32 columns, 500 at 64, 630 at 96, 710 at 128. After the last product only
// other blocks hide them: at 183,262 rows 4 to 8 us of issue slots, at 29,000 of 256 channels 3.
#include "cuda/channels/channels.h"

#include <cmath>
#include <limits>

#include "cuda/channels/rows.cuh"
#include "cuda/common/grid.cuh"

namespace jaxsparse::cuda {
namespace {

constexpr int kThreads = kChannelThreads, kWarps = kThreads / kWarp;

// Channels up to which a block has 32 of them, also where it could have 64.
constexpr int64_t kNarrow = 64;
constexpr int64_t most_shares(int channels_of_block) {
  return channels_of_block == kWarp ? kChannelBlocks : shares_of(div_up(kNarrow + 1, channels_of_block));
}

template <typename A>
constexpr Dtype kDtypeOf = sizeof(A) == 8 ? Dtype::kF64 : Dtype::kF32;

// The number of rows of each share. Rows are dealt out to the shares in turn, kDown at a time.
template <int kDown>
struct ShareSizes {
  int32_t turns, last, of_last;

  __device__ ShareSizes(int32_t rows, int32_t shares)
      : turns(rows / kDown / shares), last(rows / kDown % shares), of_last(rows % kDown) {}
  __device__ int32_t operator[](int32_t share) const {
    return (turns + (share < last)) * kDown + (share == last ? of_last : 0);
  }
};

// From the sums of differences from `center` (*first) and of their squares (*second): the mean, and the sum of squared
// differences from the mean.
template <typename A>
__device__ void finish_statistics(A center, int32_t rows, A* first, A* second) {
  if (rows == 0) return;
  const A mean = *first / rows;
  const A squares = *second - *first * mean;
  *second = squares < 0 ? A{0} : squares;  // not max(): of NaN and 0 that is 0
  *first = center + mean;
}

// The threads are kGroups equal groups, and each has N pairs of sums. Pair i of a group's thread number t counts as number
// i * threads of a group + t; thread n gets the sum over the groups of their pairs number n.
template <int N, int kGroups, typename A>
__device__ void sum_groups(A* first, A* second) {
  constexpr int kInGroup = kThreads / kGroups;
  __shared__ A sums[2][kGroups][N * kInGroup];
  const int group = threadIdx.x / kInGroup, number = threadIdx.x % kInGroup;
  __syncthreads();  // threads may still read earlier sums
#pragma unroll
  for (int i = 0; i < N; ++i) {
    sums[0][group][i * kInGroup + number] = first[i];
    sums[1][group][i * kInGroup + number] = second[i];
  }
  __syncthreads();
  if (threadIdx.x >= N * kInGroup) return;
  *first = *second = 0;
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
    *first += sums[0][g][threadIdx.x];
    *second += sums[1][g][threadIdx.x];
  }
}

// Halves a lane's sums v[0 .. 2n): it sends one half to the lane `step` away and adds the half that it gets to the other.
template <typename A>
__device__ void halve(A* v, int n, int step) {
  const bool upper = threadIdx.x & step;
#pragma unroll
  for (int i = 0; i < n; ++i) {
    const A given = __shfl_xor_sync(kAllLanes, upper ? v[i] : v[i + n], step);
    v[i] = (upper ? v[i + n] : v[i]) + given;
  }
}

// Calls f(T{}) for a run-time type.
template <typename F>
__device__ void with_type(Dtype dtype, F&& f) {
  switch (dtype) {
    case Dtype::kF16: return f(__half{});
    case Dtype::kBF16: return f(__nv_bfloat16{});
    case Dtype::kF32: return f(float{});
    case Dtype::kF64: return f(double{});
  }
}

// max(v, lowest); NaN stays NaN.
__device__ inline float at_least(float v, float lowest) {
#ifdef __CUDA_ARCH__
  asm("max.NaN.f32 %0, %0, %1;" : "+f"(v) : "f"(lowest));
  return v;
#else
  return v < lowest ? lowest : v;
#endif
}
__device__ inline double at_least(double v, double lowest) { return v < lowest ? lowest : v; }

enum class ChannelOp { kStatistics, kMoments, kGatedMoments, kNorm, kNormAdd, kNormGrad, kGatedNormGrad };

constexpr bool is_gated(ChannelOp op) { return op == ChannelOp::kGatedMoments || op == ChannelOp::kGatedNormGrad; }
constexpr bool is_norm(ChannelOp op) { return op == ChannelOp::kNorm || op == ChannelOp::kNormAdd; }
constexpr bool has_result(ChannelOp op) { return op >= ChannelOp::kNorm; }
constexpr int arrays_of(ChannelOp op) { return op == ChannelOp::kStatistics || op == ChannelOp::kNorm ? 1 : 2; }

// Numbers of the channels of a block, for all of its threads.
template <typename A, int kChannels>
struct OfChannels {
  A center[kChannels], factor[kChannels], shift[kChannels], slope[kChannels], gate[kChannels];
};

template <typename T, int V, int kLeft, ChannelOp kOp>
__global__ void __launch_bounds__(kThreads, 1)
    channel_kernel(ChannelArgs m, uint32_t shares, uint32_t tiles, int32_t slots) {
  using A = Accumulator<T>;
  using P = Pack<T, V>;
  using R = Rows<T, V, kLeft>;
  constexpr bool of_one = kOp == ChannelOp::kStatistics || is_norm(kOp);  // sums of x, not of ct
  constexpr int kArrays = arrays_of(kOp), kChannels = kWarp * kLeft, kAcross = R::kAcross;
  using Ring = Ring<P, kArrays>;
  const int t = threadIdx.x;
  const void* const of_other = is_norm(kOp) ? m.residual : m.ct;
  Ring ring(slots);
  A* const partial = static_cast<A*>(m.workspace);  // [share, 2, channels]

  for (uint32_t unit = blockIdx.x; unit < shares * tiles; unit += gridDim.x) {
    const R at(m, unit, shares, tiles);
    // The first rows are fetched together with the number of real rows.
    const int32_t all = at.number(m.rows);
    ring.start(m.x, of_other, at.place(0), at.stride(), 0);
#pragma unroll
    for (int i = 0; i < Ring::kAhead; ++i) ring.template fetch<true>(i < all);
    A first[V], second[V], center[V];
    [[maybe_unused]] A factor[V], shift[V];
    P center_of_one;
    if constexpr (of_one) center_of_one = at.first(static_cast<const P*>(m.x), m.rows);
    const auto of_channel = [&](const void* vector, int i) {
      return at.pack < at.packs ? static_cast<const A*>(vector)[at.pack * V + i] : A{0};
    };
#pragma unroll
    for (int i = 0; i < V; ++i) {
      first[i] = second[i] = 0;
      if constexpr (of_one) {
        center[i] = center_of_one[i];
      } else {
        center[i] = of_channel(m.center, i);
      }
      if constexpr (is_gated(kOp)) {
        factor[i] = of_channel(m.factor, i);
        shift[i] = of_channel(m.shift, i);
      }
    }
    const int32_t rows = real_rows(m.count, m.rows), number = at.number(rows);
    // The last rows stay until the second pass. L2 keeps those before them, and of a small array, which stays whole, all.
    const int32_t first_to_stay = has_result(kOp) && number > slots ? number - slots : number;
#pragma unroll 2
    for (int32_t i = 0; i < number; ++i) {
      P x, other;
      ring.template get<true>(&x, &other);
#pragma unroll
      for (int c = 0; c < V; ++c) {
        const A difference = x[c] - center[c];
        A summed = difference;
        if constexpr (!of_one) summed = other[c];
        if constexpr (is_gated(kOp)) summed = difference * factor[c] + shift[c] <= 0 ? A{0} : summed;
        first[c] += summed;
        second[c] += difference * summed;
      }
      ring.template fetch<true>(i + Ring::kAhead < number, i + Ring::kAhead >= first_to_stay);
    }
    wait_for_copies<0>();

#pragma unroll
    for (int n = V / 2; n >= kLeft; n /= 2) {
      halve(first, n, n * kWarp / V);
      halve(second, n, n * kWarp / V);
#pragma unroll
      for (int c = 0; c < n; ++c) center[c] = t & n * kWarp / V ? center[c + n] : center[c];
    }
    sum_groups<kLeft, kWarps>(first, second);
    if (t >= kChannels || at.pack >= at.packs) continue;
#pragma unroll
    for (int c = 1; c < kLeft; ++c) center[0] = t / kWarp == c ? center[c] : center[0];
    if (of_one) finish_statistics(center[0], ShareSizes<R::kDown>(rows, shares)[at.share], first, second);
    A* const to = partial + int64_t{at.share} * 2 * m.channels + at.pack * V + t % kWarp / kAcross * kLeft + t / kWarp;
    to[0] = *first;
    to[m.channels] = *second;
  }
  cooperative_groups::this_grid().sync();

  __shared__ OfChannels<A, kChannels> of_channels;
  constexpr int kGroups = kThreads / kChannels, kTurns = static_cast<int>(div_up(most_shares(kChannels), kGroups));
  // Backwards, since the last unit's rows are still there.
  const uint32_t units = shares * tiles, last = units - 1 - (units - 1 - blockIdx.x) % gridDim.x;
  for (uint32_t unit = last; unit < units; unit -= gridDim.x) {
    const R at(m, unit, shares, tiles);
    if (!has_result(kOp) && at.share > 0) continue;  // one block sums a channel's shares
    const int32_t channel = static_cast<int32_t>(unit % tiles) * kChannels + t % kChannels;
    const bool is_channel = channel < m.channels;
    const A* const from = partial + (is_channel ? channel : 0);
    const A around = of_one ? from[0] : A{0};
    A firsts[kTurns], seconds[kTurns];
#pragma unroll
    for (int i = 0; i < kTurns; ++i) {  // all loads in flight at once
      const uint32_t share = t / kChannels + i * kGroups;
      firsts[i] = share < shares ? from[int64_t{share} * 2 * m.channels] : A{0};
      seconds[i] = share < shares ? from[(int64_t{share} * 2 + 1) * m.channels] : A{0};
    }
    const int32_t rows = real_rows(m.count, m.rows);
    const ShareSizes<R::kDown> sizes(rows, shares);
    A first = 0, second = 0;
#pragma unroll
    for (int i = 0; i < kTurns; ++i) {
      const uint32_t share = t / kChannels + i * kGroups;
      const A size = share < shares ? sizes[share] : 0, difference = firsts[i] - around;
      first += of_one ? size * difference : firsts[i];
      second += of_one ? seconds[i] + size * difference * difference : seconds[i];
    }
    sum_groups<1, kGroups>(&first, &second);
    if (t < kChannels && is_channel) {
      const A some_rows = max(rows, 1);
      if (of_one) finish_statistics(around, rows, &first, &second);
      if constexpr (is_norm(kOp)) {
        second /= some_rows;
        const A inverse = 1 / sqrt(second + static_cast<A>(m.epsilon));
        A factor = 0, shift = 0;
        with_type(m.vectors, [&](auto zero) {
          using S = decltype(zero);
          factor = inverse * static_cast<A>(widen(static_cast<const S*>(m.scale)[channel]));
          shift = static_cast<A>(widen(static_cast<const S*>(m.bias)[channel]));
        });
        of_channels.center[t] = first;
        of_channels.factor[t] = factor;
        of_channels.shift[t] = shift;
        if (at.share == 0) {
          static_cast<A*>(m.third)[channel] = inverse;
          static_cast<A*>(m.fourth)[channel] = factor;
          static_cast<A*>(m.fifth)[channel] = shift;
        }
      } else if constexpr (has_result(kOp)) {
        const auto number = [&](const void* vector) { return static_cast<const A*>(vector)[channel]; };
        const A inverse = number(m.inverse), factor = number(m.factor);
        second *= inverse;
        of_channels.center[t] = number(m.center);
        of_channels.factor[t] = factor;
        of_channels.slope[t] = -factor * inverse * second / some_rows;
        of_channels.shift[t] = -factor * first / some_rows;
        of_channels.gate[t] = number(m.shift);
      }
      if (at.share == 0) {
        with_type(has_result(kOp) && !of_one ? m.vectors : kDtypeOf<A>, [&](auto zero) {
          using S = decltype(zero);
          static_cast<S*>(m.first)[channel] = narrow<S>(static_cast<Accumulator<S>>(first));
          static_cast<S*>(m.second)[channel] = narrow<S>(static_cast<Accumulator<S>>(second));
        });
      }
    }
    if constexpr (has_result(kOp)) {
      __syncthreads();
      [[maybe_unused]] const A lowest = m.relu ? A{0} : -std::numeric_limits<A>::infinity();
      A center[V], factor[V], shift[V], slope[V], gate[V];
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const int c = t % kAcross * V + i;
        center[i] = of_channels.center[c];
        factor[i] = of_channels.factor[c];
        shift[i] = of_channels.shift[c];
        if constexpr (!of_one) slope[i] = of_channels.slope[c];
        if constexpr (is_gated(kOp)) gate[i] = of_channels.gate[c];
      }
      __syncthreads();  // the next unit writes them
      // Backwards too: the rows fetched last are still there, those before them in L2.
      const int32_t number = at.number(rows), all = at.number(m.rows);
      const int32_t fetched = unit == last ? number - slots : number;  // so many are fetched again
      P* result = static_cast<P*>(m.result) + at.place(number - 1);
      ring.start(m.x, of_other, at.place(number - 1), -at.stride(), (number + slots - 1) % slots);
#pragma unroll
      for (int i = 1; i <= Ring::kAhead; ++i) ring.template fetch<false>(i <= number && number - i < fetched);
#pragma unroll 2
      for (int32_t i = number - 1; i >= 0; --i) {
        P x, other;
        ring.template get<false>(&x, &other);
        A y[V];
#pragma unroll
        for (int c = 0; c < V; ++c) {
          const A difference = x[c] - center[c];
          if constexpr (of_one) {
            y[c] = difference * factor[c] + shift[c];
            if constexpr (kOp == ChannelOp::kNormAdd) y[c] += other[c];
            y[c] = at_least(y[c], lowest);
          } else {
            A ct = other[c];
            if constexpr (is_gated(kOp)) ct = difference * factor[c] + gate[c] <= 0 ? A{0} : ct;
            y[c] = ct * factor[c] + (difference * slope[c] + shift[c]);
          }
        }
        *result = P(y);
        result -= at.stride();
        ring.template fetch<false>(i >= Ring::kAhead && i - Ring::kAhead < fetched);
      }
      result = static_cast<P*>(m.result) + at.place(number);
      for (int32_t i = number; i < all; ++i, result += at.stride()) *result = P{};
    }
  }
}

// *slots: as many as the device has shared memory for. The kernel may use so much from then on.
template <typename... Params>
cudaError_t find_slots(void (*kernel)(Params...), int64_t slot_bytes, int64_t* slots) {
  constexpr int kStatic = 20 << 10;  // other shared memory
  int most = 0;
  JAXSPARSE_TRY(most_shared_memory(&most));
  *slots = (most - kStatic) / slot_bytes;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most - kStatic);
}

template <typename T, int V, int kLeft, ChannelOp kOp>
cudaError_t run(const ChannelArgs& m, cudaStream_t stream) {
  using Ring = Ring<Pack<T, V>, arrays_of(kOp)>;
  const int64_t tiles = div_up(m.channels, kWarp * kLeft), shares = shares_of(tiles);
  const auto kernel = channel_kernel<T, V, kLeft, kOp>;
  int64_t slots = 0;
  JAXSPARSE_TRY(find_slots(kernel, Ring::kSlotBytes, &slots));
  if (!has_result(kOp)) slots = Ring::kAhead;
  return launch_grid_with_shared<kThreads>(kernel, shares * tiles, slots * Ring::kSlotBytes, stream, m, shares, tiles,
                                           slots);
}

// Rows that are not whole pieces of 16 bytes are read number by number. Of rows of more than 64 numbers of 16 bits, a block
// takes 128 bytes.
template <typename T, ChannelOp kOp>
cudaError_t run_as(const ChannelArgs& m, cudaStream_t stream) {
  constexpr int V = 16 / sizeof(T), kMostLeft = V == 8 ? 2 : 1;
  if (m.channels % V != 0) return run<T, 1, 1, kOp>(m, stream);
  return m.channels > kNarrow ? run<T, V, kMostLeft, kOp>(m, stream) : run<T, V, 1, kOp>(m, stream);
}

template <ChannelOp kOp>
cudaError_t run_op(const ChannelArgs& m, cudaStream_t stream) {
  switch (m.dtype) {
    case Dtype::kF16: return run_as<__half, kOp>(m, stream);
    case Dtype::kBF16: return run_as<__nv_bfloat16, kOp>(m, stream);
    case Dtype::kF32: return run_as<float, kOp>(m, stream);
    case Dtype::kF64: return run_as<double, kOp>(m, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t channel_moments(const ChannelArgs& m, cudaStream_t stream) {
  if (m.ct == nullptr) return run_op<ChannelOp::kStatistics>(m, stream);
  return m.factor == nullptr ? run_op<ChannelOp::kMoments>(m, stream) : run_op<ChannelOp::kGatedMoments>(m, stream);
}

cudaError_t batch_norm(const ChannelArgs& m, cudaStream_t stream) {
  return m.residual == nullptr ? run_op<ChannelOp::kNorm>(m, stream) : run_op<ChannelOp::kNormAdd>(m, stream);
}

cudaError_t batch_norm_grad(const ChannelArgs& m, cudaStream_t stream) {
  return m.relu ? run_op<ChannelOp::kGatedNormGrad>(m, stream) : run_op<ChannelOp::kNormGrad>(m, stream);
}

}  // namespace jaxsparse::cuda
