// Rows of a tile: the query as operands, and coefficients of the shift.
#pragma once

#include "prefill_kernel.cuh"

namespace wkvquant {

// Sum of a row's coefficients of a step, in units of log 2, up to which their low parts do not matter.
constexpr float kCoarse = 8;

// The warp's query rows as operands of the scores, and their rotary pairs as operands of the coefficients.
template <int D>
template <class T>
__device__ void Prefill<D>::prepare_rows() {
  constexpr int N = D / 32, kBlock = D & -D, kSlots = (D / 2 + 31) / 32;  // of a lane
  float* raw = reinterpret_cast<float*>(s.coef + warp * steps * 128);
  uint32_t* pairs = reinterpret_cast<uint32_t*>(scratch());
  const float scale = a.scale * kLog2e;
  float smooth[N], fixed_shift[N], extra_shift[N];
  int slot[kSlots];
  float slot_shift[kSlots], most[kSlots];  // both sizes; most: over rows, of the step that the slot is of
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const int d = lane + 32 * i, at = item.head * D + d;
    smooth[i] = scale * p.query_scale[at];
    fixed_shift[i] = d >= 2 * p.rotary_pairs ? scale * p.k_shift[at] : 0;
    extra_shift[i] = p.k_extra ? scale * p.k_extra[at] : 0;
  }
#pragma unroll
  for (int i = 0; i < kSlots; ++i) {
    const bool used = lane + 32 * i < slots;
    const float2 d = used ? p.slot_shift[item.head * slots + lane + 32 * i] : float2{0, 0};
    slot[i] = used ? p.slots[lane + 32 * i] : 0;
    slot_shift[i] = scale * (fabsf(d.x) + fabsf(d.y)), most[i] = 0;
  }
  const auto load = [&](int r, float (&q)[N]) {
    const int row = item.tile * kRows + 32 * warp + r, token = item.query + row / group;
    const T* from = static_cast<const T*>(a.query) + token * a.query_stride[0] +
                    (item.head * group + row % group) * a.query_stride[1] + lane;
#pragma unroll
    for (int i = 0; i < N; ++i) q[i] = r < 32 && 32 * warp + r < rows ? to_float(from[32 * i]) : 0;
  };
  float next[N];
  load(0, next);
  __syncwarp();
#pragma unroll 1
  for (int r = 0; r < 32; ++r) {
    float q[N], x[N], fixed = 0, extra = 0, largest = 0, largest_raw = 0;
#pragma unroll
    for (int i = 0; i < N; ++i) q[i] = next[i];
    load(r + 1, next);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (steps) raw[lane + 32 * i] = q[i];
      x[i] = q[i] * smooth[i];
      largest_raw = fmaxf(largest_raw, fabsf(q[i]));
      fixed += q[i] * fixed_shift[i], extra += q[i] * extra_shift[i];
    }
    if (p.hadamard) {
      hadamard_lanes<32>(x, lane);
      hadamard_registers<kBlock / 32>(x);
    }
#pragma unroll
    for (int i = 0; i < N; ++i) largest = fmaxf(largest, fabsf(x[i]));
    const int f = scale_exponent(warp_max(largest_raw));
    __syncwarp();
    float size[kSlots], together_sizes = 0;  // bounds of what coefficients can be
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
      const int at = lane + 32 * i;
      size[i] = 0;
      if (at < slots) {
        const float u = raw[slot[i]], v = raw[slot[i] + p.rotary_pairs];
        size[i] = (fabsf(u) + fabsf(v)) * slot_shift[i];
        const int word = ((r / 16 * (slots / 8) + at / 8) * 32 + r % 8 * 4 + at % 4) * 4 + at / 4 % 2 * 2 + r / 8 % 2;
        pairs[word] = pack_half2(u * power_of_two(-f), v * power_of_two(-f));
      }
      together_sizes += size[i];
    }
    // The row's unit is such that neither query nor coefficients leave fp16.
    const int e = max(scale_exponent(warp_max(largest)), scale_exponent(warp_sum(together_sizes)) - 12);
    float together = 0;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const int d = lane + 32 * i, b = d % 8;
      const __half h = __float2half_rn(x[i] * power_of_two(b >= 4 ? -e - 4 : -e));
      const int at = (((2 * warp + r / 16) * (D / 16) + d / 32 * 2 + b % 2) * 32 + r % 8 * 4 + d / 8 % 4) * 4;
      reinterpret_cast<__half*>(s.query)[(at + b / 4 * 2 + r / 8 % 2) * 2 + b / 2 % 2] = h;
      together += __half2float(h) * (b >= 4 ? 16.0f : 1.0f);
    }
    together = warp_sum(together), fixed = warp_sum(fixed), extra = warp_sum(extra);
    if (lane == 0) {
      const int at = 32 * warp + r;
      s.unit[at] = power_of_two(e + 12), s.total[at] = together * 0x1p-12f, s.constant[at] = fixed;
      s.first_extra[at] = extra * power_of_two(-e - 12), s.first_score[at] = kLowest;
      s.shrink[at] = power_of_two(min(max(f - e - 12, -126), 126));
    }
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
#pragma unroll
      for (int m = 1; m < 8; m *= 2) size[i] += __shfl_xor_sync(kFull, size[i], m);
      most[i] = fmaxf(most[i], size[i]);
    }
    __syncwarp();
  }
  low = 0;  // of plain steps, only the coefficients of polynomials, which are large sums, have low parts
  float slow = 0;
#pragma unroll
  for (int i = 0; i < kSlots; ++i) {
    const int step = (lane + 32 * i) / 8;
    if (step >= p.fast_steps && lane % 8 == 0) slow += most[i];
    for (int j = p.plain_steps; j < p.fast_steps; ++j)
      if (__any_sync(kFull, step == j && most[i] > kCoarse)) low |= 1u << j;
  }
  if (warp_sum(slow) > kCoarse) low |= 1u << p.fast_steps;
}

template <int D>
__device__ void Prefill<D>::start_rows() {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int r = 32 * warp + 8 * i + g;
    unit[i] = s.unit[r], total[i] = s.total[r];
    top[i] = kLowest, sum[i] = 0, min_sum[i] = 0;
  }
#pragma unroll
  for (int m = 0; m < 2; ++m)
#pragma unroll
    for (int n = 0; n < S::kOutTiles; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) acc[m][n][i] = 0;
}

// k_shift of every slot, turned to the chunk's centre, in units of the scores.
template <int D>
__device__ void Prefill<D>::turn_shift(int chunk) {
  const float scale = a.scale * kLog2e;
  for (int i = threadIdx.x; i < slots; i += S::kThreads) {
    const float2 r = cos_sin(chunk_angle(chunk, p.slot_turns[i])), d = p.slot_shift[item.head * slots + i];
    s.shift[chunk % 2 * slots + i] = {(d.x * r.x - d.y * r.y) * scale, (d.y * r.x + d.x * r.y) * scale};
  }
}

// Coefficients are linear in the query: (u, v) of a pair, whose shift at the centre is (x, y), has u x + v y of the
// cosine and v x - u y of the sine, and a slow pair that much of its cosine's and sine's polynomials.
template <int D>
__device__ void Prefill<D>::make_mix(int chunk) {
  const float2* shift = s.shift + chunk % 2 * slots;
  const int x = warp % 2, r = warp / 2;  // n-tile and register of operand B
  for (int i = 0; i < slots / 8; ++i) {
    float c = 4 * x + g / 2 == t + 4 * r;
    if (i >= p.fast_steps) {
      const __half2* word =
          reinterpret_cast<const __half2*>(p.chebyshev) + (i - p.fast_steps) * 256 + lane * 4 + x + 2 * r;
      const float2 high = __half22float2(word[0]), rest = __half22float2(word[128]);
      c = g % 2 ? high.y + rest.y : high.x + rest.x;
    }
    const float2 d = shift[8 * i + t + 4 * r];
    uint32_t* to = reinterpret_cast<uint32_t*>(s.mix + i * 64 + lane) + 2 * x + r;
    split_half2(c * (g % 2 ? -d.y : d.x), c * (g % 2 ? d.x : d.y), to[0], to[128]);
  }
}

// Coefficients of the basis for the chunk, as operand A.
template <int D>
__device__ void Prefill<D>::make_coefficients() {
  const uint4* pairs = scratch() + lane;
  const int all = slots / 8;
  float c[2][2][4], shrink[4];
#pragma unroll
  for (int r = 0; r < 4; ++r) shrink[r] = s.shrink[32 * warp + 8 * r + g];
  uint4 next[2] = {pairs[0], pairs[all * 32]};  // they come from L2
#pragma unroll 1
  for (int i = 0; i < all; ++i) {
    const uint4 now[2] = {next[0], next[1]};
    if (i + 1 < all) next[0] = pairs[(i + 1) * 32], next[1] = pairs[(all + i + 1) * 32];
    const uint4 high = s.mix[i * 64 + lane], rest = s.mix[i * 64 + 32 + lane];
    if (i <= p.fast_steps)
#pragma unroll
      for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int j = 0; j < 4; ++j) c[m][0][j] = c[m][1][j] = 0;
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      const uint4 w = now[m];
      mma(c[m][0], w.x, w.y, w.z, w.w, high.x, high.y);
      mma(c[m][1], w.x, w.y, w.z, w.w, high.z, high.w);
      mma(c[m][0], w.x, w.y, w.z, w.w, rest.x, rest.y);
      mma(c[m][1], w.x, w.y, w.z, w.w, rest.z, rest.w);
    }
    if (i >= p.fast_steps && i + 1 < all) continue;  // slow pairs add up
    const int step = min(i, p.fast_steps);
    uint4* to = s.coef + (warp * steps + step) * 128 + lane;
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int x = 0; x < 2; ++x)
#pragma unroll
        for (int j = 0; j < 4; ++j) c[m][x][j] *= shrink[2 * m + j / 2];
      to[m * 32] = {pack_half2(c[m][0][0], c[m][0][1]), pack_half2(c[m][0][2], c[m][0][3]),
                    pack_half2(c[m][1][0], c[m][1][1]), pack_half2(c[m][1][2], c[m][1][3])};
      if (low >> step & 1) {
        uint4 h, l;
        split_half2(c[m][0][0], c[m][0][1], h.x, l.x), split_half2(c[m][0][2], c[m][0][3], h.y, l.y);
        split_half2(c[m][1][0], c[m][1][1], h.z, l.z), split_half2(c[m][1][2], c[m][1][3], h.w, l.w);
        to[64 + m * 32] = l;
      }
    }
  }
  __syncwarp();
}

}  // namespace wkvquant
