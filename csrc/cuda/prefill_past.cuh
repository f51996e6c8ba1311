// A unit of past tokens: codes and shift to scores, to weights, to the output; and the end of a tile.
#pragma once

#include "prefill_kernel.cuh"

namespace wkvquant {

// (scale, minimum) of tokens 8t .. 8t + 7.
template <int D>
__device__ __forceinline__ void Prefill<D>::load_meta(const char* from, uint32_t (&to)[8]) const {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint4 x = reinterpret_cast<const uint4*>(from)[2 * t + i];
    to[4 * i] = x.x, to[4 * i + 1] = x.y, to[4 * i + 2] = x.z, to[4 * i + 3] = x.w;
  }
}

template <int D>
__device__ __forceinline__ void Prefill<D>::scores(const char* from, float (&c)[2][4][4]) const {
  constexpr uint32_t kLow = 0x000f000f, kHigh = 0x00f000f0;
  const uint4* query = s.query + warp * (D / 16 * 64) + lane;
#pragma unroll
  for (int m = 0; m < 2; ++m)
#pragma unroll
    for (int x = 0; x < 4; ++x)
#pragma unroll
      for (int i = 0; i < 4; ++i) c[m][x][i] = 0;
#pragma unroll
  for (int j = 0; j < kWords; ++j) {
    const uint4 words = *reinterpret_cast<const uint4*>(from + (t + 4 * j) * S::kKStride + g * 16);
    const uint32_t k[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (int u = 0; u < 2; ++u) {
      uint4 q[2];
#pragma unroll
      for (int m = 0; m < 2; ++m) q[m] = query[(m * (D / 16) + 2 * j + u) * 32];
#pragma unroll
      for (int x = 0; x < 4; ++x)
#pragma unroll
        for (int m = 0; m < 2; ++m)
          mma(c[m][x], q[m].x, q[m].y, q[m].z, q[m].w, k[x] >> 8 * u & kLow, k[x] >> 8 * u & kHigh);
    }
  }
  uint32_t meta[8];
  load_meta(from + S::kMeta, meta);
#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int x = 0; x < 4; ++x) {
      const float2 token = __half22float2(*reinterpret_cast<const __half2*>(&meta[4 * i + x]));
      const float scale = token.x * 0x1p12f;
#pragma unroll
      for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int h = 0; h < 2; ++h) c[m][x][2 * h + i] = fmaf(c[m][x][2 * h + i], scale, token.y * total[2 * m + h]);
    }
}

// The basis is tabulated for the second half of the chunk. Cosines and even polynomials are the same in the first,
// sines and odd polynomials, the high halves of the coefficients, change sign, and tokens come in reverse order.
template <int D>
template <bool kMirror>
__device__ __forceinline__ void Prefill<D>::shift_scores(int group_of_basis, float (&c)[2][4][4]) const {
  constexpr uint32_t kSign = kMirror ? 0x80000000 : 0;
  const uint4* basis = s.basis + group_of_basis * (steps * 128) + (kMirror ? lane ^ 28 : lane);
  const uint4* coef = s.coef + warp * steps * 128 + lane;
  const auto load = [&](int at, uint4(&x)[2]) {
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      x[m] = coef[at + 32 * m];
      x[m].x ^= kSign, x[m].y ^= kSign, x[m].z ^= kSign, x[m].w ^= kSign;
    }
  };
  const auto add = [&](const uint4(&x)[2], const uint4(&y)[2]) {
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      const int from = kMirror ? 3 - n : n;
      const uint4 b = y[from / 2];
#pragma unroll
      for (int m = 0; m < 2; ++m)
        mma(c[m][n], x[m].x, x[m].y, x[m].z, x[m].w, from % 2 ? b.z : b.x, from % 2 ? b.w : b.y);
    }
  };
#pragma unroll 1
  for (int i = 0; i < steps; ++i) {
    uint4 x[2];
    const uint4* at = basis + i * 128;
    const uint4 high[2] = {at[0], at[64]};
    load(i * 128, x);
    add(x, high);
    if (low >> i & 1) {
      if (i >= p.plain_steps) {
        const uint4 rest[2] = {at[32], at[96]};
        add(x, rest);
      }
      load(i * 128 + 64, x);
      add(x, high);
    }
  }
}

// Scores to weights p * scale_v as operand A of the output's products; keeps the softmax state.
template <int D>
__device__ __forceinline__ void Prefill<D>::softmax(const char* from, int first, int start, int latest,
                                                    float (&c)[2][4][4], uint32_t (&weights)[2][2][4]) {
  uint32_t v[8];
  load_meta(from + S::kMeta + 4 * kUnit, v);
  if (first == 0 && p.k_extra && t == 0)
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h) c[m][0][2 * h] += s.first_extra[32 * warp + 16 * m + 8 * h + g];
  if (first + kUnit > item.past || first <= latest) {
    const int token = first + 8 * t, last = (item.tile * kRows + rows - 1) / group;
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if (token + i >= item.past || token + i < start) v[i] = 0;
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int hidden = latest - last + (item.tile * kRows + 32 * warp + 16 * m + 8 * h + g) / group;
#pragma unroll
        for (int i = 0; i < 8; ++i)
          if (token + i >= item.past || token + i <= hidden) c[m][i % 4][2 * h + i / 4] = -INFINITY;
      }
  }
  if (first == 0 && t == 0)
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h) s.first_score[32 * warp + 16 * m + 8 * h + g] = c[m][0][2 * h] * unit[2 * m + h];
  float next[4];
  bool changed = false;
#pragma unroll
  for (int m = 0; m < 2; ++m)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float x = fmaxf(c[m][0][2 * h], c[m][0][2 * h + 1]);
#pragma unroll
      for (int n = 1; n < 4; ++n) x = fmaxf(x, fmaxf(c[m][n][2 * h], c[m][n][2 * h + 1]));
#pragma unroll
      for (int i = 1; i < 4; i *= 2) x = fmaxf(x, __shfl_xor_sync(kFull, x, i));
      next[2 * m + h] = fmaxf(top[2 * m + h], fmaf(x, unit[2 * m + h], -kBoost));
      changed |= next[2 * m + h] != top[2 * m + h];
    }
  if (__any_sync(kFull, changed)) {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const float keep = exp2_fast(top[r] - next[r]);
      top[r] = next[r];
      sum[r] *= keep, min_sum[r] *= keep;
#pragma unroll
      for (int n = 0; n < S::kOutTiles; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i) acc[r / 2][n][r % 2 * 2 + i] *= keep;
    }
  }
#pragma unroll
  for (int k = 0; k < 4; ++k) {  // token pairs
    const uint32_t scales = __byte_perm(v[2 * k], v[2 * k + 1], 0x5410);
    const float low_of_first = __high2float(*reinterpret_cast<const __half2*>(&v[2 * k]));
    const float low_of_second = __high2float(*reinterpret_cast<const __half2*>(&v[2 * k + 1]));
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int n = k % 2 * 2, i = 2 * h + k / 2, r = 2 * m + h;
        const float one = exp2_fast(fmaf(c[m][n][i], unit[r], -top[r]));
        const float two = exp2_fast(fmaf(c[m][n + 1][i], unit[r], -top[r]));
        sum[r] += one, sum[r] += two;
        min_sum[r] = fmaf(one, low_of_first, min_sum[r]), min_sum[r] = fmaf(two, low_of_second, min_sum[r]);
        const __half2 weight = __hmul2(__floats2half2_rn(one, two), *reinterpret_cast<const __half2*>(&scales));
        weights[m][k / 2][k % 2 * 2 + h] = *reinterpret_cast<const uint32_t*>(&weight);
      }
  }
}

template <int N>
__device__ __forceinline__ void load_shared(const uint32_t* from, uint32_t (&to)[N]) {
  if constexpr (N == 4) {
    const uint4 x = *reinterpret_cast<const uint4*>(from);
    to[0] = x.x, to[1] = x.y, to[2] = x.z, to[3] = x.w;
  } else if constexpr (N == 2) {
    const uint2 x = *reinterpret_cast<const uint2*>(from);
    to[0] = x.x, to[1] = x.y;
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) to[i] = from[i];
  }
}

template <int D>
__device__ __forceinline__ void Prefill<D>::output(const char* from, const uint32_t (&weights)[2][2][4]) {
  constexpr uint32_t kLow = 0x000f000f, kHigh = 0x00f000f0;
  const uint32_t* at = reinterpret_cast<const uint32_t*>(from + S::kV + t * S::kVStride) + kWords * g;
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    uint32_t v[2][kWords];  // of two token pairs
#pragma unroll
    for (int i = 0; i < 2; ++i) load_shared<kWords>(at + (2 * k + i) * (D / 4), v[i]);
#pragma unroll
    for (int c = 0; c < kWords; ++c)
#pragma unroll
      for (int u = 0; u < 4; ++u) {
        const uint32_t mask = u % 2 ? kHigh : kLow, one = v[0][c] >> u / 2 * 8 & mask,
                       two = v[1][c] >> u / 2 * 8 & mask;
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          const uint32_t (&w)[4] = weights[m][k];
          mma(acc[m][4 * c + u], w[0], w[1], w[2], w[3], one, two);
        }
      }
  }
}

template <int D>
__device__ void Prefill<D>::finish() const {
  __syncwarp();  // scores of position 0
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    const int in_tile = 32 * warp + 8 * r + g, row = item.tile * kRows + in_tile;
    float all = sum[r], low_part = min_sum[r];
#pragma unroll
    for (int m = 1; m < 4; m *= 2) {
      all += __shfl_xor_sync(kFull, all, m);
      low_part += __shfl_xor_sync(kFull, low_part, m);
    }
    if (in_tile >= rows) continue;
    const int64_t token = item.query + row / group;
    const int head = item.head * group + row % group;
    if (t == 0 && a.lse)
      a.lse[token * a.lse_stride[0] + head * a.lse_stride[1]] = (top[r] + __log2f(all) + s.constant[in_tile]) * kLn2;
    const float inverse = all > 0 ? __fdividef(1, all) : 0, first = exp2_fast(s.first_score[in_tile] - top[r]);
    const int64_t at = token * a.out_stride[0] + head * a.out_stride[1];
#pragma unroll
    for (int i = 0; i < 2 * kWords; ++i) {
      const int d = 4 * (2 * kWords * t + i);
      const float4 shift = *reinterpret_cast<const float4*>(p.v_shift + item.head * D + d);
      float4 extra = {0, 0, 0, 0};
      if (p.v_extra) extra = *reinterpret_cast<const float4*>(p.v_extra + item.head * D + d);
      const auto value = [&](int u, float own, float more) {
        const float x = acc[r / 2][i % kWords * 4 + u][r % 2 * 2 + i / kWords] * (u % 2 ? 0x1p20f : 0x1p24f);
        return fmaf(first, more, fmaf(own, all, x + low_part));
      };
      store_row4(a.out, a.dtype, at + d,
                 {value(0, shift.x, extra.x), value(1, shift.y, extra.y), value(2, shift.z, extra.z),
                  value(3, shift.w, extra.w)},
                 inverse);
    }
  }
}

}  // namespace wkvquant
