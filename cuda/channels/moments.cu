// Sums over rows per channel, see moments.h, in one cooperative kernel: the sums of each share of the rows, then, after a
// barrier of the grid, those of all shares, in a fixed order. A thread reads 16 bytes of a row, with several rows in flight.
//
// Statistics take one pass over x. A share sums differences from its first row, which is as near to the mean as any other;
// shares are combined by Chan's formula around the mean of the first share. So a large mean causes no cancellation.
//
// Measured on an H200, float16, in us; in parentheses an earlier version, two kernels of 264 shares each:
//
//     rows x channels    12,000 x 32   63,000 x 128   183,262 x 64   183,262 x 96   183,262 x 256
//     statistics         4.1 (12.9)    6.6 (15.0)     7.4 (16.6)     9.0 (18.7)     25.7 (36.9)
//     moments            3.7 (6.9)     8.1 (10.8)     9.6 (13.6)     20.1 (24.2)    45.2 (49.9)
//
// With a gate, b counts only where an affine map of a is positive. This gives the sums behind a ReLU without storing its
// masked cotangents: forward and backward of SparseResUNet42 on two KITTI scans went from 9.11 ms to 8.91.
//
// About 3.6 us of each are the launch, the barrier and latencies. What does not fit L2 is bound by memory: there (last
// column) 64 bytes of a row per block took 28 and 53 us, and 256 were no better than 128. With branches in the loop each
// load had to complete before the next addition: 53 us instead of 28.
//
// Not built: statistics in the epilogue of the convolution. They would only save reading y, 0.5 to 5 us, since combining the
// sums of its blocks needs another kernel. By the SASS, means and squares of a block's columns, by Chan's formula from pairs
// of rows up, take 320 instructions per warp at 32 columns, 500 at 64, 630 at 96, 710 at 128. After the last product only
// other blocks hide them: at 183,262 rows 4 to 8 us of issue slots, at 29,000 of 256 channels 3.
#include "cuda/channels/moments.h"

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

// Each lane has N pairs of sums. In warp w < N, a lane gets the sum of pair w over the same lane of all warps.
template <int N, typename A>
__device__ void sum_warps(A* first, A* second) {
  __shared__ A sums[2 * N][kWarps][kWarp];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  __syncthreads();  // threads may still read earlier sums
#pragma unroll
  for (int i = 0; i < N; ++i) {
    sums[2 * i][warp][lane] = first[i];
    sums[2 * i + 1][warp][lane] = second[i];
  }
  __syncthreads();
  if (warp >= N) return;
  *first = *second = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    *first += sums[2 * warp][w][lane];
    *second += sums[2 * warp + 1][w][lane];
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

// A block handles kLeft * 32 channels. V / kLeft lanes of a warp share a pack, for other rows; in the end each has kLeft.
enum class Sums { kStatistics, kMoments, kGated };

template <typename T, int V, int kLeft, Sums kSums>
__global__ void __launch_bounds__(kThreads) moments_kernel(MomentsArgs m, uint32_t shares, uint32_t tiles) {
  using A = Accumulator<T>;
  constexpr int kAcross = kWarp * kLeft / V, kDown = kThreads / kAcross;  // packs per row, rows at a time
  constexpr bool of_one = kSums == Sums::kStatistics;
  constexpr int kAtOnce = of_one ? 8 : 4;                                 // rows in flight per thread
  const uint32_t t = threadIdx.x, warp = t / kWarp;
  const int32_t packs = m.channels / V, step = static_cast<int32_t>(shares * kDown);
  A* const partial = static_cast<A*>(m.workspace);  // [share, 2, channels]

  for (uint32_t unit = blockIdx.x; unit < shares * tiles; unit += gridDim.x) {
    const int32_t share = static_cast<int32_t>(unit / tiles), first_row = share * kDown;
    const int32_t pack = static_cast<int32_t>(unit % tiles * kAcross + t % kAcross);
    const int64_t stride = int64_t{step} * packs;
    int32_t row = first_row + static_cast<int32_t>(t / kAcross), end = pack < packs ? m.rows : 0;
    int64_t place = int64_t{row} * packs + pack;
    Pack<T, V> a[kAtOnce], b[kAtOnce], center_of_one{};
    const auto read = [&](int j, int ahead) {
      const int64_t at = place + ahead * stride;
      if (row + ahead * step >= end) return;
      b[j] = static_cast<const Pack<T, V>*>(m.b)[at];
      if constexpr (!of_one) a[j] = static_cast<const Pack<T, V>*>(m.a)[at];
    };
    // The first rows are loaded together with the number of real rows.
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) read(j, j);
    if (of_one && first_row < end) center_of_one = static_cast<const Pack<T, V>*>(m.b)[int64_t{first_row} * packs + pack];
    A first[V], second[V], center[V];
    [[maybe_unused]] A gate_scale[V], gate_shift[V];
#pragma unroll
    for (int i = 0; i < V; ++i) {
      first[i] = second[i] = 0;
      const auto of_channel = [&](const void* numbers) {
        return pack < packs ? static_cast<const A*>(numbers)[pack * V + i] : A{0};
      };
      center[i] = of_one ? center_of_one[i] : of_channel(m.center);
      if constexpr (kSums == Sums::kGated) {
        gate_scale[i] = of_channel(m.gate_scale);
        gate_shift[i] = of_channel(m.gate_shift);
      }
    }
    const auto add = [&](int j) {
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const A difference = (of_one ? b[j][i] : a[j][i]) - center[i];
        A other = of_one ? difference : b[j][i];
        if constexpr (kSums == Sums::kGated) other = difference * gate_scale[i] + gate_shift[i] <= 0 ? A{0} : other;
        first[i] += other;
        second[i] += difference * other;
      }
    };
    const int32_t rows = real_rows(m.count, m.rows);
    end = min(end, rows);
    for (; row + (kAtOnce - 1) * step < end; row += kAtOnce * step, place += kAtOnce * stride) {
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        add(j);
        read(j, j + kAtOnce);
      }
    }
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      if (row + j * step < end) add(j);
    }

#pragma unroll
    for (int n = V / 2; n >= kLeft; n /= 2) {
      halve(first, n, n * kWarp / V);
      halve(second, n, n * kWarp / V);
#pragma unroll
      for (int i = 0; i < n; ++i) center[i] = t & n * kWarp / V ? center[i + n] : center[i];
    }
    sum_warps<kLeft>(first, second);
    if (warp >= kLeft || pack >= packs) continue;
#pragma unroll
    for (int i = 1; i < kLeft; ++i) center[0] = warp == i ? center[i] : center[0];
    if (of_one) finish_statistics(center[0], ShareSizes<kDown>(rows, shares)[share], first, second);
    A* const to = partial + int64_t{share} * 2 * m.channels + pack * V + t % kWarp / kAcross * kLeft + warp;
    to[0] = *first;
    to[m.channels] = *second;
  }
  cooperative_groups::this_grid().sync();

  constexpr int kColumns = 8;  // few channels per block, so that many blocks take part
  constexpr int kSharesAtOnce = kThreads / kColumns, kTurns = static_cast<int>(div_up(kMomentBlocks, kSharesAtOnce));
  for (int32_t begin = static_cast<int32_t>(blockIdx.x) * kColumns; begin < m.channels; begin += gridDim.x * kColumns) {
    const int32_t channel = begin + t % kColumns;
    const A* const from = partial + min(channel, m.channels - 1);
    const A center = of_one ? from[0] : A{0};
    A firsts[kTurns], seconds[kTurns];
#pragma unroll
    for (int i = 0; i < kTurns; ++i) {  // all loads in flight at once
      const uint32_t share = t / kColumns + i * kSharesAtOnce;
      firsts[i] = share < shares ? from[int64_t{share} * 2 * m.channels] : A{0};
      seconds[i] = share < shares ? from[(int64_t{share} * 2 + 1) * m.channels] : A{0};
    }
    const int32_t rows = real_rows(m.count, m.rows);
    const ShareSizes<kDown> sizes(rows, shares);
    A first = 0, second = 0;
#pragma unroll
    for (int i = 0; i < kTurns; ++i) {
      const uint32_t share = t / kColumns + i * kSharesAtOnce;
      const A size = share < shares ? sizes[share] : 0, difference = firsts[i] - center;
      first += of_one ? size * difference : firsts[i];
      second += of_one ? seconds[i] + size * difference * difference : seconds[i];
    }
#pragma unroll
    for (int lanes = kColumns; lanes < kWarp; lanes *= 2) {
      first += __shfl_xor_sync(kAllLanes, first, lanes);
      second += __shfl_xor_sync(kAllLanes, second, lanes);
    }
    sum_warps<1>(&first, &second);
    if (t >= kColumns || channel >= m.channels) continue;
    if (of_one) finish_statistics(center, rows, &first, &second);
    static_cast<A*>(m.first)[channel] = first;
    static_cast<A*>(m.second)[channel] = second;
  }
}

template <typename T, int V, int kLeft>
cudaError_t run(const MomentsArgs& m, cudaStream_t stream) {
  const int64_t tiles = div_up(m.channels, kWarp * kLeft), shares = moment_shares(tiles);
  const auto kernel = m.a == nullptr            ? moments_kernel<T, V, kLeft, Sums::kStatistics>
                      : m.gate_scale == nullptr ? moments_kernel<T, V, kLeft, Sums::kMoments>
                                                : moments_kernel<T, V, kLeft, Sums::kGated>;
  return launch_grid<kThreads>(kernel, shares * tiles, stream, m, shares, tiles);
}

// A block covers at least 128 bytes of a row, except with at most 32 channels, or if rows are not whole pieces of 16 bytes.
template <typename T>
cudaError_t run_as(const MomentsArgs& m, cudaStream_t stream) {
  constexpr int V = 16 / sizeof(T), kLeft = V == 8 ? 2 : 1;
  if (m.channels % V != 0) return run<T, 1, 1>(m, stream);
  return m.channels > kWarp ? run<T, V, kLeft>(m, stream) : run<T, V, 1>(m, stream);
}

}  // namespace

cudaError_t channel_moments(const MomentsArgs& m, cudaStream_t stream) {
  switch (m.dtype) {
    case Dtype::kF16: return run_as<__half>(m, stream);
    case Dtype::kBF16: return run_as<__nv_bfloat16>(m, stream);
    case Dtype::kF32: return run_as<float>(m, stream);
    case Dtype::kF64: return run_as<double>(m, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace jaxsparse::cuda
