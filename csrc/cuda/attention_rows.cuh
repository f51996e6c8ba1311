// Rows of an item: the query as operands, coefficients of the shift, and the step's own tokens.
#pragma once

#include "attention_kernel.cuh"

namespace wkvquant {

__device__ __forceinline__ float power_of_two(int e) { return __int_as_float((e + 127) << 23); }

// Power of two that brings x to [2^13, 2^14), as its exponent.
__device__ __forceinline__ int scale_exponent(float x) {
  return min(max((__float_as_int(x) >> 23) - (127 + 13), -80), 80);
}

// Query rows as operands, coefficients of the shift, and the step's own tokens. Each warp calls when_loaded() once its
// first row is here.
template <int D, int NT>
template <class T, class F>
__device__ void Kernel<D, NT>::prepare_rows(bool with_current, const F& when_loaded) {
  constexpr int N = D / 32, kBlock = D & -D;
  rows = min(item.queries * group - item.tile * kRows, kRows);
  const float* shift = p.k_shift + item.head * D;
  const T* keys = static_cast<const T*>(a.key) + item.query * a.key_stride[0] + item.head * a.key_stride[1] + lane;
  const T* values =
      static_cast<const T*>(a.value) + item.query * a.value_stride[0] + item.head * a.value_stride[1] + lane;
  for (int i = threadIdx.x; i < D; i += S::kThreads) s.v_shift[i] = p.v_shift[item.head * D + i];
#pragma unroll 1
  for (int r = warp; r < kRows; r += kWarps) {
    __half* operand = reinterpret_cast<__half*>(s.query + r * (D / 8));
    if (r >= rows) {
      if (r == warp) when_loaded();
      for (int i = lane; i < D; i += 32) operand[i] = __half();
      for (int i = lane; i < slots; i += 32) s.ab[r * slots + i] = {0, 0};
      if (lane == 0) {
        s.row[r] = {0, 0, 0, 0}, s.current_sum[r] = 0;
        s.current_max[r] = s.first_score[r] = kLowest, s.first_extra[r] = 0;
      }
      continue;
    }
    const int row = item.tile * kRows + r, own = row / group, head = item.head * group + row % group;
    const T* query =
        static_cast<const T*>(a.query) + (item.query + own) * a.query_stride[0] + head * a.query_stride[1] + lane;
    constexpr int kSlots = (D / 2 + 8 + 31) / 32;  // of a lane
    float raw[N], x[N], key[N], out[N], fixed_shift[N], largest = 0, fixed = 0, extra = 0;
    int slot[kSlots];
    float2 slot_shift[kSlots], ab[kSlots];
    float* saved = s.raw + r * D;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      raw[i] = to_float(query[32 * i]) * (a.scale * kLog2e);
      x[i] = p.query_scale[item.head * D + lane + 32 * i];
      key[i] = to_float(keys[own * a.key_stride[0] + 32 * i]);
      out[i] = to_float(values[own * a.value_stride[0] + 32 * i]);
      fixed_shift[i] = lane + 32 * i >= 2 * p.rotary_pairs ? shift[lane + 32 * i] : 0;
    }
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
      const bool used = lane + 32 * i < slots;
      slot[i] = used ? p.slots[lane + 32 * i] : 0;
      slot_shift[i] = used ? p.slot_shift[item.head * slots + lane + 32 * i] : float2{0, 0};
    }
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const int d = lane + 32 * i;
      x[i] *= raw[i];
      fixed += raw[i] * fixed_shift[i];
      if (p.k_extra) extra += raw[i] * p.k_extra[item.head * D + d];
      saved[d] = raw[i];
    }
    __syncwarp();
    if (r == warp) when_loaded();
    float size = 0;
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
      const float u = saved[slot[i]], v = saved[slot[i] + p.rotary_pairs];
      ab[i] = {u * slot_shift[i].x + v * slot_shift[i].y, v * slot_shift[i].x - u * slot_shift[i].y};
      size += fabsf(ab[i].x) + fabsf(ab[i].y);
    }
    const int f = scale_exponent(warp_sum(size));
    const float shrink = power_of_two(-f);
#pragma unroll
    for (int i = 0; i < kSlots; ++i)
      if (lane + 32 * i < slots) s.ab[r * slots + lane + 32 * i] = {ab[i].x * shrink, ab[i].y * shrink};
    if (p.hadamard) {
      hadamard_lanes<32>(x, lane);
      hadamard_registers<kBlock / 32>(x);
    }
#pragma unroll
    for (int i = 0; i < N; ++i) largest = fmaxf(largest, fabsf(x[i]));
    const int e = scale_exponent(warp_max(largest));
    float together = 0;
    const float unit = power_of_two(-e);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const int d = lane + 32 * i, b = d % 8;
      const __half h = __float2half_rn(x[i] * (b >= 4 ? unit * 0.0625f : unit));
      operand[d - b + b / 2 + b % 2 * 4] = h;
      together += __half2float(h) * (b >= 4 ? 16.0f : 1.0f);
    }
    together = warp_sum(together);
    fixed = warp_sum(fixed);
    extra = warp_sum(extra);
    if (lane == 0) {
      s.row[r] = {power_of_two(e + 24), together * power_of_two(e), power_of_two(f), fixed};
      s.first_extra[r] = extra, s.first_score[r] = kLowest;
    }
    float high = kLowest, weight = 0;
    if (with_current) {
      high = 0;
#pragma unroll
      for (int i = 0; i < N; ++i) high += raw[i] * key[i];
      high = warp_sum(high);
      weight = 1;
      for (int j = a.sliding_window ? max(own - a.sliding_window + 1, 0) : 0; j < own; ++j) {
        float score = 0, value[N];
#pragma unroll
        for (int i = 0; i < N; ++i) {
          score += raw[i] * to_float(keys[j * a.key_stride[0] + 32 * i]);
          value[i] = to_float(values[j * a.value_stride[0] + 32 * i]);
        }
        score = warp_sum(score);
        const float next = fmaxf(high, score), keep = exp2_fast(high - next), take = exp2_fast(score - next);
        high = next;
        weight = weight * keep + take;
#pragma unroll
        for (int i = 0; i < N; ++i) out[i] = out[i] * keep + take * value[i];
      }
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < N; ++i) saved[lane + 32 * i] = out[i];
    if (lane == 0) s.current_max[r] = high, s.current_sum[r] = weight;
  }
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
