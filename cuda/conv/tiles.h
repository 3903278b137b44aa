// The tiles that the convolution kernels are built for. Python reads these lists too, to choose a tile for each layer.
//
// A block computes `rows` x `cols` of the result, with a ring buffer of `stages`. With `splits` > 1, that many blocks of a
// cluster share the input channels. To add a tile, add a row.
#pragma once

namespace jaxsparse::cuda {

constexpr int kScheduleRows = 64;    // output rows of a schedule's tile; a block computes one or more tiles
constexpr int kMostGroups = 9;       // groups of taps by which a schedule sorts rows: few enough to sort in one pass
constexpr int kMostGroupWords = 12;  // words of a group's mask

// X(rows, cols, stages): output rows x output channels, for forward and for dgrad, which is forward over the reversed map.
#define JAXSPARSE_FORWARD_TILES(X) \
  X(64, 16, 4)                     \
  X(64, 32, 3)                     \
  X(64, 32, 4)                     \
  X(64, 32, 6)                     \
  X(64, 64, 3)                     \
  X(64, 64, 4)                     \
  X(64, 128, 3)                    \
  X(128, 16, 4)                    \
  X(128, 32, 3)                    \
  X(128, 48, 3)                    \
  X(128, 64, 3)                    \
  X(128, 64, 4)                    \
  X(128, 96, 3)                    \
  X(128, 128, 3)                   \
  X(128, 128, 4)

// X(rows, cols, stages, splits): further forward tiles on sm_90, for layers with too few tiles to fill the device.
#define JAXSPARSE_SPLIT_TILES(X) \
  X(64, 64, 4, 2)                \
  X(64, 128, 3, 2)               \
  X(128, 128, 3, 2)              \
  X(128, 128, 4, 2)

// Forward tiles for input channels that are a multiple of 4 but not of 8, as in the first layer of a network.
#define JAXSPARSE_NARROW_TILES(X) \
  X(128, 16, 4)                   \
  X(128, 32, 3)                   \
  X(128, 64, 3)

// X(rows, cols, stages): input channels x output channels of wgrad.
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

// Forward and wgrad tiles for float32, each built for TF32 and for exact products.
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
