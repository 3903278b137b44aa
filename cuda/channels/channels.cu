// Sums over rows per channel, and batch norm, see channels.h, each in one cooperative kernel: the sums of each share of the
// rows, then, after a barrier of the grid, those of all shares, in a fixed order. A thread reads 16 bytes of a row, with
// several rows in flight.
//
// Statistics take one pass over x. A share sums differences from its first row, which is as near to the mean as any other;
// shares are combined by Chan's formula around the mean of the first share. So a large mean causes no cancellation.
//
// For batch norm, every block sums all shares of its own channels and goes over its rows once more. What it has read is
// still in shared memory, as much as fits.
//
// TABLE
//
// Not built: statistics in the epilogue of the convolution. They would only save reading y, 0.5 to 5 us, since combining the
// sums of its blocks needs another kernel. By the SASS, means and squares of a block's columns, by Chan's formula from pairs
// of rows up, take 320 instructions per warp at 32 columns, 500 at 64, 630 at 96, 710 at 128. After the last product only
// other blocks hide them: at 183,262 rows 4 to 8 us of issue slots, at 29,000 of 256 channels 3.
#include "cuda/channels/channels.h"

#include <cmath>
#include <cstring>

#include "cuda/common/grid.cuh"
#include "cuda/common/numbers.cuh"

namespace jaxsparse::cuda {
namespace {

constexpr int kThreads = 512, kWarps = kThreads / kWarp;

// V numbers of a row as raw words. Only extracting a number waits for the load.
template <typename T, int V>
struct Pack {
  std::conditional_t<V == 1, T, uint4> words;

  Pack() = default;
  __device__ explicit Pack(const Accumulator<T>* from) {
    T numbers[V];
#pragma unroll
    for (int i = 0; i < V; ++i) numbers[i] = narrow<T>(from[i]);
    memcpy(&words, numbers, sizeof(numbers));
  }
  __device__ Accumulator<T> operator[](int i) const {
    T numbers[V];
    memcpy(numbers, &words, sizeof(numbers));
    return widen(numbers[i]);
  }
};

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

// Each lane has two sums. In the first warp, a lane gets those of the same lane of all warps.
template <typename A>
__device__ void sum_warps(A* first, A* second) {
  __shared__ A sums[2][kWarps][kWarp];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  __syncthreads();  // threads may still read earlier sums
  sums[0][warp][lane] = *first;
  sums[1][warp][lane] = *second;
  __syncthreads();
  if (warp != 0) return;
  *first = *second = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    *first += sums[0][w][lane];
    *second += sums[1][w][lane];
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

enum class ChannelOp { kStatistics, kMoments, kGatedMoments, kNorm, kNormGrad, kGatedNormGrad };

constexpr bool is_gated(ChannelOp op) { return op == ChannelOp::kGatedMoments || op == ChannelOp::kGatedNormGrad; }
constexpr bool has_result(ChannelOp op) { return op >= ChannelOp::kNorm; }
constexpr bool is_of_one(ChannelOp op) { return op == ChannelOp::kStatistics || op == ChannelOp::kNorm; }

// A thread's rows of one unit of work, which are `step` rows apart, and the place of its pack in each.
template <typename T, int V>
struct Rows {
  static constexpr int kAcross = kWarp / V, kDown = kThreads / kAcross;  // packs per row, rows at a time
  int32_t share, first_row, row, step, pack;
  int64_t place, stride;
  bool has_channels;

  __device__ Rows(const ChannelArgs& m, uint32_t unit, uint32_t shares, uint32_t tiles) {
    const uint32_t t = threadIdx.x;
    const int32_t packs = m.channels / V;
    share = static_cast<int32_t>(unit / tiles);
    first_row = share * kDown;
    row = first_row + static_cast<int32_t>(t / kAcross);
    step = static_cast<int32_t>(shares * kDown);
    pack = static_cast<int32_t>(unit % tiles * kAcross + t % kAcross);
    has_channels = pack < packs;
    place = int64_t{row} * packs + pack;
    stride = int64_t{step} * packs;
  }
  // The vector's numbers for this thread's channels.
  template <typename A>
  __device__ void load(const void* vector, A (&numbers)[V]) const {
#pragma unroll
    for (int i = 0; i < V; ++i) numbers[i] = has_channels ? static_cast<const A*>(vector)[pack * V + i] : A{0};
  }
};

// Numbers of the channels of a block, for all of its threads.
template <typename A>
struct OfChannels {
  A center[kWarp], factor[kWarp], shift[kWarp], slope[kWarp], gate[kWarp];
};

// `kept` rows of a thread stay in dynamic shared memory.
template <typename T, int V, ChannelOp kOp>
__global__ void __launch_bounds__(kThreads) channel_kernel(ChannelArgs m, uint32_t shares, uint32_t tiles, int32_t kept) {
  using A = Accumulator<T>;
  using P = Pack<T, V>;
  constexpr bool of_one = is_of_one(kOp);
  constexpr int kAcross = Rows<T, V>::kAcross, kDown = Rows<T, V>::kDown;
  constexpr int kAtOnce = of_one ? 8 : 4;  // rows in flight per thread
  constexpr int kArrays = of_one ? 1 : 2;
  const uint32_t t = threadIdx.x, warp = t / kWarp, lane = t % kWarp;
  const P* const of_x = static_cast<const P*>(m.x);
  const P* const of_ct = static_cast<const P*>(m.ct);
  P* const own = reinterpret_cast<P*>(dynamic_shared()) + t;  // [kept, kArrays], kThreads apart
  A* const partial = static_cast<A*>(m.workspace);            // [share, 2, channels]

  int32_t slot = 0;
  for (uint32_t unit = blockIdx.x; unit < shares * tiles; unit += gridDim.x) {
    Rows<T, V> at(m, unit, shares, tiles);
    int32_t end = at.has_channels ? m.rows : 0;
    P x[kAtOnce], ct[kAtOnce], center_of_one{};
    const auto read = [&](int j, int ahead) {
      const int64_t place = at.place + ahead * at.stride;
      if (at.row + ahead * at.step >= end) return;
      x[j] = of_x[place];
      if constexpr (!of_one) ct[j] = of_ct[place];
    };
    // The first rows are loaded together with the number of real rows.
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) read(j, j);
    if (of_one && at.first_row < end) center_of_one = of_x[int64_t{at.first_row} * (m.channels / V) + at.pack];
    A first[V], second[V], center[V];
    [[maybe_unused]] A scale[V], shift[V];
    if constexpr (!of_one) at.load(m.center, center);
    if constexpr (is_gated(kOp)) {
      at.load(m.scale, scale);
      at.load(m.shift, shift);
      if constexpr (has_result(kOp)) {
        A inverse[V];
        at.load(m.inverse, inverse);
#pragma unroll
        for (int i = 0; i < V; ++i) scale[i] *= inverse[i];
      }
    }
#pragma unroll
    for (int i = 0; i < V; ++i) {
      first[i] = second[i] = 0;
      if constexpr (of_one) center[i] = center_of_one[i];
    }
    const auto add = [&](int j) {
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const A difference = x[j][i] - center[i];
        A other = difference;
        if constexpr (!of_one) other = ct[j][i];
        if constexpr (is_gated(kOp)) other = difference * scale[i] + shift[i] <= 0 ? A{0} : other;
        first[i] += other;
        second[i] += difference * other;
      }
      if constexpr (has_result(kOp)) {
        if (slot < kept) {
          own[slot * kArrays * kThreads] = x[j];
          if constexpr (!of_one) own[(slot * kArrays + 1) * kThreads] = ct[j];
        }
        ++slot;
      }
    };
    const int32_t rows = real_rows(m.count, m.rows);
    end = min(end, rows);
    for (; at.row + (kAtOnce - 1) * at.step < end; at.row += kAtOnce * at.step, at.place += kAtOnce * at.stride) {
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        add(j);
        read(j, j + kAtOnce);
      }
    }
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      if (at.row + j * at.step < end) add(j);
    }

#pragma unroll
    for (int n = V / 2; n >= 1; n /= 2) {
      halve(first, n, n * kAcross);
      halve(second, n, n * kAcross);
#pragma unroll
      for (int i = 0; i < n; ++i) center[i] = t & n * kAcross ? center[i + n] : center[i];
    }
    sum_warps(first, second);
    if (warp != 0 || !at.has_channels) continue;
    if (of_one) finish_statistics(center[0], ShareSizes<kDown>(rows, shares)[at.share], first, second);
    A* const to = partial + int64_t{at.share} * 2 * m.channels + at.pack * V + lane / kAcross;
    to[0] = *first;
    to[m.channels] = *second;
  }
  cooperative_groups::this_grid().sync();

  __shared__ OfChannels<A> of_channels;
  constexpr int kTurns = static_cast<int>(div_up(kChannelBlocks, kWarps));
  slot = 0;
  for (uint32_t unit = blockIdx.x; unit < shares * tiles; unit += gridDim.x) {
    Rows<T, V> at(m, unit, shares, tiles);
    if (!has_result(kOp) && at.share > 0) break;  // one block sums a channel's shares
    const int32_t channel = static_cast<int32_t>(unit % tiles * kWarp + lane);
    const bool is_channel = channel < m.channels;
    const A* const from = partial + (is_channel ? channel : 0);
    const A around = of_one ? from[0] : A{0};
    A firsts[kTurns], seconds[kTurns];
#pragma unroll
    for (int i = 0; i < kTurns; ++i) {  // all loads in flight at once
      const uint32_t share = warp + i * kWarps;
      firsts[i] = share < shares ? from[int64_t{share} * 2 * m.channels] : A{0};
      seconds[i] = share < shares ? from[(int64_t{share} * 2 + 1) * m.channels] : A{0};
    }
    const int32_t rows = real_rows(m.count, m.rows);
    const ShareSizes<kDown> sizes(rows, shares);
    A first = 0, second = 0;
#pragma unroll
    for (int i = 0; i < kTurns; ++i) {
      const uint32_t share = warp + i * kWarps;
      const A size = share < shares ? sizes[share] : 0, difference = firsts[i] - around;
      first += of_one ? size * difference : firsts[i];
      second += of_one ? seconds[i] + size * difference * difference : seconds[i];
    }
    sum_warps(&first, &second);
    if (warp == 0 && is_channel) {
      const auto number = [&](const void* vector) { return static_cast<const A*>(vector)[channel]; };
      const A some_rows = max(rows, 1);
      if (of_one) finish_statistics(around, rows, &first, &second);
      if constexpr (kOp == ChannelOp::kNorm) {
        second /= some_rows;
        const A inverse = 1 / sqrt(second + static_cast<A>(m.epsilon));
        of_channels.center[lane] = first;
        of_channels.factor[lane] = inverse * number(m.scale);
        of_channels.shift[lane] = number(m.shift);
        if (at.share == 0) static_cast<A*>(m.third)[channel] = inverse;
      } else if constexpr (has_result(kOp)) {
        const A inverse = number(m.inverse), factor = inverse * number(m.scale);
        second *= inverse;
        of_channels.center[lane] = number(m.center);
        of_channels.factor[lane] = factor;
        of_channels.slope[lane] = -factor * inverse * second / some_rows;
        of_channels.shift[lane] = -factor * first / some_rows;
        of_channels.gate[lane] = number(m.shift);
      }
      if (at.share == 0) {
        static_cast<A*>(m.first)[channel] = first;
        static_cast<A*>(m.second)[channel] = second;
      }
    }
    if constexpr (has_result(kOp)) {
      __syncthreads();
      A center[V], factor[V], shift[V], slope[V], gate[V];
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const uint32_t c = t % kAcross * V + i;
        center[i] = of_channels.center[c];
        factor[i] = of_channels.factor[c];
        shift[i] = of_channels.shift[c];
        if constexpr (!of_one) slope[i] = of_channels.slope[c];
        if constexpr (is_gated(kOp)) gate[i] = of_channels.gate[c];
      }
      __syncthreads();  // the next unit writes them
      const P* const others = of_one ? static_cast<const P*>(m.residual) : of_ct;
      const int32_t end = at.has_channels ? m.rows : 0;
      for (; at.row < end; at.row += 4 * at.step, at.place += 4 * at.stride) {
        P x[4], other[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int64_t place = at.place + j * at.stride;
          if (at.row + j * at.step >= rows) continue;
          x[j] = slot < kept ? own[slot * kArrays * kThreads] : of_x[place];
          if constexpr (of_one) {
            if (others != nullptr) other[j] = others[place];
          } else {
            other[j] = slot < kept ? own[(slot * kArrays + 1) * kThreads] : others[place];
          }
          ++slot;
        }
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          if (at.row + j * at.step >= end) continue;
          A y[V];
#pragma unroll
          for (int i = 0; i < V; ++i) {
            const A difference = x[j][i] - center[i];
            if constexpr (of_one) {
              y[i] = difference * factor[i] + shift[i];
              if (others != nullptr) y[i] += other[j][i];
              if (m.relu) y[i] = y[i] <= 0 ? A{0} : y[i];
            } else {
              A ct = other[j][i];
              if constexpr (is_gated(kOp)) ct = difference * factor[i] + gate[i] <= 0 ? A{0} : ct;
              y[i] = ct * factor[i] + (difference * slope[i] + shift[i]);
            }
            if (at.row + j * at.step >= rows) y[i] = 0;
          }
          static_cast<P*>(m.result)[at.place + j * at.stride] = P(y);
        }
      }
    }
  }
}

// The room for rows that are kept: what a device has beyond static shared memory.
template <typename... Params>
cudaError_t shared_bytes(void (*kernel)(Params...), int64_t* bytes) {
  constexpr int kStatic = 20 << 10;
  int device = 0, most = 0;
  JAXSPARSE_TRY(cudaGetDevice(&device));
  JAXSPARSE_TRY(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  *bytes = most - kStatic;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most - kStatic);
}

template <typename T, int V, ChannelOp kOp>
cudaError_t run(const ChannelArgs& m, cudaStream_t stream) {
  const int64_t tiles = div_up(m.channels, kWarp), shares = channel_shares(m.channels);
  const auto kernel = channel_kernel<T, V, kOp>;
  int64_t bytes = 0, of_row = kThreads * sizeof(Pack<T, V>) * (is_of_one(kOp) ? 1 : 2);
  if (has_result(kOp)) JAXSPARSE_TRY(shared_bytes(kernel, &bytes));
  const int64_t kept = bytes / of_row;
  return launch_grid_with_shared<kThreads>(kernel, shares * tiles, kept * of_row, stream, m, shares, tiles, kept);
}

// Rows that are not whole pieces of 16 bytes are read number by number.
template <typename T, ChannelOp kOp>
cudaError_t run_as(const ChannelArgs& m, cudaStream_t stream) {
  constexpr int V = 16 / sizeof(T);
  return m.channels % V == 0 ? run<T, V, kOp>(m, stream) : run<T, 1, kOp>(m, stream);
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
  return m.scale == nullptr ? run_op<ChannelOp::kMoments>(m, stream) : run_op<ChannelOp::kGatedMoments>(m, stream);
}

cudaError_t batch_norm(const ChannelArgs& m, cudaStream_t stream) { return run_op<ChannelOp::kNorm>(m, stream); }

cudaError_t batch_norm_grad(const ChannelArgs& m, cudaStream_t stream) {
  return m.relu ? run_op<ChannelOp::kGatedNormGrad>(m, stream) : run_op<ChannelOp::kNormGrad>(m, stream);
}

}  // namespace jaxsparse::cuda
