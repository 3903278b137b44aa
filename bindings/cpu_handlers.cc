// The custom calls on the CPU. Each checks its operands, decodes attributes, and runs on XLA's thread pool.
#include <atomic>
#include <condition_variable>
#include <exception>
#include <memory>
#include <mutex>
#include <string>

#include "bindings/bind.h"
#include "bindings/checks_conv.h"
#include "bindings/checks_coords.h"
#include "bindings/checks_rows.h"
#include "bindings/cpu/conv.h"
#include "bindings/cpu/coords.h"
#include "bindings/cpu/kernel_map.h"
#include "bindings/cpu/rows.h"
#include "bindings/handlers.h"

namespace jaxsparse {
namespace {

// Runs tasks on the calling thread and on XLA's pool. The caller takes tasks too, and waits only for tasks that a thread has
// begun, so there is no deadlock even if all threads of the pool wait here.
class PoolParallelFor {
 public:
  explicit PoolParallelFor(ffi::ThreadPool pool) : pool_(pool) {}

  void operator()(int64_t tasks, const std::function<void(int64_t)>& body) const {
    const int64_t helpers = std::min<int64_t>(pool_.num_threads(), tasks) - 1;
    if (helpers <= 0) {
      for (int64_t i = 0; i < tasks; ++i) body(i);
      return;
    }
    auto shared = std::make_shared<Shared>(tasks, body);  // outlives this call in helpers that start late
    try {
      for (int64_t h = 0; h < helpers; ++h) pool_.Schedule([shared] { shared->work(); });
    } catch (...) {  // out of memory: the helpers scheduled so far use `body`, so go on with them
    }
    shared->work();
    std::unique_lock lock(shared->mutex);
    shared->all_done.wait(lock, [&] { return shared->done == tasks; });
    if (shared->failure) std::rethrow_exception(shared->failure);
  }

 private:
  struct Shared {
    Shared(int64_t n, const std::function<void(int64_t)>& b) : tasks(n), body(b) {}

    void work() {
      for (int64_t i = next++; i < tasks; i = next++) {
        std::exception_ptr thrown;
        try {
          body(i);
        } catch (...) {
          thrown = std::current_exception();
        }
        std::lock_guard lock(mutex);
        if (thrown && !failure) failure = thrown;
        if (++done == tasks) all_done.notify_one();
      }
    }

    const int64_t tasks;
    const std::function<void(int64_t)>& body;  // used only while a task is left, so the caller is still waiting
    std::atomic<int64_t> next{0};
    std::mutex mutex;
    std::condition_variable all_done;
    int64_t done = 0;
    std::exception_ptr failure;
  };

  mutable ffi::ThreadPool pool_;
};

// Turns an exception of the body (such as failed allocation) into an error of the call.
template <typename F>
ffi::Error guarded(const char* call, F&& body) {
  try {
    body();
    return ffi::Error::Success();
  } catch (const std::exception& e) {
    return ffi::Error::Internal(std::string(call) + ": " + e.what());
  }
}

template <typename T>
T* data(In buffer) {
  return static_cast<T*>(buffer.untyped_data());
}
template <typename T>
T* data(Out& buffer) {
  return static_cast<T*>(buffer->untyped_data());
}

int64_t clamp_count(In count, int64_t rows) { return std::clamp<int64_t>(*data<int32_t>(count), 0, rows); }

int32_t kept_of(Out found, int64_t capacity) {
  return static_cast<int32_t>(std::min<int64_t>(*data<int32_t>(found), capacity));
}

// Calls f(T{}) for float or double; Python casts other dtypes before the call.
template <typename F>
ffi::Error for_float(const char* call, ffi::DataType dtype, F&& f) {
  if (dtype == ffi::F32) return guarded(call, [&] { f(float{}); });
  if (dtype == ffi::F64) return guarded(call, [&] { f(double{}); });
  return ffi::Error::InvalidArgument(std::string(call) + ": the CPU computes in float32 or float64, got " +
                                     dtype_name(dtype));
}

ffi::Error unique_sites(ffi::ThreadPool pool, In coords, In count, Out sites, Out kept, Out found, Out row_of,
                        Out order, Out offsets, Out without, Out workspace) {
  UniqueSites s;
  if (auto e = check_unique_sites(coords, count, sites, kept, found, row_of, order, offsets, without, workspace, &s);
      e.failure()) {
    return e;
  }
  return guarded("jaxsparse_unique_sites_v1", [&] {
    cpu::unique_sites(PoolParallelFor(pool), s.dims, data<int32_t>(coords), s.points, clamp_count(count, s.points),
                      s.capacity, data<int32_t>(sites), data<int32_t>(found), data<int32_t>(row_of),
                      data<int32_t>(order), data<int32_t>(offsets), data<int32_t>(without));
    *data<int32_t>(kept) = kept_of(found, s.capacity);
  });
}

ffi::Error coarse_sites(ffi::ThreadPool pool, In coords, In count, Out sites, Out kept, Out found, Out outside,
                        Out index, Out workspace, Axes kernel, Axes stride, Axes padding, Axes dilation, Axes bounds,
                        int64_t is_sorted) {
  CoarseSites s;
  if (auto e = check_coarse_sites(coords, count, sites, kept, found, outside, index, workspace, kernel, stride, padding,
                                  dilation, bounds, &s);
      e.failure()) {
    return e;
  }
  return guarded("jaxsparse_coarse_sites_v1", [&] {
    cpu::coarse_sites(PoolParallelFor(pool), s.geometry, s.bounded ? s.bounds : nullptr, data<int32_t>(coords),
                      clamp_count(count, s.rows), s.capacity, data<int32_t>(sites), data<int32_t>(found),
                      data<int32_t>(outside));
    *data<int32_t>(kept) = kept_of(found, s.capacity);
  });
}

ffi::Error site_index(ffi::ThreadPool pool, In coords, In count, Out index, int64_t of_blocks) {
  SiteIndex s;
  if (auto e = check_site_index(coords, count, index, &s); e.failure()) return e;
  return guarded("jaxsparse_site_index_v1", [&] {
    cpu::site_index(PoolParallelFor(pool), s.dims, of_blocks != 0, data<int32_t>(coords), clamp_count(count, s.rows),
                    s.rows, data<uint8_t>(index));
  });
}

ffi::Error kernel_map(ffi::ThreadPool pool, In in_coords, In in_count, In out_coords, In out_count, In index, Out table,
                      Out masks, Axes kernel, Axes stride, Axes padding, Axes dilation, int64_t builder) {
  BuildKernelMap s;
  if (auto e = check_kernel_map(in_coords, in_count, out_coords, out_count, index, table, masks, kernel, stride,
                                padding, dilation, builder, &s);
      e.failure()) {
    return e;
  }
  return guarded("jaxsparse_kernel_map_v1", [&] {
    cpu::kernel_map(PoolParallelFor(pool),
                    {s.geometry, s.builder == MapBuilder::kBlocks, data<uint8_t>(index), s.in_rows,
                     clamp_count(in_count, s.in_rows), data<int32_t>(out_coords), s.out_rows,
                     clamp_count(out_count, s.out_rows), data<int32_t>(table), data<uint32_t>(masks)});
  });
}

ffi::Error reverse_table(ffi::ThreadPool pool, In table, In out_counts, Out reverse, Out masks) {
  ReverseTable s;
  if (auto e = check_reverse_table(table, out_counts, reverse, masks, &s); e.failure()) return e;
  return guarded("jaxsparse_reverse_table_v1", [&] {
    const cpu::Segments out{s.segments, s.out_rows / s.segments, data<int32_t>(out_counts)};
    cpu::reverse_table(PoolParallelFor(pool), s.taps, data<int32_t>(table), out, s.in_rows, data<int32_t>(reverse),
                       data<uint32_t>(masks));
  });
}

ffi::Error conv_forward(ffi::ThreadPool pool, In x, In w, In table, In masks, In out_counts, Out y, int64_t tile_rows) {
  Conv s;
  if (auto e = check_conv_forward(x, w, table, masks, out_counts, y, tile_rows, &s); e.failure()) return e;
  const cpu::Segments out{s.segments, s.out_rows / s.segments, data<int32_t>(out_counts)};
  return for_float("jaxsparse_conv_forward_v1", s.dtype, [&](auto t) {
    using T = decltype(t);
    cpu::conv_forward(PoolParallelFor(pool), data<T>(x), s.in_rows, data<T>(w), data<int32_t>(table), out, s.taps,
                      s.in_channels, s.out_channels, s.tile_rows, data<T>(y));
  });
}

ffi::Error conv_wgrad(ffi::ThreadPool pool, In x, In g, In table, In masks, In out_counts, Out dw, Out workspace,
                      int64_t tile_rows) {
  Conv s;
  if (auto e = check_conv_wgrad(x, g, table, masks, out_counts, dw, workspace, tile_rows, &s); e.failure()) return e;
  const cpu::Segments out{s.segments, s.out_rows / s.segments, data<int32_t>(out_counts)};
  return for_float("jaxsparse_conv_wgrad_v1", s.dtype, [&](auto t) {
    using T = decltype(t);
    cpu::conv_wgrad(PoolParallelFor(pool), data<T>(x), s.in_rows, data<T>(g), data<int32_t>(table), out, s.taps,
                    s.in_channels, s.out_channels, data<T>(dw));
  });
}

ffi::Error invert_index(ffi::ThreadPool, In index, Out order, Out offsets, Out workspace) {
  InvertIndex s;
  if (auto e = check_invert_index(index, order, offsets, workspace, &s); e.failure()) return e;
  return guarded("jaxsparse_invert_index_v1", [&] {
    cpu::invert_index(data<int32_t>(index), s.positions, s.values, data<int32_t>(order), data<int32_t>(offsets));
  });
}

ffi::Error segment_sum(ffi::ThreadPool pool, In x, In order, In offsets, Out y) {
  SegmentSum s;
  if (auto e = check_segment_sum(x, order, offsets, y, &s); e.failure()) return e;
  return for_float("jaxsparse_segment_sum_v1", s.dtype, [&](auto t) {
    using T = decltype(t);
    cpu::segment_sum(PoolParallelFor(pool), data<T>(x), s.positions, s.channels, data<int32_t>(order),
                     data<int32_t>(offsets), s.values, data<T>(y));
  });
}

JAXSPARSE_DEFINE_HANDLERS(ffi::ThreadPool, {});

}  // namespace

const Handlers& cpu_handlers() { return kHandlers; }

}  // namespace jaxsparse
