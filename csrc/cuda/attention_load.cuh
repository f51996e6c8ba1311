// Pages to registers.
#pragma once

#include "attention_kernel.cuh"

namespace wkvquant {

// This warp's share of the team's units of an item. Returns `walk`, which other lanes find in shared memory after the
// warp's next barrier.
template <int D, int NT, int Strands>
__device__ __forceinline__ int4 Kernel<D, NT, Strands>::enter(Cursor& c, const Item& x, int end_unit, int size,
                                                              int member) const {
  ++c.segment;
  const uint32_t count = (x.end - x.begin) * (size == kWarps ? 1 : kTeams), from = count * member;  // of a CTA's warps
  const int begin = x.first + x.begin;
  c.unit = begin + static_cast<int>(from / kWarps);
  c.end = min(begin + static_cast<int>((from + count) / kWarps), (x.past + kUnit - 1) >> kUnitBits);
  if constexpr (Strands == 2) c.length = max(c.end - c.unit + 1, 0) / 2, c.last = c.unit + c.length;
  c.head = x.head;
  const int4 walk = {x.u + x.end, x.seq, (x.past - 1) >> kTileBits, end_unit};
  if (lane == 0) s.walk[warp] = walk;
  return walk;
}

// Goes to the next item that this warp has units of, if it has none left of this one, and asks for the page.
template <int D, int NT, int Strands>
__device__ __forceinline__ void Kernel<D, NT, Strands>::settle(Cursor& c, int4 walk) const {
  while (c.unit >= (Strands == 1 ? c.end : c.last)) {
    if (walk.x >= walk.w) {
      c.segment = INT_MAX;
      return;
    }
    __syncwarp();
    walk = enter(c, decode_at(walk.y, walk.x, walk.w), walk.w, size(), member());
  }
#pragma unroll
  for (int i = 0; i < Strands; ++i) {
    const int unit = i ? c.unit + c.length : c.unit;
    const int tile = min(unit * (kUnit / kTile) + g / 4, walk.z);
    const uint32_t block = launch.tiles_per_block(tile);
    c.tile[i] = tile - block * launch.tiles_per_block.divisor;
    const int32_t* of_sequence = a.block_table + wide_product(walk.y, launch.block_table_stride);
    c.page[i] = __ldg(of_sequence + block);
  }
}

template <int D, int NT, int Strands>
__device__ __forceinline__ void Kernel<D, NT, Strands>::advance(Cursor& c) const {
  ++c.unit;
  settle(c, s.walk[warp]);
}

// Where the words of K of the cursor's tile begin, of its first or second unit.
template <int D, int NT, int Strands>
__device__ __forceinline__ const uint8_t* Kernel<D, NT, Strands>::tile_of(const Cursor& c, int i) const {
  const uint32_t page = min(static_cast<uint32_t>(c.page[i]), static_cast<uint32_t>(a.num_blocks) - 1);
  const uint32_t inside = c.head * launch.page_bytes + c.tile[i] * (8 * D);
  return a.kv_cache + (static_cast<uint64_t>(page) * launch.block_stride + inside);
}

// Words t, t + 4, .. of tokens 4g .. 4g + 3.
template <int D, int NT, int Strands>
__device__ __forceinline__ void Kernel<D, NT, Strands>::load_k(const uint8_t* tile,
                                                               uint32_t (&k)[S::kKWords][4]) const {
  const uint8_t* base = tile + (t * 64 + g % 4 * 16);
#pragma unroll
  for (int j = 0; j < S::kKWords; ++j) load_words<4>(base + j * 256, k[j]);
}

// Where this lane's scales are in the first tile of a page.
template <int D, int NT, int Strands>
__device__ __forceinline__ int Kernel<D, NT, Strands>::meta_of_lane() const {
  return (D + (lane & 4)) * a.block_size + lane % 4 * 16;
}

// Scales of K and V to shared memory. A lane's place there is its number: each half of the unit has 4 of K at its first
// lane's, then 4 of V, each of four tokens.
template <int D, int NT, int Strands>
__device__ __forceinline__ void Kernel<D, NT, Strands>::copy_meta(int tile_of_page, const uint8_t* tile, int of_lane,
                                                                  uint4* place) const {
  if (lane % 16 < 8) copy_async(place, tile + (of_lane - tile_of_page * (8 * D - 4 * kTile)));
}

// Where this lane's words of V are: token pairs 4t .. 4t + 3.
template <int D, int NT, int Strands>
__device__ __forceinline__ const uint8_t* Kernel<D, NT, Strands>::v_of(const uint8_t* tile) const {
  const auto from = __shfl_sync(kFull, reinterpret_cast<unsigned long long>(tile), t / 2 * 16);
  return reinterpret_cast<const uint8_t*>(from) + (D / 2 * a.block_size + t % 2 * (4 * D) + 4 * S::word(0, g));
}

template <int D, int NT, int Strands>
__device__ __forceinline__ void Kernel<D, NT, Strands>::load_v(const uint8_t* base,
                                                               uint32_t (&v)[4][S::kVWords]) const {
  constexpr int kRun = D == 64 ? 2 : D == 96 ? 1 : 4;
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int c = 0; c < S::kVWords; c += kRun)
      load_words<kRun>(base + i * D + 4 * (S::word(c, 0) - S::word(0, 0)), v[i] + c);
}

// What stands for a unit that a strand does not have, so that no register holds what was in its place.
template <int M, int N>
__device__ __forceinline__ void clear(uint32_t (&x)[M][N]) {
#pragma unroll
  for (int i = 0; i < M; ++i)
#pragma unroll
    for (int j = 0; j < N; ++j) x[i][j] = 0;
}

// Keys and scales of both strands.
template <int D, int NT, int Strands>
__device__ __forceinline__ void Kernel<D, NT, Strands>::load_keys(const Cursor& c, Ahead& ahead) const {
  const int of_lane = meta_of_lane();
#pragma unroll
  for (int i = 0; i < Strands; ++i) {
    if (i && !c.both()) {
      clear(ahead.k[i]);
      break;
    }
    const uint8_t* tile = tile_of(c, i);
    load_k(tile, ahead.k[i]);
    copy_meta(c.tile[i], tile, of_lane, s.meta + threadIdx.x + 8 * i);
    if (lane % 16 == 0) s.tiles[threadIdx.x / 8 + i] = tile;
  }
}

// Their values.
template <int D, int NT, int Strands>
__device__ __forceinline__ void Kernel<D, NT, Strands>::load_values(Ahead& ahead) const {
#pragma unroll
  for (int i = 0; i < Strands; ++i) {
    if (i && !ahead.both) {
      clear(ahead.v[i]);
      break;
    }
    const uint8_t* tile = s.tiles[4 * warp + 2 * (t / 2) + i];
    load_v(tile + (D / 2 * a.block_size + t % 2 * (4 * D) + 4 * S::word(0, g)), ahead.v[i]);
  }
}

}  // namespace wkvquant
