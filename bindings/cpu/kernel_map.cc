// Kernel maps on the CPU, by hash maps as on the GPU (see cuda/coords/kernel_map.cu): of sites, or of blocks of 64 sites
// with masks. Both are bound by cache misses, so all slots of an output are prefetched before the first is read.
#include "bindings/cpu/kernel_map.h"

#include <array>
#include <cstring>
#include <vector>

#include "bindings/cpu/dims.h"
#include "cuda/coords/window.h"

namespace jaxsparse::cpu {
namespace {

// A hash map with open addressing and linear probing. Any number of threads may insert at once.
class HashMap {
 public:
  HashMap(uint64_t* keys, int64_t slots) : keys_(keys), last_(static_cast<uint64_t>(slots) - 1) {}

  int64_t insert_if_absent(uint64_t key) {
    for (uint64_t slot = hash(key) & last_;; slot = (slot + 1) & last_) {
      uint64_t held = kNoKey;
      if (__atomic_compare_exchange_n(&keys_[slot], &held, key, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED) ||
          held == key) {
        return static_cast<int64_t>(slot);
      }
    }
  }

  void prefetch(uint64_t key) const { __builtin_prefetch(&keys_[hash(key) & last_]); }

  // The slot of a key, -1 if it is absent.
  int64_t find(uint64_t key) const {
    for (uint64_t slot = hash(key) & last_;; slot = (slot + 1) & last_) {
      if (keys_[slot] == key) return static_cast<int64_t>(slot);
      if (keys_[slot] == kNoKey) return -1;
    }
  }

 private:
  uint64_t* keys_;
  uint64_t last_;
};

struct Block {
  uint64_t mask;  // a bit for each of its 64 sites that exists
  int32_t row;    // row of the first of these
};

// An index of sites: the keys of all slots, then their values, which are blocks or rows.
template <typename Value>
struct Index {
  HashMap map;
  Value* values;

  Index(void* bytes, int64_t slots)
      : map(static_cast<uint64_t*>(bytes), slots),
        values(reinterpret_cast<Value*>(static_cast<uint64_t*>(bytes) + slots)) {}
};

template <int D>
void enter_sites(const ParallelFor& parallel_for, const int32_t* coords, int64_t count, Index<int32_t> index) {
  parallel_ranges(parallel_for, count, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const int32_t* site = coords + r * (1 + D);
      const Key key = make_key<D>(site[0], site + 1);
      if (key == kNoKey) continue;
      int32_t* lowest = &index.values[index.map.insert_if_absent(key)];
      int32_t held = __atomic_load_n(lowest, __ATOMIC_RELAXED);
      while (r < held && !__atomic_compare_exchange_n(lowest, &held, static_cast<int32_t>(r), true, __ATOMIC_RELAXED,
                                                      __ATOMIC_RELAXED)) {
      }
    }
  });
}

template <int D>
void enter_blocks(const ParallelFor& parallel_for, const int32_t* coords, int64_t count, Index<Block> index) {
  parallel_ranges(parallel_for, count, kGrain, [&](int64_t begin, int64_t end) {
    const auto key = [&](int64_t r) { return make_key<D>(coords[r * (1 + D)], coords + r * (1 + D) + 1); };
    const auto begins_block = [&](int64_t r) { return r == 0 || (key(r) | kInBlock) != (key(r - 1) | kInBlock); };
    while (begin < end && !begins_block(begin)) ++begin;  // the previous range enters that block
    for (int64_t r = begin; r < end;) {
      Block block{0, static_cast<int32_t>(r)};
      const Key first = key(r);
      for (Key k = first; (k | kInBlock) == (first | kInBlock);) {
        block.mask |= uint64_t{1} << (k & kInBlock);
        if (++r == count) break;
        k = key(r);
      }
      index.values[index.map.insert_if_absent(first & ~kInBlock)] = block;
    }
  });
}

// For every tap and axis, an index into an array with one entry per (axis, position of the tap on it), axis after axis.
template <int D>
std::vector<std::array<int64_t, D>> tap_entries(const Geometry& geometry) {
  std::vector<std::array<int64_t, D>> entries(geometry.volume());
  for (size_t k = 0; k < entries.size(); ++k) {
    geometry.split_tap(static_cast<int64_t>(k), entries[k].data());
    for (int a = 1; a < D; ++a) {
      for (int b = 0; b < a; ++b) entries[k][a] += geometry.kernel[b];
    }
  }
  return entries;
}

// Writes table and masks of all outputs. rows_of(m, rows) finds the input row of every tap of output m; `make()` returns a
// rows_of for each task, with its own scratch memory.
template <typename Make>
void write_outputs(const ParallelFor& parallel_for, const KernelMapArgs& a, Make make) {
  const int64_t volume = a.geometry.volume(), words = (volume + 31) / 32;
  parallel_ranges(parallel_for, a.out_count, 512, [&](int64_t begin, int64_t end) {
    std::memset(a.masks + begin * words, 0, (end - begin) * words * sizeof(uint32_t));
    auto rows_of = make();
    std::vector<int32_t> rows(volume);
    for (int64_t m = begin; m < end; ++m) {
      rows_of(m, rows.data());
      for (int64_t k = 0; k < volume; ++k) {
        a.table[k * a.out_rows + m] = rows[k];
        if (rows[k] >= 0) a.masks[m * words + k / 32] |= uint32_t{1} << (k % 32);
      }
    }
  });
}

template <int D>
void map_by_sites(const ParallelFor& parallel_for, const KernelMapArgs& a) {
  const Index<int32_t> index(const_cast<void*>(a.index), hash_slots(a.in_rows));
  const std::vector<std::array<int64_t, D>> entries = tap_entries<D>(a.geometry);
  write_outputs(parallel_for, a, [&] {
    return [&, wanted = std::vector<Key>(entries.size()), parts = std::vector<Key>()](int64_t m, int32_t* found) mutable {
      const int32_t* site = a.out_coords + m * (1 + D);
      parts.clear();
      for (int d = 0; d < D; ++d) {
        for (int64_t tap = 0; tap < a.geometry.kernel[d]; ++tap) {
          parts.push_back(axis_part<D>(d, a.geometry.fine(d, site[1 + d], tap)));
        }
      }
      const Key batch = batch_part<D>(site[0]);
      for (size_t k = 0; k < entries.size(); ++k) {
        wanted[k] = batch;
        for (int d = 0; d < D; ++d) wanted[k] |= parts[entries[k][d]];
        index.map.prefetch(wanted[k]);
      }
      for (size_t k = 0; k < entries.size(); ++k) {
        const int64_t slot = wanted[k] == kNoKey ? -1 : index.map.find(wanted[k]);
        found[k] = slot < 0 ? -1 : index.values[slot];
      }
    };
  });
}

template <int D>
void map_by_blocks(const ParallelFor& parallel_for, const KernelMapArgs& a) {
  const Index<Block> index(const_cast<void*>(a.index), hash_slots(a.in_rows));
  int32_t across[D];
  const int under = blocks_under_window<D>(a.geometry, across);
  const std::vector<std::array<int64_t, D>> entries = tap_entries<D>(a.geometry);
  int64_t places = 0;
  for (int d = 0; d < D; ++d) places += a.geometry.kernel[d];
  struct Place {  // a tap's share, on one axis, of the block's number under the window and of the site's number in it
    int32_t block;
    int32_t site;
  };
  write_outputs(parallel_for, a, [&] {
    return [&, keys = std::vector<Key>(under), held = std::vector<Block>(under),
            places = std::vector<Place>(places)](int64_t m, int32_t* found) mutable {
      const int32_t* site = a.out_coords + m * (1 + D);
      WindowAxis window[D];
      int32_t step = 1, place_end = static_cast<int32_t>(places.size());
      for (int d = D - 1; d >= 0; --d) {
        window[d] = window_axis<D>(a.geometry, d, site[1 + d]);
        for (int64_t tap = a.geometry.kernel[d] - 1; tap >= 0; --tap) {
          const int32_t at = window[d].offset + static_cast<int32_t>(a.geometry.dilation[d] * tap);
          places[--place_end] = {(at >> block_axis_bits(D, d)) * step, bits_in_block<D>(d, at)};
        }
        step *= across[d];
      }
      for (int u = 0; u < under; ++u) {
        int64_t coord[D];
        int32_t rest = u;
        bool is_under = true;
        for (int d = D - 1; d >= 0; --d) {
          is_under = is_under && rest % across[d] < window[d].blocks;
          coord[d] = window[d].template first_site<D>(d, rest % across[d]);
          rest /= across[d];
        }
        keys[u] = is_under ? make_key<D>(site[0], coord) : kNoKey;
        if (keys[u] != kNoKey) index.map.prefetch(keys[u]);
      }
      for (int u = 0; u < under; ++u) {
        const int64_t slot = keys[u] == kNoKey ? -1 : index.map.find(keys[u]);
        held[u] = slot < 0 ? Block{0, 0} : index.values[slot];
      }
      for (size_t k = 0; k < entries.size(); ++k) {
        int32_t which = 0;
        int32_t in_block = 0;
        for (int d = 0; d < D; ++d) {
          which += places[entries[k][d]].block;
          in_block |= places[entries[k][d]].site;
        }
        const Block& block = held[which];
        const uint64_t bit = uint64_t{1} << in_block;
        const int64_t row = block.mask & bit ? block.row + __builtin_popcountll(block.mask & (bit - 1)) : -1;
        found[k] = row < a.in_count ? static_cast<int32_t>(row) : -1;  // row >= in_count only if sites are not sorted
      }
    };
  });
}

}  // namespace

void site_index(const ParallelFor& parallel_for, int dims, bool of_blocks, const int32_t* coords, int64_t count,
                int64_t rows, void* bytes) {
  const int64_t slots = hash_slots(rows);
  const Index<int32_t> sites(bytes, slots);
  parallel_ranges(parallel_for, slots, 1 << 16, [&](int64_t begin, int64_t end) {
    std::fill(static_cast<uint64_t*>(bytes) + begin, static_cast<uint64_t*>(bytes) + end, kNoKey);
    if (!of_blocks) std::fill(sites.values + begin, sites.values + end, INT32_MAX);
  });
  for_dims(dims, [&](auto d) {
    constexpr int D = decltype(d)::value;
    if (of_blocks) {
      enter_blocks<D>(parallel_for, coords, count, Index<Block>(bytes, slots));
    } else {
      enter_sites<D>(parallel_for, coords, count, sites);
    }
  });
}

void kernel_map(const ParallelFor& parallel_for, const KernelMapArgs& a) {
  for_dims(a.geometry.dims, [&](auto dims) {
    constexpr int D = decltype(dims)::value;
    a.by_blocks ? map_by_blocks<D>(parallel_for, a) : map_by_sites<D>(parallel_for, a);
  });
}

void reverse_table(const ParallelFor& parallel_for, int64_t volume, const int32_t* table, const Segments& out,
                   int64_t in_rows, int32_t* reverse, uint32_t* masks) {
  const int64_t words = (volume + 31) / 32;
  parallel_for(volume, [&](int64_t k) {
    int32_t* row = reverse + k * in_rows;
    std::fill(row, row + in_rows, -1);
    const int32_t* entry = table + k * out.rows();
    for (int64_t s = 0; s < out.number; ++s) {
      for (int64_t m = out.begin(s), end = out.end(s); m < end; ++m) {
        if (is_row(entry[m], in_rows)) row[entry[m]] = static_cast<int32_t>(m);
      }
    }
  });
  parallel_ranges(parallel_for, in_rows, kGrain, [&](int64_t begin, int64_t end) {
    std::memset(masks + begin * words, 0, (end - begin) * words * sizeof(uint32_t));
    for (int64_t k = 0; k < volume; ++k) {
      const int32_t* row = reverse + k * in_rows;
      for (int64_t n = begin; n < end; ++n) {
        if (row[n] >= 0) masks[n * words + k / 32] |= uint32_t{1} << (k % 32);
      }
    }
  });
}

}  // namespace jaxsparse::cpu
