// Convolution on the CPU: gathers rows tap by tap and calls the inner loops for the best instruction set of the machine.
#include "bindings/cpu/conv.h"

#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "bindings/cpu/conv_isa.h"

namespace jaxsparse::cpu {
namespace {

template <typename T>
const InnerLoops<T>& inner_loops() {
  static const InnerLoops<T> chosen = [] {
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq")) return loops_avx512(T{});
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return loops_avx2(T{});
#endif
    return loops_baseline(T{});
  }();
  return chosen;
}

template <typename T>
int64_t whole_vectors(int64_t columns) {
  return (columns + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
}

// Scratch memory, 64-byte aligned and zeroed.
template <typename T>
class Scratch {
 public:
  explicit Scratch(int64_t size) : data_(static_cast<T*>(::operator new(size * sizeof(T), kAlign))) {
    std::memset(data_, 0, size * sizeof(T));
  }
  ~Scratch() { ::operator delete(data_, kAlign); }
  Scratch(const Scratch&) = delete;
  T* get() const { return data_; }

 private:
  static constexpr std::align_val_t kAlign{64};
  T* data_;
};

// Copies rows of `columns` values into rows of `padded` values; the padding of `to` is not written.
template <typename T>
void copy_rows(const T* from, int64_t rows, int64_t columns, int64_t padded, T* to) {
  for (int64_t r = 0; r < rows; ++r) std::memcpy(to + r * padded, from + r * columns, columns * sizeof(T));
}

}  // namespace

template <typename T>
void conv_forward(const ParallelFor& parallel_for, const T* x, int64_t in_rows, const T* w, const int32_t* table,
                  const Segments& out, int64_t volume, int64_t c_in, int64_t c_out, int64_t tile_rows, T* y) {
  const int64_t columns = whole_vectors<T>(c_out), rows = out.rows();
  Scratch<T> weights(volume * c_in * columns);
  copy_rows(w, volume * c_in, c_out, columns, weights.get());

  const int64_t tiles = (out.rows_each + tile_rows - 1) / tile_rows;  // per segment
  parallel_for(out.number * tiles, [&](int64_t task) {
    const int64_t s = task / tiles, begin = out.begin(s) + task % tiles * tile_rows;
    const int64_t end = std::min(begin + tile_rows, out.begin(s + 1)), real_end = std::clamp(out.end(s), begin, end);
    std::memset(y + real_end * c_out, 0, (end - real_end) * c_out * sizeof(T));
    if (real_end == begin) return;

    Scratch<T> tile(tile_rows * columns);
    std::vector<int32_t> x_row(tile_rows), y_row(tile_rows);
    for (int64_t k = 0; k < volume; ++k) {
      int64_t pairs = 0;
      for (int64_t m = begin; m < real_end; ++m) {
        x_row[pairs] = table[k * rows + m];
        y_row[pairs] = static_cast<int32_t>(m - begin);
        pairs += is_row(x_row[pairs], in_rows);
      }
      inner_loops<T>().gather_gemm(x, x_row.data(), weights.get() + k * c_in * columns, y_row.data(), pairs, c_in,
                                   columns, tile.get());
    }
    for (int64_t m = begin; m < real_end; ++m) {
      std::memcpy(y + m * c_out, tile.get() + (m - begin) * columns, c_out * sizeof(T));
    }
  });
}

template <typename T>
void conv_wgrad(const ParallelFor& parallel_for, const T* x, int64_t in_rows, const T* g, const int32_t* table,
                const Segments& out, int64_t volume, int64_t c_in, int64_t c_out, T* dw) {
  // A task computes a block of dw: one tap and up to kBlock input channels. It sums chunks of kChunk pairs, in row order. So
  // the rounding error grows with kChunk + pairs / kChunk, and the result depends only on the real rows.
  constexpr int64_t kBlock = 48, kChunk = 256;
  const int64_t columns = whole_vectors<T>(c_out), rows = out.rows(), blocks = (c_in + kBlock - 1) / kBlock;
  parallel_for(volume * blocks, [&](int64_t task) {
    const int64_t k = task / blocks, first = task % blocks * kBlock, width = std::min(kBlock, c_in - first);
    Scratch<T> sum(width * columns), x_chunk(kChunk * width), g_chunk(kChunk * columns);
    const int32_t* entry = table + k * rows;
    int64_t pairs = 0;
    const auto flush = [&] {
      inner_loops<T>().outer_sum(x_chunk.get(), g_chunk.get(), pairs, width, columns, sum.get());
      pairs = 0;
    };
    for (int64_t s = 0; s < out.number; ++s) {
      for (int64_t m = out.begin(s), end = out.end(s); m < end; ++m) {
        if (!is_row(entry[m], in_rows)) continue;
        std::memcpy(x_chunk.get() + pairs * width, x + entry[m] * c_in + first, width * sizeof(T));
        std::memcpy(g_chunk.get() + pairs * columns, g + m * c_out, c_out * sizeof(T));
        if (++pairs == kChunk) flush();
      }
    }
    flush();
    for (int64_t i = 0; i < width; ++i) {
      std::memcpy(dw + (k * c_in + first + i) * c_out, sum.get() + i * columns, c_out * sizeof(T));
    }
  });
}

#define JAXSPARSE_INSTANTIATE(T)                                                                               \
  template void conv_forward(const ParallelFor&, const T*, int64_t, const T*, const int32_t*, const Segments&, \
                             int64_t, int64_t, int64_t, int64_t, T*);                                          \
  template void conv_wgrad(const ParallelFor&, const T*, int64_t, const T*, const int32_t*, const Segments&,   \
                           int64_t, int64_t, int64_t, T*);
JAXSPARSE_INSTANTIATE(float)
JAXSPARSE_INSTANTIATE(double)

}  // namespace jaxsparse::cpu
