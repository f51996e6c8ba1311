// New K and V -> page: shift, smooth, rotate, range, pack, scatter.
//
// A thread takes two tokens at a time over all heads: the angles of a position are shared by the heads, and two tokens of
// one V pair become whole words. All of a row's work happens in registers (D / 16 vectors) but the packing, which goes
// through 2 * D bytes of stack.
#pragma once

#include "layout.h"
#include "vec.h"

namespace {

constexpr int kMaxHeadSize = 256;

struct Rotation {
  float cosine[kMaxHeadSize / 2], sine[kMaxHeadSize / 2];
};

WKV_INLINE void rotation_at(int64_t position, const uint64_t* turns, int pairs, float* cosine, float* sine) {
  for (int j = 0; j < pairs; j += kLanes) {
    uint32_t turn[kLanes];
    for (int i = 0; i < kLanes; ++i) turn[i] = (static_cast<uint64_t>(position) * turns[j + i]) >> 32;
    f32 s, c;
    sincos_turn(load<u32>(turn), s, c);
    store(cosine + j, c);
    store(sine + j, s);
  }
}

// Codes [N * 16] of one row; returns (scale, minimum) as two fp16.
template <class Isa, int N>
WKV_INLINE uint32_t quantize(const f32* x, uint8_t* codes) {
  f32 low = x[0], high = x[0];
  for (int i = 1; i < N; ++i) {
    low = Isa::min(low, x[i]);
    high = Isa::max(high, x[i]);
  }
  const float least = Isa::reduce_min(low), most = Isa::reduce_max(high);
  const float bound = 65504.0f, range = (most - least) / 15.0f;
  const float clamped = least < -bound ? -bound : least > bound ? bound : least;
  const uint16_t minimum = Isa::to_half(clamped), scale = Isa::to_half(range < bound ? range : bound);
  const float step = Isa::half_to_float(scale);
  const f32 inverse = splat(step > 0 ? 1.0f / step : 0.0f), offset = splat(Isa::half_to_float(minimum));
  for (int i = 0; i < N; ++i) {
    const f32 code = Isa::min(Isa::max((x[i] - offset) * inverse, f32{}), splat(15.0f));
    Isa::store_bytes(codes + kLanes * i, round_int(code));
  }
  return scale | static_cast<uint32_t>(minimum) << 16;
}

template <class Isa, int D>
WKV_INLINE uint32_t quantize_key(const wkvquant::CacheWriteArgs& a, int64_t token, int head, const Rotation& r, uint8_t* codes) {
  constexpr int N = D / kLanes, kBlock = (D & -D) / kLanes;
  const wkvquant::Prepared& p = *a.params;
  alignas(64) float row[D];
  load_row<Isa>(a.key, a.dtype, token * a.key_stride[0] + head * a.key_stride[1], D, row);
  if (p.has_k_shift) {
    const float* shift = p.k_shift + head * D;
    // Not a multiple of 16 for a head size of 80: plain loops, which the compiler turns into masked vectors.
    for (int j = 0; j < p.pairs; ++j) {
      const float s = shift[j], t = shift[j + p.pairs];
      row[j] -= s * r.cosine[j] - t * r.sine[j];
      row[j + p.pairs] -= t * r.cosine[j] + s * r.sine[j];
    }
    for (int j = 2 * p.pairs; j < D; ++j) row[j] -= shift[j];
  }
  f32 x[N];
  for (int i = 0; i < N; ++i) x[i] = load<f32>(row + kLanes * i) * load<f32>(p.key_scale + head * D + kLanes * i);
  if (p.hadamard)
    for (int i = 0; i < N; i += kBlock) hadamard<Isa, kBlock>(x + i);
  return quantize<Isa, N>(x, codes);
}

template <class Isa, int D>
WKV_INLINE uint32_t quantize_value(const wkvquant::CacheWriteArgs& a, int64_t token, int head, uint8_t* codes) {
  constexpr int N = D / kLanes;
  alignas(64) float row[D];
  load_row<Isa>(a.value, a.dtype, token * a.value_stride[0] + head * a.value_stride[1], D, row);
  f32 x[N];
  for (int i = 0; i < N; ++i) x[i] = load<f32>(row + kLanes * i) - load<f32>(a.params->v_shift + head * D + kLanes * i);
  return quantize<Isa, N>(x, codes);
}

// K words of a row from its codes: bytes 0..3 are the low nibbles, bytes 4..7 the high ones.
template <int D>
WKV_INLINE void pack_key(const uint8_t* codes, uint8_t* page, const wkvquant::PageLayout& layout, int64_t slot) {
  uint8_t* word = page + layout.k_word(slot, 0);
  for (int g = 0; g < D / 8; ++g) {
    uint64_t x;
    memcpy(&x, codes + 8 * g, 8);
    const uint32_t packed = static_cast<uint32_t>(x | x >> 28);
    memcpy(word + 4 * wkvquant::kTile * g, &packed, 4);
  }
}

// Four codes of a value as one halfword.
WKV_INLINE u32 pack_value(const uint8_t* codes) {
  u32 x = load<u32>(codes);
  x = (x | x >> 4) & 0x00ff00ff;
  return (x | x >> 8) & 0xffff;
}

// Tokens `token` and, if `two`, `token + 1`, whose slots are then a V pair.
template <class Isa, int D>
WKV_INLINE void write_tokens(const wkvquant::CacheWriteArgs& a, int64_t token, bool two) {
  constexpr int kWords = D / 4, kPadded = (D + 63) / 64 * 64;
  const wkvquant::Prepared& p = *a.params;
  const wkvquant::PageLayout layout{D, a.block_size};
  const int64_t slot = a.slot_mapping[token] % a.block_size;
  uint8_t* block = a.kv_cache + a.slot_mapping[token] / a.block_size * a.block_stride;
  Rotation rotation[2];
  if (p.has_k_shift && p.pairs)
    for (int i = 0; i <= two; ++i)
      rotation_at(a.positions[token + i], p.turns, p.pairs, rotation[i].cosine, rotation[i].sine);
  alignas(64) uint8_t codes[kPadded], values[2][kPadded];
  for (int head = 0; head < p.num_kv_heads; ++head) {
    uint8_t* page = block + head * layout.nbytes();
    for (int i = 0; i <= two; ++i) {
      const uint32_t k_meta = quantize_key<Isa, D>(a, token + i, head, rotation[i], codes);
      pack_key<D>(codes, page, layout, slot + i);
      memcpy(page + layout.k_meta() + 4 * (slot + i), &k_meta, 4);
      const uint32_t v_meta = quantize_value<Isa, D>(a, token + i, head, values[i]);
      memcpy(page + layout.v_meta() + 4 * (slot + i), &v_meta, 4);
    }
    alignas(64) uint32_t words[kPadded / 4];
    for (int w = 0; w < kWords; w += kLanes) {
      const u32 even = pack_value(values[0] + 4 * w);
      store(words + w, two ? even | pack_value(values[1] + 4 * w) << 16 : even);
    }
    uint8_t* out = page + layout.v_half(slot, 0);
    if (two)
      memcpy(out, words, 4 * kWords);
    else  // the other halfword belongs to another token, perhaps to one that another thread is writing
      for (int w = 0; w < kWords; ++w) memcpy(out + 4 * w, words + w, 2);
  }
}

template <class Isa, int D>
void write_all(const wkvquant::CacheWriteArgs& a) {
  const int64_t step = 16;
#pragma omp parallel for schedule(static) if (a.num_tokens > 4)
  for (int64_t begin = 0; begin < a.num_tokens; begin += step) {
    const int64_t end = begin + step < a.num_tokens ? begin + step : a.num_tokens;
    for (int64_t t = begin; t < end;) {
      const int64_t slot = a.slot_mapping[t];
      if (slot < 0) {
        ++t;
        continue;
      }
      const bool two = t + 1 < end && slot % 2 == 0 && a.slot_mapping[t + 1] == slot + 1;
      write_tokens<Isa, D>(a, t, two);
      t += 1 + two;
    }
  }
}

template <class Isa>
int cache_write(const wkvquant::CacheWriteArgs& a) {
  for (int64_t t = 0; t < a.num_tokens; ++t)
    if (a.slot_mapping[t] >= a.num_blocks * a.block_size) return kBadSlot;
  switch (a.params->head_size) {
    case 64: write_all<Isa, 64>(a); break;
    case 80: write_all<Isa, 80>(a); break;
    case 96: write_all<Isa, 96>(a); break;
    case 128: write_all<Isa, 128>(a); break;
    case 256: write_all<Isa, 256>(a); break;
  }
  return kOk;
}

}  // namespace
