// The search space of the scheduled products: each row is built, and Python reads the same rows to choose from.
//
// A tile is what a block computes: `rows` by `cols` of the result, copies `stages` - 1 steps ahead. Adding a point is
// adding a row. Where `splits` is more than 1, so many blocks of a cluster share the input channels.
#pragma once

namespace jaxsparse::cuda {

constexpr int kScheduleRows = 64;    // output rows of a schedule's tile; a block computes one or more
constexpr int kMostGroups = 9;       // of taps, by which a schedule sorts rows: one pass of the radix sort
constexpr int kMostGroupWords = 12;  // of a group's mask

// X(rows, cols, stages): output rows and output channels of forward, and of dgrad, which is forward over the reversed map.
#define JAXSPARSE_FORWARD_TILES(X) \
  X(64, 16, 4)                     \
  X(64, 32, 3)                     \
  X(64, 64, 4)                     \
  X(64, 64, 8)                     \
  X(128, 16, 4)                    \
  X(128, 32, 3)                    \
  X(128, 48, 3)                    \
  X(128, 64, 3)                    \
  X(128, 64, 4)                    \
  X(128, 96, 3)                    \
  X(128, 128, 3)                   \
  X(128, 128, 4)                   \
  X(256, 64, 4)                    \
  X(256, 96, 4)                    \
  X(256, 128, 4)

// X(rows, cols, stages, splits): the same on sm_90, for layers with fewer tiles than a device holds blocks.
#define JAXSPARSE_SPLIT_TILES(X) \
  X(128, 128, 3, 2)              \
  X(128, 128, 3, 4)

// The same as forward, for input channels that are a multiple of 4 but not of 8: the first layer of a network.
#define JAXSPARSE_NARROW_TILES(X) \
  X(128, 16, 4)                   \
  X(128, 32, 3)                   \
  X(128, 64, 3)

// X(rows, cols, stages): input channels and output channels of wgrad.
#define JAXSPARSE_WGRAD_TILES(X) \
  X(64, 16, 4)                   \
  X(64, 32, 4)                   \
  X(64, 48, 4)                   \
  X(64, 64, 4)                   \
  X(128, 64, 3)                  \
  X(128, 96, 3)                  \
  X(128, 96, 4)                  \
  X(128, 128, 3)                 \
  X(128, 128, 4)

// Both again for float32, each row built for TF32 and exact.
#define JAXSPARSE_FLOAT_TILES(X) \
  X(64, 16, 4)                   \
  X(64, 32, 4)                   \
  X(64, 48, 4)                   \
  X(64, 64, 3)                   \
  X(64, 64, 4)                   \
  X(64, 96, 3)                   \
  X(64, 128, 3)                  \
  X(128, 64, 3)                  \
  X(128, 128, 3)

#define JAXSPARSE_FLOAT_WGRAD_TILES(X) \
  X(64, 32, 4)                         \
  X(64, 48, 4)                         \
  X(64, 64, 3)                         \
  X(64, 128, 3)                        \
  X(128, 96, 3)                        \
  X(128, 128, 3)

struct Tile {
  int rows, cols, stages, splits = 1;
};

constexpr bool operator==(const Tile& a, const Tile& b) {
  return a.rows == b.rows && a.cols == b.cols && a.stages == b.stages && a.splits == b.splits;
}

#define JAXSPARSE_TILE(...) {__VA_ARGS__},
constexpr Tile kForwardTiles[] = {JAXSPARSE_FORWARD_TILES(JAXSPARSE_TILE) JAXSPARSE_SPLIT_TILES(JAXSPARSE_TILE)};
constexpr Tile kNarrowTiles[] = {JAXSPARSE_NARROW_TILES(JAXSPARSE_TILE)};
constexpr Tile kWgradTiles[] = {JAXSPARSE_WGRAD_TILES(JAXSPARSE_TILE)};
constexpr Tile kFloatTiles[] = {JAXSPARSE_FLOAT_TILES(JAXSPARSE_TILE)};
constexpr Tile kFloatWgradTiles[] = {JAXSPARSE_FLOAT_WGRAD_TILES(JAXSPARSE_TILE)};
#undef JAXSPARSE_TILE

}  // namespace jaxsparse::cuda
