// AVX2, FMA and F16C. A 64-byte vector is two registers; products of bytes go through pmaddubsw.
#include <immintrin.h>

#include "attention.h"
#include "cache_write.h"

namespace {

struct Avx2 : Generic {
  using Column = float __attribute__((vector_size(32)));
  using Doubles = double __attribute__((vector_size(32)));
  static constexpr int kColumns = 2;

  struct Halves {
    __m256 lo, hi;
  };
  static WKV_INLINE Halves split(f32 x) {
    Halves h;
    memcpy(&h, &x, sizeof h);
    return h;
  }
  static WKV_INLINE f32 join(__m256 lo, __m256 hi) {
    const Halves h{lo, hi};
    return load<f32>(&h);
  }

  static WKV_INLINE f32 max(f32 a, f32 b) {
    const Halves x = split(a), y = split(b);
    return join(_mm256_max_ps(x.lo, y.lo), _mm256_max_ps(x.hi, y.hi));
  }
  static WKV_INLINE f32 min(f32 a, f32 b) {
    const Halves x = split(a), y = split(b);
    return join(_mm256_min_ps(x.lo, y.lo), _mm256_min_ps(x.hi, y.hi));
  }
  static WKV_INLINE float reduce_add(f32 x) {
    const Halves h = split(x);
    const __m256 a = _mm256_add_ps(h.lo, h.hi);
    __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    b = _mm_add_ps(b, _mm_movehl_ps(b, b));
    return _mm_cvtss_f32(_mm_add_ss(b, _mm_movehdup_ps(b)));
  }
  static WKV_INLINE float reduce_max(f32 x) {
    const Halves h = split(x);
    const __m256 a = _mm256_max_ps(h.lo, h.hi);
    __m128 b = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    b = _mm_max_ps(b, _mm_movehl_ps(b, b));
    return _mm_cvtss_f32(_mm_max_ss(b, _mm_movehdup_ps(b)));
  }
  static WKV_INLINE float reduce_min(f32 x) { return -reduce_max(-x); }

  static WKV_INLINE f32 load_half(const void* p) {
    const __m128i* h = static_cast<const __m128i*>(p);
    return join(_mm256_cvtph_ps(_mm_loadu_si128(h)), _mm256_cvtph_ps(_mm_loadu_si128(h + 1)));
  }
  static WKV_INLINE void store_half(void* p, f32 x) {
    const Halves h = split(x);
    _mm_storeu_si128(static_cast<__m128i*>(p), _mm256_cvtps_ph(h.lo, _MM_FROUND_TO_NEAREST_INT));
    _mm_storeu_si128(static_cast<__m128i*>(p) + 1, _mm256_cvtps_ph(h.hi, _MM_FROUND_TO_NEAREST_INT));
  }

  static WKV_INLINE f32 load_bfloat(const void* p) {
    const __m128i* b = static_cast<const __m128i*>(p);
    const auto widen = [](__m128i x) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16)); };
    return join(widen(_mm_loadu_si128(b)), widen(_mm_loadu_si128(b + 1)));
  }
  static WKV_INLINE __m256i narrow(__m256i lo, __m256i hi) {
    return _mm256_permute4x64_epi64(_mm256_packs_epi32(lo, hi), 0xd8);
  }
  static WKV_INLINE void store_shorts(void* p, i32 x) {
    const Halves h = split((f32)x);
    _mm256_storeu_si256(static_cast<__m256i*>(p), narrow(_mm256_castps_si256(h.lo), _mm256_castps_si256(h.hi)));
  }
  template <int D>
  static WKV_INLINE void encode(const float* row, float offset, float inverse, uint8_t* codes) {
    const __m256 shift = _mm256_set1_ps(offset), factor = _mm256_set1_ps(inverse), top = _mm256_set1_ps(15.0f);
    const auto code = [&](int i) {
      const __m256 x = _mm256_mul_ps(_mm256_sub_ps(_mm256_loadu_ps(row + i), shift), factor);
      return _mm256_cvtps_epi32(_mm256_min_ps(x, top));
    };
    for (int i = 0; i < D; i += kLanes) {
      const __m256i shorts = narrow(code(i), code(i + 8));
      const __m128i bytes = _mm_packus_epi16(_mm256_castsi256_si128(shorts), _mm256_extracti128_si256(shorts, 1));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + i), bytes);
    }
  }

  static WKV_INLINE __m256 hadamard8(__m256 x) {
    const __m256 s1 = _mm256_setr_ps(1, -1, 1, -1, 1, -1, 1, -1), s2 = _mm256_setr_ps(1, 1, -1, -1, 1, 1, -1, -1);
    const __m256 s4 = _mm256_setr_ps(1, 1, 1, 1, -1, -1, -1, -1);
    x = _mm256_fmadd_ps(x, s1, _mm256_permute_ps(x, 0xb1));
    x = _mm256_fmadd_ps(x, s2, _mm256_permute_ps(x, 0x4e));
    return _mm256_fmadd_ps(x, s4, _mm256_permute2f128_ps(x, x, 1));
  }
  static WKV_INLINE f32 hadamard16(f32 x) {
    const Halves h = split(x);
    return join(hadamard8(_mm256_add_ps(h.lo, h.hi)), hadamard8(_mm256_sub_ps(h.lo, h.hi)));
  }

  // A pmaddubsw lane is at most 2 * 15 * 128 = 3840 in magnitude: eight of them fit 16 bits before they are widened.
  template <int R>
  static WKV_INLINE void score_tile(const uint8_t* k, int groups, const int32_t* q, int stride, i32* dot) {
    const __m256i mask = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
    for (int half = 0; half < 2; ++half)
      for (int r = 0; r < R; ++r) {
        const int32_t* row = q + r * stride;
        __m256i high = _mm256_setzero_si256(), low = high;
        for (int begin = 0; begin < groups; begin += 4) {
          __m256i h16 = _mm256_setzero_si256(), l16 = h16;
          for (int g = begin; g < begin + 4 && g < groups; ++g) {
            const __m256i w = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(k + 64 * g + 32 * half));
            const __m256i even = _mm256_and_si256(w, mask), odd = _mm256_and_si256(_mm256_srli_epi32(w, 4), mask);
            h16 = _mm256_add_epi16(h16, _mm256_maddubs_epi16(even, _mm256_set1_epi32(row[4 * g])));
            h16 = _mm256_add_epi16(h16, _mm256_maddubs_epi16(odd, _mm256_set1_epi32(row[4 * g + 1])));
            l16 = _mm256_add_epi16(l16, _mm256_maddubs_epi16(even, _mm256_set1_epi32(row[4 * g + 2])));
            l16 = _mm256_add_epi16(l16, _mm256_maddubs_epi16(odd, _mm256_set1_epi32(row[4 * g + 3])));
          }
          high = _mm256_add_epi32(high, _mm256_madd_epi16(h16, ones));
          low = _mm256_add_epi32(low, _mm256_madd_epi16(l16, ones));
        }
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(dot + r) + half,
                            _mm256_add_epi32(_mm256_slli_epi32(high, 8), low));
      }
  }

  template <int R>
  static WKV_INLINE void accumulate(const uint8_t* const* v, int64_t column, int tiles, int pitch, const int16_t* w,
                                    int stride, i32 (*acc)[4]) {
    const __m256i mask = _mm256_set1_epi32(0x000f000f);
    for (int half = 0; half < 2; ++half)
      for (int r = 0; r < R; ++r) {
        __m256i sum[4];
        for (int k = 0; k < 4; ++k) sum[k] = _mm256_loadu_si256(reinterpret_cast<__m256i*>(&acc[r][k]) + half);
        for (int tile = 0; tile < tiles; ++tile)
          for (int pair = 0; pair < 8; ++pair) {
            const uint8_t* p = v[tile] + column + pair * pitch + 32 * half;
            const __m256i word = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
            int32_t weights;
            memcpy(&weights, w + r * stride + 16 * tile + 2 * pair, 4);
            const __m256i weight = _mm256_set1_epi32(weights);
            for (int k = 0; k < 4; ++k) {
              const __m256i codes = _mm256_and_si256(_mm256_srli_epi32(word, 4 * k), mask);
              sum[k] = _mm256_add_epi32(sum[k], _mm256_madd_epi16(codes, weight));
            }
          }
        for (int k = 0; k < 4; ++k) _mm256_storeu_si256(reinterpret_cast<__m256i*>(&acc[r][k]) + half, sum[k]);
      }
  }
};

}  // namespace

const wkvquant::Kernels& wkvquant::avx2_kernels() {
  static const Kernels kernels{cache_write<Avx2>, paged_attention<Avx2>};
  return kernels;
}
