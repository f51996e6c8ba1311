// Pages to registers.
#pragma once

#include "attention_kernel.cuh"

namespace wkvquant {

// This warp's share of the team's units of an item.
template <int D, int NT>
__device__ __forceinline__ void Kernel<D, NT>::enter(Cursor& c, const Item& x) const {
  const int count = x.end - x.begin;
  ++c.segment;
  c.next_unit = x.u + x.end;
  const int parts = size() == kWarps ? 1 : kTeams, from = count * member() * parts;  // of a CTA's warps
  const int begin = x.first + x.begin;
  c.unit = begin + from / kWarps;
  c.end = min(begin + (from + count * parts) / kWarps, (x.past + kUnit - 1) / kUnit);
  c.seq = x.seq, c.head = x.head, c.last_tile = (x.past - 1) / kTile;
}

template <int D, int NT>
__device__ __forceinline__ void Kernel<D, NT>::advance(Cursor& c, int end_unit) const {
  ++c.unit;
  while (c.unit >= c.end) {
    if (c.next_unit >= end_unit) {
      c.segment = INT_MAX;
      return;
    }
    enter(c, decode_at(c.next_unit, end_unit));
  }
  const int tile = min(c.unit * (kUnit / kTile) + g / 4, c.last_tile);
  const int block = tiles_per_block(tile);
  c.tile = tile - block * tiles_per_block.divisor;
  c.page = __ldg(a.block_table + c.seq * a.block_table_stride + block);
}

// Where the words of K of the cursor's tile begin.
template <int D, int NT>
__device__ __forceinline__ const uint8_t* Kernel<D, NT>::tile_of(const Cursor& c) const {
  const uint32_t page = min(static_cast<uint32_t>(c.page), static_cast<uint32_t>(a.num_blocks) - 1);
  return a.kv_cache + static_cast<uint64_t>(page) * block_stride + (c.head * page_bytes + c.tile * (8 * D));
}

// Words t, t + 4, .. of tokens 4g .. 4g + 3.
template <int D, int NT>
__device__ __forceinline__ void Kernel<D, NT>::load_k(const uint8_t* tile, uint32_t (&k)[S::kKWords][4]) const {
  const uint8_t* base = tile + (t * 64 + g % 4 * 16);
#pragma unroll
  for (int j = 0; j < S::kKWords; ++j) load_words<4>(base + j * 256, k[j]);
}

// Scales of K and V to shared memory: [2][8] of four tokens.
template <int D, int NT>
__device__ __forceinline__ void Kernel<D, NT>::copy_meta(const Cursor& c, const uint8_t* tile, uint4* meta) const {
  const int of_v = lane / 4 % 2, i = lane % 4;
  const int offset = (D + of_v * 4) * a.block_size - c.tile * (8 * D - 4 * kTile) + i * 16;
  if (lane % 16 < 8) copy_async(meta + of_v * 8 + lane / 16 * 4 + i, tile + offset);
}

// Where this lane's words of V are: token pairs 4t .. 4t + 3.
template <int D, int NT>
__device__ __forceinline__ const uint8_t* Kernel<D, NT>::v_of(const uint8_t* tile) const {
  const auto from = __shfl_sync(kFull, reinterpret_cast<unsigned long long>(tile), t / 2 * 16);
  return reinterpret_cast<const uint8_t*>(from) + (D / 2 * a.block_size + t % 2 * (4 * D) + 4 * S::word(0, g));
}

template <int D, int NT>
__device__ __forceinline__ void Kernel<D, NT>::load_v(const uint8_t* base, uint32_t (&v)[4][S::kVWords]) const {
  constexpr int kRun = D == 64 ? 2 : D == 96 ? 1 : 4;
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int c = 0; c < S::kVWords; c += kRun)
      load_words<kRun>(base + i * D + 4 * (S::word(c, 0) - S::word(0, 0)), v[i] + c);
}

}  // namespace wkvquant
