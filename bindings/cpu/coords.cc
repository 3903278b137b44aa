// Distinct and coarse sites on the CPU: makes all keys, sorts them, and writes the distinct ones.
#include "bindings/cpu/coords.h"

#include <array>
#include <atomic>
#include <cstring>
#include <utility>
#include <vector>

#include "bindings/cpu/dims.h"

namespace jaxsparse::cpu {
namespace {

struct KeyAt {
  Key key;
  int32_t position;
};

// Stable radix sort by key, least significant digit first; digits in which all keys agree are skipped.
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

// Writes the distinct keys of a sorted list as sites, then padding; calls visit(item, row) for every item. Returns how many.
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
                  int64_t capacity, int32_t* sites, int32_t* found, int32_t* row_of, int32_t* order, int32_t* offsets,
                  int32_t* without) {
  for_dims(dims, [&](auto d) {
    constexpr int D = decltype(d)::value;
    std::vector<KeyAt> items(count);
    parallel_ranges(parallel_for, count, kGrain, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) {
        const int32_t* site = coords + p * (1 + D);
        items[p] = {make_key<D>(site[0], site + 1), static_cast<int32_t>(p)};
      }
    });
    std::fill(without, without + kReasons, 0);
    for (const KeyAt& item : items) {
      const int64_t why = -1 - int64_t{coords[item.position * int64_t{1 + D}]};
      if (item.key == kNoKey && why >= 0 && why < kReasons) ++without[why];
    }
    std::fill(row_of, row_of + rows, -1);
    std::fill(order, order + rows, -1);
    items.erase(std::remove_if(items.begin(), items.end(), [](const KeyAt& i) { return i.key == kNoKey; }),
                items.end());
    sort_by_key(items);
    int64_t next = 0, last = -1;
    *found = static_cast<int32_t>(write_distinct<D>(items, capacity, sites, [&](const KeyAt& item, int64_t row) {
      if (row != last && row <= capacity) offsets[row] = static_cast<int32_t>(next);
      last = row;
      if (row < capacity) {
        row_of[item.position] = static_cast<int32_t>(row);
        order[next] = item.position;
      }
      ++next;
    }));
    for (int64_t row = last + 1; row <= capacity; ++row) offsets[row] = static_cast<int32_t>(next);
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
      axes[a] = CoarseAxis(geometry, a);
      per_site *= axes[a].most();
    }
    std::vector<Key> candidates(count * per_site);
    std::atomic<int64_t> without_key{0};
    parallel_ranges(parallel_for, count, kGrain, [&](int64_t begin, int64_t end) {
      int64_t dropped = 0;
      for (int64_t i = begin * per_site; i < end * per_site; ++i) {
        const int32_t* fine = coords + i / per_site * (1 + D);
        int64_t rest = i % per_site, coarse[D];
        bool exists = has_key<D>(fine[0], fine + 1);
        for (int a = 0; a < D; ++a) {
          exists = exists && axes[a].coarse(fine[1 + a], rest % axes[a].most(), &coarse[a]);
          if (exists && bounds) exists = coarse[a] >= 0 && coarse[a] < bounds[a];
          rest /= axes[a].most();
        }
        candidates[i] = exists ? make_key<D>(fine[0], coarse) : kNoKey;
        dropped += exists && candidates[i] == kNoKey;
      }
      without_key += dropped;
    });
    std::vector<KeyAt> items;
    items.reserve(candidates.size());
    for (Key key : candidates) {  // neighbours often reach the same site
      if (key != kNoKey && (items.empty() || items.back().key != key)) items.push_back({key, 0});
    }
    const auto in_order = [](const KeyAt& a, const KeyAt& b) { return a.key < b.key; };
    if (!std::is_sorted(items.begin(), items.end(), in_order)) sort_by_key(items);
    *found = static_cast<int32_t>(write_distinct<D>(items, capacity, sites, [](const KeyAt&, int64_t) {}));
    *outside = static_cast<int32_t>(std::min<int64_t>(without_key, INT32_MAX));
  });
}

}  // namespace jaxsparse::cpu
