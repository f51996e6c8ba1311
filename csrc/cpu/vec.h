// Sixteen-lane vectors in GCC's vector extensions: the compiler lowers them to what the flags of the translation unit
// allow. `Generic` is the plain C++ ISA; avx2.cpp and avx512.cpp derive from it and replace what they do better.
//
// Everything lies in an unnamed namespace: each ISA has its own copy, and the linker must not hand one ISA's
// instructions to another.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "api.h"

#define WKV_INLINE inline __attribute__((always_inline))

namespace {

using f32 = float __attribute__((vector_size(64)));
using i32 = int32_t __attribute__((vector_size(64)));
using u32 = uint32_t __attribute__((vector_size(64)));
using u16 = uint16_t __attribute__((vector_size(32)));
using i16 = int16_t __attribute__((vector_size(32)));
using u8 = uint8_t __attribute__((vector_size(16)));

constexpr int kLanes = wkvquant::kLanes;

template <class V>
WKV_INLINE V load(const void* p) {
  V v;
  memcpy(&v, p, sizeof v);
  return v;
}
template <class V>
WKV_INLINE void store(void* p, V v) {
  memcpy(p, &v, sizeof v);
}
WKV_INLINE f32 splat(float x) { return x - f32{}; }
WKV_INLINE i32 lane_index() { return i32{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}; }

// Nearest integer, ties to even, for |x| < 2^22: the sum with 1.5 * 2^23 has no fraction bits.
WKV_INLINE i32 round_int(f32 x) {
  const f32 magic = splat(12582912.0f);
  return (i32)(x + magic) - (i32)magic;
}

// 2^x to 2e-7 relative; what is below 2^-100, a hidden token's 2^-inf too, becomes that. Comparisons stay out of the
// generic code where they can: GCC takes a 64-byte one apart lane by lane without AVX-512.
template <class Isa>
WKV_INLINE f32 exp2_vec(f32 x) {
  const f32 clamped = Isa::max(splat(-100.0f), x);  // the second, where that is NaN
  const f32 magic = splat(12582912.0f);
  const f32 shifted = clamped + magic;
  const f32 f = clamped - (shifted - magic);
  f32 y = splat(1.5403530e-4f);
  y = y * f + 1.3333558e-3f;
  y = y * f + 9.6181291e-3f;
  y = y * f + 5.5504109e-2f;
  y = y * f + 2.4022651e-1f;
  y = y * f + 6.9314718e-1f;
  y = y * f + 1.0f;
  return (f32)((i32)y + (((i32)shifted) << 23));
}

// Sine and cosine of turn / 2^32 turns, to 1e-7 absolute. The quadrant is taken off in integers, so nothing is lost;
// polynomials from Cephes' sinf and cosf.
WKV_INLINE void sincos_turn(u32 turn, f32& sine, f32& cosine) {
  const u32 quadrant = (turn + (1u << 29)) >> 30;
  const f32 x = __builtin_convertvector((i32)(turn - (quadrant << 30)), f32) * 1.46291807926715968e-9f;
  const f32 z = x * x;
  const f32 s = x + x * z * (-1.6666654611e-1f + z * (8.3321608736e-3f + z * -1.9515295891e-4f));
  const f32 c =
      1.0f - 0.5f * z + z * z * (4.166664568298827e-2f + z * (-1.388731625493765e-3f + z * 2.443315711809948e-5f));
  const u32 swap = -(quadrant & 1);
  sine = (f32)((((u32)c & swap) | ((u32)s & ~swap)) ^ ((quadrant & 2) << 30));
  cosine = (f32)((((u32)s & swap) | ((u32)c & ~swap)) ^ (((quadrant + 1) & 2) << 30));
}

struct Generic {
  // A register of columns in a product of floats, and how many of them stay in registers beside four rows.
  using Column = float __attribute__((vector_size(16)));
  using Doubles = double __attribute__((vector_size(16)));
  static constexpr int kColumns = 2;

  static WKV_INLINE f32 max(f32 a, f32 b) { return a > b ? a : b; }
  static WKV_INLINE f32 min(f32 a, f32 b) { return a < b ? a : b; }

  static WKV_INLINE float reduce_add(f32 x) {
    float sum = 0;
    for (int i = 0; i < kLanes; ++i) sum += x[i];
    return sum;
  }
  static WKV_INLINE float reduce_max(f32 x) {
    float m = x[0];
    for (int i = 1; i < kLanes; ++i) m = x[i] > m ? x[i] : m;
    return m;
  }
  static WKV_INLINE float reduce_min(f32 x) { return -reduce_max(-x); }

  // fp16 in the low half of each lane, the high half zero. Infinities and NaN are none of a page's values.
  static WKV_INLINE f32 from_half(u32 h) {
    const f32 magnitude = (f32)((h & 0x7fff) << 13) * 0x1p112f;
    return (f32)((u32)magnitude | ((h & 0x8000) << 16));
  }
  static WKV_INLINE uint16_t to_half(float x) {
    uint32_t u;
    memcpy(&u, &x, 4);
    const uint32_t sign = u >> 16 & 0x8000;
    u &= 0x7fffffff;
    if (u > 0x7f800000) return sign | 0x7e00;
    if (u >= 0x47800000) return sign | 0x7c00;
    if (u < 0x38800000) {  // below the normal range: adding 0.5 rounds to its last place, 2^-24
      float f;
      memcpy(&f, &u, 4);
      f += 0.5f;
      memcpy(&u, &f, 4);
      return sign | (u - 0x3f000000);
    }
    return sign | (u + 0xc8000fff + (u >> 13 & 1)) >> 13;
  }
  static WKV_INLINE f32 load_half(const void* p) {
    const u32 h = __builtin_convertvector(load<u16>(p), u32);
    // The inputs of a step may hold infinities, unlike a page.
    const f32 x = from_half(h);
    return (h & 0x7c00) == 0x7c00 ? (f32)((u32)x | 0x7f800000) : x;
  }
  static WKV_INLINE void store_half(void* p, f32 x) {
    for (int i = 0; i < kLanes; ++i) {
      const uint16_t h = to_half(x[i]);
      memcpy(static_cast<char*>(p) + 2 * i, &h, 2);
    }
  }
  static WKV_INLINE f32 load_bfloat(const void* p) { return (f32)(__builtin_convertvector(load<u16>(p), u32) << 16); }
  static WKV_INLINE void store_bfloat(void* p, f32 x) {
    const u32 u = (u32)x;
    const u32 rounded = (u + 0x7fff + (u >> 16 & 1)) >> 16;
    store(p, __builtin_convertvector(x == x ? rounded : (u >> 16 | 0x40), u16));
  }
  static WKV_INLINE void store_shorts(void* p, i32 x) { store(p, __builtin_convertvector(x, i16)); }

  // Codes of D numbers.
  template <int D>
  static WKV_INLINE void encode(const float* row, float offset, float inverse, uint8_t* codes) {
    for (int i = 0; i < D; i += kLanes) {
      const f32 code = (load<f32>(row + i) - offset) * inverse;
      const f32 low = code > 0.0f ? code : f32{};
      store(codes + i, __builtin_convertvector(round_int(low < 15.0f ? low : splat(15.0f)), u8));
    }
  }

  // to[j][i] = from[i][j], 16 x 16.
  static WKV_INLINE void transpose(const float* from, int from_pitch, float* to, int to_pitch) {
    for (int i = 0; i < kLanes; ++i)
      for (int j = 0; j < kLanes; ++j) to[j * to_pitch + i] = from[i * from_pitch + j];
  }

  // The four inner butterflies of a Walsh-Hadamard transform.
  static WKV_INLINE f32 hadamard16(f32 x) {
    float y[kLanes];
    store(y, x);
    for (int stride = 1; stride < kLanes; stride *= 2) {
      float z[kLanes];
      for (int i = 0; i < kLanes; ++i) z[i] = i & stride ? y[i - stride] - y[i] : y[i] + y[i + stride];
      memcpy(y, z, sizeof y);
    }
    return load<f32>(y);
  }

  // dot[r] = sum_d code_d * q_rd of a tile's 16 tokens for R rows, exact.
  // k: K words [groups][16]; q: int8 quadruples [R][groups][4], stride dwords a row: high bytes of the even and odd
  // half of the group, then low bytes (q = 256 * high + low).
  template <int R>
  static WKV_INLINE void score_tile(const uint8_t* k, int groups, const int32_t* q, int stride, i32* dot) {
    for (int r = 0; r < R; ++r) dot[r] = i32{};
    for (int g = 0; g < groups; ++g) {
      const i32 word = load<i32>(k + 64 * g);
      for (int half = 0; half < 2; ++half)
        for (int b = 0; b < 4; ++b) {
          const i32 code = (word >> (8 * b + 4 * half)) & 15;
          for (int r = 0; r < R; ++r) {
            const int8_t* row = reinterpret_cast<const int8_t*>(q + r * stride + 4 * g);
            dot[r] += code * (256 * row[4 * half + b] + row[8 + 4 * half + b]);
          }
        }
    }
  }

  // acc[r][k] += sum_t w_rt * code_t of dimensions 4 * lane + k, over the token pairs of `tiles` tiles, for R rows.
  // v: pointers to 16 V words of each tile's first pair; pitch: bytes from a pair to the next; w: int16 weights
  // [R][stride], 16 a tile.
  template <int R>
  static WKV_INLINE void accumulate(const uint8_t* const* v, int64_t column, int tiles, int pitch, const int16_t* w,
                                    int stride, i32 (*acc)[4]) {
    for (int tile = 0; tile < tiles; ++tile)
      for (int pair = 0; pair < 8; ++pair) {
        const u32 word = load<u32>(v[tile] + column + pair * pitch);
        for (int k = 0; k < 4; ++k) {
          const i32 even = (i32)((word >> (4 * k)) & 15), odd = (i32)((word >> (4 * k + 16)) & 15);
          for (int r = 0; r < R; ++r) {
            const int16_t* row = w + r * stride + 16 * tile + 2 * pair;
            acc[r][k] += even * row[0] + odd * row[1];
          }
        }
      }
  }
};

// One row of `n` numbers (a multiple of 16) as fp32.
template <class Isa>
WKV_INLINE void load_row(const void* base, int dtype, int64_t offset, int n, float* row) {
  if (dtype == kFloat32) {
    memcpy(row, static_cast<const float*>(base) + offset, n * sizeof(float));
    return;
  }
  const uint16_t* p = static_cast<const uint16_t*>(base) + offset;
  if (dtype == kBFloat16)
    for (int i = 0; i < n; i += kLanes) store(row + i, Isa::load_bfloat(p + i));
  else
    for (int i = 0; i < n; i += kLanes) store(row + i, Isa::load_half(p + i));
}

template <class Isa>
WKV_INLINE void store_row(void* base, int dtype, int64_t offset, int n, const float* row) {
  if (dtype == kFloat32) {
    memcpy(static_cast<float*>(base) + offset, row, n * sizeof(float));
    return;
  }
  uint16_t* p = static_cast<uint16_t*>(base) + offset;
  if (dtype == kBFloat16)
    for (int i = 0; i < n; i += kLanes) Isa::store_bfloat(p + i, load<f32>(row + i));
  else
    for (int i = 0; i < n; i += kLanes) Isa::store_half(p + i, load<f32>(row + i));
}

// Unnormalized Walsh-Hadamard transform of N vectors (N * 16 numbers) in registers.
template <class Isa, int N>
WKV_INLINE void hadamard(f32* x) {
  for (int i = 0; i < N; ++i) x[i] = Isa::hadamard16(x[i]);
#pragma GCC unroll 4
  for (int stride = 1; stride < N; stride *= 2)
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i)
      if (!(i & stride)) {
        const f32 a = x[i], b = x[i + stride];
        x[i] = a + b;
        x[i + stride] = a - b;
      }
}

}  // namespace
