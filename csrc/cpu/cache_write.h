// New K and V -> page: shift, smooth, rotate, range, pack, scatter.
//
// A thread takes two tokens at a time over all heads: the angles of a position are shared by the heads, and two tokens
// of one V pair become whole words. Rows pass through four phases by way of a few KB of stack, so that the latencies of
// one overlap with the work of the others: transform, range, encode, pack.
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

// Rows that go through the phases of a write together: K and V of two tokens. Alone, a row would wait for its own
// range, two divisions and two conversions, about 90 cycles.
constexpr int kWriteRows = 4;

struct Range {
  float low, high;
};

template <class Isa, int N>
WKV_INLINE Range store_range(const f32* x, float* row) {
  f32 low = x[0], high = x[0];
  for (int i = 0; i < N; ++i) {
    low = Isa::min(low, x[i]);
    high = Isa::max(high, x[i]);
    store(row + kLanes * i, x[i]);
  }
  return {Isa::reduce_min(low), Isa::reduce_max(high)};
}

// Shifted, smoothed and rotated key of one head.
template <class Isa, int D>
WKV_INLINE Range transform_key(const wkvquant::CacheWriteArgs& a, int64_t token, int head, const Rotation& r,
                               float* row) {
  constexpr int N = D / kLanes, kBlock = (D & -D) / kLanes;
  const wkvquant::Prepared& p = *a.params;
  load_row<Isa>(a.key, a.dtype, token * a.key_stride[0] + head * a.key_stride[1], D, row);
  if (p.k_first && a.positions[token] == 0) {
    const float* shift = p.k_first + head * D;
    for (int j = 0; j < D; ++j) row[j] -= shift[j];
  } else if (p.has_k_shift) {
    const float* shift = p.k_shift + head * D;
    // Pairs are no multiple of 16 for a head size of 80: plain loops, which the compiler turns into masked vectors.
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
  return store_range<Isa, N>(x, row);
}

template <class Isa, int D>
WKV_INLINE Range transform_value(const wkvquant::CacheWriteArgs& a, int64_t token, int head, float* row) {
  constexpr int N = D / kLanes;
  load_row<Isa>(a.value, a.dtype, token * a.value_stride[0] + head * a.value_stride[1], D, row);
  f32 x[N];
  const wkvquant::Prepared& p = *a.params;
  const float* shift = (p.v_first && a.positions[token] == 0 ? p.v_first : p.v_shift) + head * D;
  for (int i = 0; i < N; ++i) x[i] = load<f32>(row + kLanes * i) - load<f32>(shift + kLanes * i);
  return store_range<Isa, N>(x, row);
}

// Scales, minima (fp16) and reciprocal scales of up to 16 rows at once.
struct Scales {
  alignas(64) float low[kLanes], high[kLanes], inverse[kLanes], offset[kLanes];
  uint16_t scale[kLanes], minimum[kLanes];

  template <class Isa>
  WKV_INLINE void compute() {
    const f32 bound = splat(65504.0f), least = load<f32>(low);
    Isa::store_half(minimum, Isa::min(Isa::max(least, -bound), bound));
    Isa::store_half(scale, Isa::min((load<f32>(high) - least) / 15.0f, bound));
    const f32 step = Isa::load_half(scale);
    store(offset, Isa::load_half(minimum));
    store(inverse, step > 0.0f ? 1.0f / step : f32{});
  }
  uint32_t meta(int i) const { return scale[i] | static_cast<uint32_t>(minimum[i]) << 16; }
};

// K words of two tokens from their codes, as pairs of words: bytes 0..3 of eight are the low nibbles, 4..7 the high
// ones.
template <int D>
WKV_INLINE void pack_keys(const uint8_t* first, const uint8_t* second, bool two, uint8_t* word) {
  using u64 = uint64_t __attribute__((vector_size(64)));
  alignas(64) uint64_t pairs[(D + 63) / 64 * 8];
  for (int i = 0; i < D; i += 64) {
    const u64 a = load<u64>(first + i), b = load<u64>(second + i);
    store(pairs + i / 8, ((a | a >> 28) & 0xffffffff) | (b | b >> 28) << 32);
  }
  asm("" : "+r"(word));  // or GCC keeps D / 8 addresses, and on the stack at that
  if (two)
    for (int g = 0; g < D / 8; ++g) memcpy(word + 4 * wkvquant::kTile * g, pairs + g, 8);
  else
    for (int g = 0; g < D / 8; ++g) memcpy(word + 4 * wkvquant::kTile * g, pairs + g, 4);
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
  alignas(64) float rows[kWriteRows][D];
  alignas(64) uint8_t codes[kWriteRows][kPadded];
  Scales scales{};
  for (int head = 0; head < p.num_kv_heads; ++head) {
    uint8_t* page = block + head * layout.nbytes();
    for (int i = 0; i <= two; ++i) {
      const Range k = transform_key<Isa, D>(a, token + i, head, rotation[i], rows[i]);
      const Range v = transform_value<Isa, D>(a, token + i, head, rows[2 + i]);
      scales.low[i] = k.low, scales.high[i] = k.high;
      scales.low[2 + i] = v.low, scales.high[2 + i] = v.high;
    }
    scales.compute<Isa>();
    for (int i = 0; i <= two; ++i) {
      Isa::template encode<D>(rows[i], scales.offset[i], scales.inverse[i], codes[i]);
      Isa::template encode<D>(rows[2 + i], scales.offset[2 + i], scales.inverse[2 + i], codes[2 + i]);
    }
    for (int i = 0; i <= two; ++i) {
      const uint32_t k_meta = scales.meta(i), v_meta = scales.meta(2 + i);
      memcpy(page + layout.k_meta() + 4 * (slot + i), &k_meta, 4);
      memcpy(page + layout.v_meta() + 4 * (slot + i), &v_meta, 4);
    }
    pack_keys<D>(codes[0], codes[1], two, page + layout.k_word(slot, 0));
    alignas(64) uint32_t words[kPadded / 4];
    for (int w = 0; w < kWords; w += kLanes) {
      const u32 even = pack_value(codes[2] + 4 * w);
      store(words + w, two ? even | pack_value(codes[3] + 4 * w) << 16 : even);
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
