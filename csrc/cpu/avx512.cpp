// AVX-512 F, BW, VL, DQ and VNNI. A 64-byte vector is one register: K words of a tile's 16 tokens, or 16 V words.
#include <immintrin.h>

#include "attention.h"
#include "cache_write.h"

namespace {

struct Avx512 : Generic {
  using Column = f32;
  using Doubles = double __attribute__((vector_size(64)));
  static constexpr int kColumns = 4;

  static WKV_INLINE f32 max(f32 a, f32 b) { return (f32)_mm512_max_ps((__m512)a, (__m512)b); }
  static WKV_INLINE f32 min(f32 a, f32 b) { return (f32)_mm512_min_ps((__m512)a, (__m512)b); }
  static WKV_INLINE float reduce_add(f32 x) { return _mm512_reduce_add_ps((__m512)x); }
  static WKV_INLINE float reduce_max(f32 x) { return _mm512_reduce_max_ps((__m512)x); }
  static WKV_INLINE float reduce_min(f32 x) { return _mm512_reduce_min_ps((__m512)x); }

  static WKV_INLINE f32 from_half(u32 h) { return (f32)_mm512_cvtph_ps(_mm512_cvtepi32_epi16((__m512i)h)); }
  static WKV_INLINE f32 load_half(const void* p) {
    return (f32)_mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(p)));
  }
  static WKV_INLINE void store_half(void* p, f32 x) {
    _mm256_storeu_si256(static_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT));
  }
  static WKV_INLINE void store_shorts(void* p, i32 x) {
    _mm256_storeu_si256(static_cast<__m256i*>(p), _mm512_cvtepi32_epi16((__m512i)x));
  }

  // Four vectors at a time: the packs saturate what is below zero, and one store of 64 bytes forwards to the loads that
  // follow, which four narrowing stores do not.
  template <int D>
  static WKV_INLINE void encode(const float* row, float offset, float inverse, uint8_t* codes) {
    const __m512 shift = _mm512_set1_ps(offset), factor = _mm512_set1_ps(inverse), top = _mm512_set1_ps(15.0f);
    const auto code = [&](int i) {
      const __m512 x = _mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(row + i), shift), factor);
      return _mm512_cvtps_epi32(_mm512_min_ps(x, top));
    };
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    int i = 0;
    for (; i + 64 <= D; i += 64) {
      const __m512i a = _mm512_packs_epi32(code(i), code(i + 16)), b = _mm512_packs_epi32(code(i + 32), code(i + 48));
      _mm512_storeu_si512(codes + i, _mm512_permutexvar_epi32(order, _mm512_packus_epi16(a, b)));
    }
    for (; i < D; i += kLanes) {
      const __m128i bytes = _mm512_cvtusepi32_epi8(_mm512_max_epi32(code(i), _mm512_setzero_si512()));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + i), bytes);
    }
  }

  static WKV_INLINE void transpose(const float* from, int from_pitch, float* to, int to_pitch) {
    __m512 a[16], b[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_ps(from + i * from_pitch);
#pragma GCC unroll 16
    for (int i = 0; i < 16; i += 2) {
      b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
      b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {  // a[i + c]: column 4 lane + c of rows i .. i + 3
      a[i] = _mm512_shuffle_ps(b[i], b[i + 2], 0x44);
      a[i + 1] = _mm512_shuffle_ps(b[i], b[i + 2], 0xee);
      a[i + 2] = _mm512_shuffle_ps(b[i + 1], b[i + 3], 0x44);
      a[i + 3] = _mm512_shuffle_ps(b[i + 1], b[i + 3], 0xee);
    }
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
      const __m512 even01 = _mm512_shuffle_f32x4(a[c], a[4 + c], 0x88),
                   odd01 = _mm512_shuffle_f32x4(a[c], a[4 + c], 0xdd);
      const __m512 even23 = _mm512_shuffle_f32x4(a[8 + c], a[12 + c], 0x88);
      const __m512 odd23 = _mm512_shuffle_f32x4(a[8 + c], a[12 + c], 0xdd);
      _mm512_storeu_ps(to + c * to_pitch, _mm512_shuffle_f32x4(even01, even23, 0x88));
      _mm512_storeu_ps(to + (4 + c) * to_pitch, _mm512_shuffle_f32x4(odd01, odd23, 0x88));
      _mm512_storeu_ps(to + (8 + c) * to_pitch, _mm512_shuffle_f32x4(even01, even23, 0xdd));
      _mm512_storeu_ps(to + (12 + c) * to_pitch, _mm512_shuffle_f32x4(odd01, odd23, 0xdd));
    }
  }

  // Butterfly as x * (1 or -1) + partner: shuffles, adds and multiply-adds have different ports.
  static WKV_INLINE f32 hadamard16(f32 v) {
    const __m512 one = _mm512_set1_ps(1.0f), minus = _mm512_set1_ps(-1.0f);
    __m512 x = (__m512)v;
    x = _mm512_fmadd_ps(x, _mm512_mask_blend_ps(0xaaaa, one, minus), _mm512_permute_ps(x, 0xb1));
    x = _mm512_fmadd_ps(x, _mm512_mask_blend_ps(0xcccc, one, minus), _mm512_permute_ps(x, 0x4e));
    x = _mm512_fmadd_ps(x, _mm512_mask_blend_ps(0xf0f0, one, minus), _mm512_shuffle_f32x4(x, x, 0xb1));
    return (f32)_mm512_fmadd_ps(x, _mm512_mask_blend_ps(0xff00, one, minus), _mm512_shuffle_f32x4(x, x, 0x4e));
  }

  // As assembly because GCC 12 copies every accumulator of the intrinsics' loops twice an iteration, which fills the
  // front end; the broadcast folded into the load is one instruction less, too.
  static WKV_INLINE void dot_bytes(__m512i& acc, __m512i codes, const int32_t& q) {
    asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(acc) : "v"(codes), "m"(q));
  }
  static WKV_INLINE void dot_shorts(__m512i& acc, __m512i codes, __m512i weight) {
    asm("vpdpwssd %2, %1, %0" : "+v"(acc) : "v"(codes), "v"(weight));
  }

  template <int R>
  static WKV_INLINE void score_tile(const uint8_t* k, int groups, const int32_t* q, int stride, i32* dot) {
    const __m512i mask = _mm512_set1_epi8(15);
    __m512i high[R], low[R];
    for (int r = 0; r < R; ++r) high[r] = low[r] = _mm512_setzero_si512();
#pragma GCC unroll 2
    for (int g = 0; g < groups; ++g) {
      const __m512i word = _mm512_loadu_si512(k + 64 * g);
      const __m512i even = _mm512_and_si512(word, mask);
      const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(word, 4), mask);
      for (int r = 0; r < R; ++r) {
        const int32_t* row = q + r * stride + 4 * g;
        dot_bytes(high[r], even, row[0]);
        dot_bytes(low[r], even, row[2]);
        dot_bytes(high[r], odd, row[1]);
        dot_bytes(low[r], odd, row[3]);
      }
    }
    for (int r = 0; r < R; ++r) dot[r] = (i32)_mm512_add_epi32(_mm512_slli_epi32(high[r], 8), low[r]);
  }

  template <int R>
  static WKV_INLINE void accumulate(const uint8_t* const* v, int64_t column, int tiles, int pitch, const int16_t* w,
                                    int stride, i32 (*acc)[4]) {
    const __m512i mask = _mm512_set1_epi32(0x000f000f);
    __m512i sum[R][4];
    for (int r = 0; r < R; ++r)
      for (int k = 0; k < 4; ++k) sum[r][k] = (__m512i)acc[r][k];
    for (int tile = 0; tile < tiles; ++tile) {
      const uint8_t* p = v[tile] + column;
      const int16_t* weights = w + 16 * tile;
#pragma GCC unroll 2
      for (int pair = 0; pair < 8; ++pair) {
        const __m512i word = _mm512_loadu_si512(p + pair * pitch);
        const __m512i codes[4] = {_mm512_and_si512(word, mask), _mm512_and_si512(_mm512_srli_epi32(word, 4), mask),
                                  _mm512_and_si512(_mm512_srli_epi32(word, 8), mask),
                                  _mm512_and_si512(_mm512_srli_epi32(word, 12), mask)};
        for (int r = 0; r < R; ++r) {
          int32_t two;
          memcpy(&two, weights + r * stride + 2 * pair, 4);
          const __m512i weight = _mm512_set1_epi32(two);
          for (int k = 0; k < 4; ++k) dot_shorts(sum[r][k], codes[k], weight);
        }
      }
    }
    for (int r = 0; r < R; ++r)
      for (int k = 0; k < 4; ++k) acc[r][k] = (i32)sum[r][k];
  }
};

}  // namespace

const wkvquant::Kernels& wkvquant::avx512_kernels() {
  static const Kernels kernels{cache_write<Avx512>, paged_attention<Avx512>};
  return kernels;
}
