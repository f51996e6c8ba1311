// Rows of an item: the query as operands, coefficients of the shift, and the step's own tokens.
#pragma once

#include "attention_kernel.cuh"

namespace wkvquant {

// Query rows as operands, coefficients of the shift, and the step's own tokens. Each warp calls when_loaded() once its
// first row is here.
template <int D, int NT>
template <class T, class F>
__device__ void Kernel<D, NT>::prepare_rows(bool with_current, const F& when_loaded) {
  constexpr int N = groups_of_lane(D), kSlots = (D / 2 + 8 + 31) / 32;
  const bool active = lane < D / 4;
  rows = min(item.queries * group - item.tile * kRows, kRows);
  const int64_t of_head = item.head * D + 4 * lane;  // in [heads, D]
  const T* keys = static_cast<const T*>(a.key) + item.query * a.key_stride[0] + item.head * a.key_stride[1] + 4 * lane;
  const T* values =
      static_cast<const T*>(a.value) + item.query * a.value_stride[0] + item.head * a.value_stride[1] + 4 * lane;
  const auto load_row = [&](const T* row, float (&to)[4 * N]) {
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (active) load4(row + 128 * i, to + 4 * i);
  };
  static_assert(S::kThreads >= D);
  const float v_shift = threadIdx.x < D ? p.v_shift[item.head * D + threadIdx.x] : 0;
#pragma unroll 1
  for (int r = warp; r < kRows; r += kWarps) {
    if (r >= rows) {
      if (r == warp) when_loaded();
      if (lane < D / 8) s.query[r * (D / 8) + lane] = {0, 0, 0, 0};
      for (int i = lane; i < slots; i += 32) s.ab[r * (slots + 4) + i] = {0, 0};
      if (lane == 0) {
        s.row[r] = {0, 0, 0, 0}, s.current_sum[r] = 0;
        s.current_max[r] = s.first_score[r] = kLowest, s.first_extra[r] = 0;
      }
      continue;
    }
    const int row = item.tile * kRows + r, own = row / group, head = item.head * group + row % group;
    float raw[4 * N] = {}, x[4 * N] = {}, key[4 * N] = {}, out[4 * N] = {}, shift[4 * N] = {}, more[4 * N] = {};
    int slot[kSlots];
    float2 slot_shift[kSlots], ab[kSlots];
    load_row(
        static_cast<const T*>(a.query) + (item.query + own) * a.query_stride[0] + head * a.query_stride[1] + 4 * lane,
        raw);
    if (with_current) {
      load_row(keys + own * a.key_stride[0], key);
      load_row(values + own * a.value_stride[0], out);
    }
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (!active) continue;
      load4(p.query_scale + of_head + 128 * i, x + 4 * i);
      if (4 * lane + 128 * i + 3 >= 2 * p.rotary_pairs) load4(p.k_shift + of_head + 128 * i, shift + 4 * i);
      if (p.k_extra) load4(p.k_extra + of_head + 128 * i, more + 4 * i);
    }
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
      const bool used = lane + 32 * i < slots;
      slot[i] = used ? p.slots[lane + 32 * i] : 0;
      slot_shift[i] = used ? p.slot_shift[item.head * slots + lane + 32 * i] : float2{0, 0};
    }
    // scores of the step's own token, of the part of the shift that does not rotate, and of what position 0 has more
    float high = 0, fixed = 0, extra = 0, size = 0, largest = 0, together = 0;
    float* saved = s.raw + r * D + 4 * lane;
#pragma unroll
    for (int i = 0; i < 4 * N; ++i) {
      raw[i] *= a.scale * kLog2e;
      x[i] *= raw[i];
      high += raw[i] * key[i];
      extra += raw[i] * more[i];
      if (4 * lane + 128 * (i / 4) + i % 4 >= 2 * p.rotary_pairs) fixed += raw[i] * shift[i];
    }
    const auto save = [&](const float (&from)[4 * N]) {
#pragma unroll
      for (int i = 0; i < N; ++i)
        if (active)
          *reinterpret_cast<float4*>(saved + 128 * i) = {from[4 * i], from[4 * i + 1], from[4 * i + 2],
                                                         from[4 * i + 3]};
    };
    save(raw);
    __syncwarp();
    if (r == warp) when_loaded();
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
      const float u = s.raw[r * D + slot[i]], v = s.raw[r * D + slot[i] + p.rotary_pairs];
      ab[i] = {u * slot_shift[i].x + v * slot_shift[i].y, v * slot_shift[i].x - u * slot_shift[i].y};
      size += fabsf(ab[i].x) + fabsf(ab[i].y);
    }
    if (p.hadamard) hadamard_groups<D>(x, lane);
#pragma unroll
    for (int i = 0; i < 4 * N; ++i) largest = fmaxf(largest, fabsf(x[i]));
    const int e = scale_exponent(__int_as_float(__reduce_max_sync(kFull, __float_as_int(largest))));
    const float unit = power_of_two(-e), back = lane % 2 ? 16.0f : 1.0f;  // dimensions 4 .. 7 of a word: over 16
#pragma unroll
    for (int i = 0; i < N; ++i) {
      __half h[4];
#pragma unroll
      for (int b = 0; b < 4; ++b) {
        h[b] = __float2half_rn(x[4 * i + b] * (lane % 2 ? unit * 0.0625f : unit));
        together += __half2float(h[b]) * back;
      }
      if (!active) continue;
      __half2* word = reinterpret_cast<__half2*>(s.query + r * (D / 8) + lane / 2 + 16 * i) + lane % 2;
      word[0] = __halves2half2(h[0], h[2]), word[2] = __halves2half2(h[1], h[3]);
    }
    together = warp_sum(together), size = warp_sum(size);
    high = warp_sum(high), fixed = warp_sum(fixed), extra = warp_sum(extra);
    const int f = scale_exponent(size);
    const float shrink = power_of_two(-f);
#pragma unroll
    for (int i = 0; i < kSlots; ++i)
      if (lane + 32 * i < slots) s.ab[r * (slots + 4) + lane + 32 * i] = {ab[i].x * shrink, ab[i].y * shrink};
    float weight = 1;
    if (with_current)
      for (int j = a.sliding_window ? max(own - a.sliding_window + 1, 0) : 0; j < own; ++j) {
        float other[4 * N] = {}, value[4 * N] = {}, score = 0;
        load_row(keys + j * a.key_stride[0], other);
        load_row(values + j * a.value_stride[0], value);
#pragma unroll
        for (int i = 0; i < 4 * N; ++i) score += raw[i] * other[i];
        score = warp_sum(score);
        const float next = fmaxf(high, score), keep = exp2_fast(high - next), take = exp2_fast(score - next);
        high = next;
        weight = weight * keep + take;
#pragma unroll
        for (int i = 0; i < 4 * N; ++i) out[i] = out[i] * keep + take * value[i];
      }
    __syncwarp();
    save(out);
    if (lane == 0) {
      s.row[r] = {power_of_two(e + 24), together * power_of_two(e), power_of_two(f), fixed};
      s.first_extra[r] = extra, s.first_score[r] = kLowest;
      s.current_max[r] = with_current ? high : kLowest, s.current_sum[r] = with_current ? weight : 0;
    }
  }
  if (threadIdx.x < D) s.v_shift[threadIdx.x] = v_shift;
}

template <int D, int NT>
__device__ void Kernel<D, NT>::start_rows() {
  if constexpr (S::kQueryInRegisters) {
#pragma unroll
    for (int n = 0; n < NT; ++n)
#pragma unroll
      for (int j = 0; j < S::kKWords; ++j) {
        const uint4 w = s.query[(8 * n + g) * (D / 8) + t + 4 * j];
        q[n][j][0] = w.x, q[n][j][1] = w.y, q[n][j][2] = w.z, q[n][j][3] = w.w;
      }
  }
#pragma unroll
  for (int n = 0; n < NT; ++n)
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      top[n][c] = kLowest, sum[n][c] = 0, min_sum[n][c] = 0;
    }
#pragma unroll
  for (int m = 0; m < S::kMTiles; ++m)
#pragma unroll
    for (int n = 0; n < NT; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) acc[m][n][i] = 0;
}

}  // namespace wkvquant
