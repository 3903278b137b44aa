#include "bindings/cpu/coords.h"

#include <array>
#include <atomic>
#include <cstring>
#include <utility>
#include <vector>

namespace jaxsparse::cpu {
namespace {

constexpr int64_t kGrain = 4096;  // rows a task: long enough to hide its start, short enough to balance two cores

struct KeyAt {
  Key key;
  int32_t position;
};

// Stable least-significant-digit radix sort by key; digits in which all keys agree are skipped.
void sort_by_key(std::vector<KeyAt>& items) {
  std::array<std::array<int64_t, 256>, 8> histogram{};
  for (const KeyAt& item : items) {
    for (int d = 0; d < 8; ++d) ++histogram[d][item.key >> (8 * d) & 255];
  }
  std::vector<KeyAt> other(items.size());
  for (int d = 0; d < 8; ++d) {
    std::array<int64_t, 256>& count = histogram[d];
    if (items.empty() || count[items[0].key >> (8 * d) & 255] == static_cast<int64_t>(items.size())) continue;
    int64_t start = 0;
    for (int64_t& c : count) start += std::exchange(c, start);
    for (const KeyAt& item : items) other[count[item.key >> (8 * d) & 255]++] = item;
    items.swap(other);
  }
}

// Calls f(std::integral_constant<int, D>) for the run-time number of dimensions.
template <typename F>
void for_dims(int dims, F&& f) {
  switch (dims) {
    case 1: return f(std::integral_constant<int, 1>{});
    case 2: return f(std::integral_constant<int, 2>{});
    case 3: return f(std::integral_constant<int, 3>{});
    default: return f(std::integral_constant<int, 4>{});
  }
}

// Writes the distinct keys of a sorted list as sites, padding after them, and calls visit(item, row) for every item.
template <int D, typename Visit>
int64_t write_distinct(const std::vector<KeyAt>& sorted, int64_t capacity, int32_t* sites, Visit&& visit) {
  int64_t row = -1;
  Key last = kNoKey;
  for (const KeyAt& item : sorted) {
    if (item.key != last) {
      last = item.key;
      if (++row < capacity) write_site<D>(last, sites + row * (1 + D));
    }
    visit(item, row);
  }
  for (int64_t r = row + 1; r < capacity; ++r) write_padding<D>(sites + r * (1 + D));
  return row + 1;
}

}  // namespace

void unique_sites(const ParallelFor& parallel_for, int dims, const int32_t* coords, int64_t rows, int64_t count,
                  int64_t capacity, int32_t* sites, int32_t* found, int32_t* row_of) {
  for_dims(dims, [&](auto d) {
    constexpr int D = decltype(d)::value;
    std::vector<KeyAt> items(count);
    parallel_ranges(parallel_for, count, kGrain, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) {
        items[p] = {key_of_row<D>(coords + p * (1 + D)), static_cast<int32_t>(p)};
      }
    });
    std::fill(row_of, row_of + rows, -1);
    items.erase(std::remove_if(items.begin(), items.end(), [](const KeyAt& i) { return i.key == kNoKey; }),
                items.end());
    sort_by_key(items);
    *found = static_cast<int32_t>(write_distinct<D>(items, capacity, sites, [&](const KeyAt& item, int64_t row) {
      if (row < capacity) row_of[item.position] = static_cast<int32_t>(row);
    }));
  });
}

void coarse_sites(const ParallelFor& parallel_for, const Geometry& geometry, const int64_t* bounds,
                  const int32_t* coords, int64_t count, int64_t capacity, int32_t* sites, int32_t* found,
                  int32_t* outside) {
  for_dims(geometry.dims, [&](auto d) {
    constexpr int D = decltype(d)::value;
    CoarseAxis axes[D];
    int64_t per_site = 1;
    for (int a = 0; a < D; ++a) {
      axes[a] = {geometry.kernel[a], geometry.stride[a], geometry.padding[a], geometry.dilation[a]};
      per_site *= axes[a].coarse_per_axis();
    }
    std::vector<Key> candidates(count * per_site);
    std::atomic<int64_t> without_key{0};
    parallel_ranges(parallel_for, count, kGrain, [&](int64_t begin, int64_t end) {
      int64_t dropped = 0;
      for (int64_t i = begin * per_site; i < end * per_site; ++i) {
        const int32_t* fine = coords + i / per_site * (1 + D);
        int64_t rest = i % per_site, coarse[D];
        bool exists = key_of_row<D>(fine) != kNoKey;
        for (int a = 0; a < D; ++a) {
          const int64_t n = axes[a].coarse_per_axis();
          exists = exists && axes[a].coarse(fine[1 + a], rest % n, &coarse[a]);
          if (exists && bounds) exists = coarse[a] >= 0 && coarse[a] < bounds[a];
          rest /= n;
        }
        candidates[i] = exists ? make_key<D>(fine[0], coarse) : kNoKey;
        dropped += exists && candidates[i] == kNoKey;
      }
      without_key += dropped;
    });
    std::vector<KeyAt> items;
    items.reserve(candidates.size());
    for (Key key : candidates) {
      if (key != kNoKey) items.push_back({key, 0});
    }
    sort_by_key(items);
    *found = static_cast<int32_t>(write_distinct<D>(items, capacity, sites, [](const KeyAt&, int64_t) {}));
    *outside = static_cast<int32_t>(std::min<int64_t>(without_key, INT32_MAX));
  });
}

void hash_build(const ParallelFor& parallel_for, int dims, const int32_t* coords, int64_t count, int64_t slots,
                Key* keys, int32_t* rows) {
  std::memset(keys, 0xff, slots * sizeof(Key));
  std::fill(rows, rows + slots, INT32_MAX);
  int log2_slots = 0;
  while (int64_t{1} << log2_slots < slots) ++log2_slots;
  for_dims(dims, [&](auto d) {
    constexpr int D = decltype(d)::value;
    parallel_ranges(parallel_for, count, kGrain, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        const Key key = key_of_row<D>(coords + r * (1 + D));
        if (key == kNoKey) continue;
        uint64_t slot = first_slot(key, log2_slots);
        while (true) {
          Key held = kNoKey;
          if (__atomic_compare_exchange_n(&keys[slot], &held, key, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED) ||
              held == key) {
            break;
          }
          slot = (slot + 1) & (slots - 1);
        }
        int32_t lowest = __atomic_load_n(&rows[slot], __ATOMIC_RELAXED);
        while (r < lowest && !__atomic_compare_exchange_n(&rows[slot], &lowest, static_cast<int32_t>(r), true,
                                                          __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
        }
      }
    });
  });
}

void kernel_map(const ParallelFor& parallel_for, const Geometry& geometry, const Key* keys, const int32_t* rows,
                int64_t slots, const int32_t* out_coords, int64_t out_rows, int64_t out_count, int32_t* table,
                uint32_t* masks) {
  const int64_t volume = geometry.volume(), words = (volume + 31) / 32;
  int log2_slots = 0;
  while (int64_t{1} << log2_slots < slots) ++log2_slots;
  for_dims(geometry.dims, [&](auto d) {
    constexpr int D = decltype(d)::value;
    // The parts of all keys under one output lie in a list, an axis after another; a tap picks one of each axis.
    std::array<int64_t, D + 1> first{};
    for (int a = 0; a < D; ++a) first[a + 1] = first[a] + geometry.kernel[a];
    std::vector<std::array<int64_t, D>> picks(volume);
    for (int64_t k = 0; k < volume; ++k) {
      geometry.split_tap(k, picks[k].data());
      for (int a = 0; a < D; ++a) picks[k][a] += first[a];
    }
    parallel_ranges(parallel_for, out_rows, 512, [&](int64_t begin, int64_t end) {
      std::memset(masks + begin * words, 0, (end - begin) * words * sizeof(uint32_t));
      const int64_t real_end = std::clamp(out_count, begin, end);
      for (int64_t k = 0; k < volume; ++k) std::fill(table + k * out_rows + real_end, table + k * out_rows + end, -1);
      std::vector<Key> parts(first[D]), wanted(volume);
      for (int64_t m = begin; m < real_end; ++m) {
        const int32_t* site = out_coords + m * (1 + D);
        for (int a = 0; a < D; ++a) {
          for (int64_t tap = 0; tap < geometry.kernel[a]; ++tap) {
            parts[first[a] + tap] = axis_part<D>(a, geometry.fine(a, site[1 + a], tap));
          }
        }
        const Key batch = batch_part<D>(site[0]);
        for (int64_t k = 0; k < volume; ++k) {  // all slots are asked for before the first is read
          wanted[k] = batch;
          for (int a = 0; a < D; ++a) wanted[k] |= parts[picks[k][a]];
          __builtin_prefetch(&keys[first_slot(wanted[k], log2_slots)]);
        }
        for (int64_t k = 0; k < volume; ++k) {
          int32_t row = -1;
          if (wanted[k] != kNoKey) {
            uint64_t slot = first_slot(wanted[k], log2_slots);
            while (keys[slot] != kNoKey && keys[slot] != wanted[k]) slot = (slot + 1) & (slots - 1);
            if (keys[slot] != kNoKey) row = rows[slot];
          }
          table[k * out_rows + m] = row;
          if (row >= 0) masks[m * words + k / 32] |= uint32_t{1} << (k % 32);
        }
      }
    });
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
      for (int64_t m = out.begin(s); m < out.end(s); ++m) {
        if (entry[m] >= 0) row[entry[m]] = static_cast<int32_t>(m);
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
