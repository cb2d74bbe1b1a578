// SPDX-License-Identifier: Apache-2.0
// A weight expanded to int8 in global memory, for prefill_wgmma: [block of 128 rows][chunk][tile of 16 rows][2 halves of 8 rows]
// [8 units of 16 bytes of k][8 rows][16 bytes]. wgmma reads the 128 bytes of a unit without a swizzle, and they are one register
// of a warp that decodes (layout.h).
#pragma once

#include <cstdint>

#include "linear.h"

namespace pvq::cuda {

constexpr int kExpandedRows = 128;  // of a block
constexpr int kBlockTiles = kExpandedRows / kTileRows;
constexpr int kExpandedTile = kTileRows * kChunkColumns;  // bytes of a tile in a chunk
constexpr std::int64_t kMaxExpandedBytes = std::int64_t{1} << 28;

// Rows that are expanded at once.
constexpr std::int64_t expanded_rows(std::int64_t rows, std::int64_t chunks) {
  constexpr std::int64_t kUnit = 2 * kExpandedRows;
  const std::int64_t most =
      kMaxExpandedBytes / (chunks * kChunkColumns) / kUnit * kUnit;  // not 0: a layer has at most 65536 columns
  return rows <= most ? round_up(rows, kExpandedRows) : most;
}

// Pieces are tiles by a few chunks. They are expanded in the order in which the product, whose clusters take a round of blocks at
// a time, needs them: the first chunks of all blocks of a round, then the next chunks.
struct ExpansionOrder {
  static constexpr int kPieceChunks = 4;

  int blocks, chunks, round_blocks;  // the last at most `blocks`

  struct Piece {
    int block, group, tile;  // group: of chunks
  };

  PVQ_HOST_DEVICE constexpr int groups() const { return (chunks + kPieceChunks - 1) / kPieceChunks; }
  PVQ_HOST_DEVICE constexpr int pieces() const { return blocks * groups() * kBlockTiles; }
  PVQ_HOST_DEVICE constexpr int counters() const { return 1 + blocks * groups(); }
  PVQ_HOST_DEVICE constexpr Piece at(int i) const {
    const int round_pieces = round_blocks * groups() * kBlockTiles, round = i / round_pieces, first = round * round_blocks;
    const int width = (blocks - first < round_blocks ? blocks - first : round_blocks) * kBlockTiles;
    const int rest = i - round * round_pieces, group = rest / width, local = rest - group * width;
    return {first + local / kBlockTiles, group, local % kBlockTiles};
  }
};

// Scratch memory: the expanded weight, then counters, zero at the start of the product: one of the pieces that warps have
// claimed, and for every block and group of chunks one of the tiles that are done.
struct Expansion {
  std::uint8_t* data;
  std::uint32_t* counters;
  ExpansionOrder order;
  int tiles;          // of the packed weight
  int groups_before;  // of the first round, by expand(); the product does the others

  // The rows of a block's last tiles may be past those of the packed weight.
  PVQ_HOST_DEVICE bool exists(const ExpansionOrder::Piece& piece) const { return piece.block * kBlockTiles + piece.tile < tiles; }
  // Pieces that expand() does.
  PVQ_HOST_DEVICE int first() const { return order.round_blocks * groups_before * kBlockTiles; }
  PVQ_HOST_DEVICE std::uint32_t* done(int block, int group) const { return counters + 1 + block * order.groups() + group; }
};

constexpr std::int64_t expanded_data_bytes(std::int64_t rows, std::int64_t chunks) {
  return expanded_rows(rows, chunks) * chunks * kChunkColumns;
}
constexpr std::int64_t expanded_bytes(std::int64_t rows, std::int64_t chunks) {
  const ExpansionOrder order{ceil_div(expanded_rows(rows, chunks), kExpandedRows), static_cast<int>(chunks), 0};
  return expanded_data_bytes(rows, chunks) + 4 * order.counters();
}

// The first pieces, and zeros to the counters. leaves_room: for blocks of the next kernel on every multiprocessor.
void expand(const Weight& weight, const Expansion& expansion, bool leaves_room, cudaStream_t stream);

}  // namespace pvq::cuda
