// The end of an item: warps and CTAs add up, and the output is written.
#pragma once

#include "attention_kernel.cuh"

namespace wkvquant {

static __device__ __noinline__ void store_row4(void* out, int dtype, int64_t at, float4 x, float factor) {
  store_element(out, dtype, at, x.x * factor);
  store_element(out, dtype, at + 1, x.y * factor);
  store_element(out, dtype, at + 2, x.z * factor);
  store_element(out, dtype, at + 3, x.w * factor);
}

template <int D, int NT>
__device__ void Kernel<D, NT>::write_row4(int r, int d, float4 x, float inverse) const {
  const int row = item.tile * kRows + r;
  const int64_t at =
      (item.query + row / group) * a.out_stride[0] + (item.head * group + row % group) * a.out_stride[1] + d;
  store_row4(a.out, a.dtype, at, x, inverse);
}

template <int D, int NT>
__device__ void Kernel<D, NT>::write_lse(int r, float top_of_row, float sum_of_row) const {
  if (!a.lse) return;
  const int row = item.tile * kRows + r;
  a.lse[(item.query + row / group) * a.lse_stride[0] + (item.head * group + row % group) * a.lse_stride[1]] =
      (top_of_row + __log2f(sum_of_row)) * kLn2;
}

template <int D, int NT>
__device__ float* Kernel<D, NT>::partial(int cta, int slot) const {
  return reinterpret_cast<float*>(static_cast<char*>(a.workspace) + kCounterBytes) +
         (2 * cta + slot) * partial_floats(kRows, D);
}

template <int D, int NT>
__device__ void Kernel<D, NT>::finish(bool with_current) {
#pragma unroll
  for (int n = 0; n < NT; ++n)
#pragma unroll
    for (int j = 0; j < 2; ++j) {
#pragma unroll
      for (int m = 4; m < 32; m *= 2) {
        sum[n][j] += __shfl_xor_sync(kFull, sum[n][j], m);
        min_sum[n][j] += __shfl_xor_sync(kFull, min_sum[n][j], m);
      }
      if (g == 0) {
        const int at = warp * kRows + 8 * n + 2 * t + j;
        s.warp_max[at] = top[n][j], s.warp_sum[at] = sum[n][j], s.warp_min[at] = min_sum[n][j];
      }
    }
  __syncthreads();
  if (threadIdx.x < kRows) {
    const int r = threadIdx.x;
    float high = s.current_max[r], past = 0, low = 0;
    for (int w = 0; w < kWarps; ++w) high = fmaxf(high, s.warp_max[w * kRows + r]);
    for (int w = 0; w < kWarps; ++w) {
      const float f = exp2_fast(s.warp_max[w * kRows + r] - high);
      past += f * s.warp_sum[w * kRows + r];
      low += f * s.warp_min[w * kRows + r];
    }
    s.row_max[r] = high, s.row_past[r] = past, s.row_min[r] = low;
    s.row_sum[r] = past + s.current_sum[r] * exp2_fast(s.current_max[r] - high);
  }
  __syncthreads();
#pragma unroll 1
  for (int round = 0; round < kWarps / S::kRedSlots; ++round) {
    if (warp / S::kRedSlots == round) {
      float* mine = s.red + warp % S::kRedSlots * (kRows * S::kPitch);
#pragma unroll
      for (int n = 0; n < NT; ++n)
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int r = 8 * n + 2 * t + j;
          const float f = exp2_fast(top[n][j] - s.row_max[r]);
#pragma unroll
          for (int m = 0; m < S::kMTiles; ++m) {
            float2* at = reinterpret_cast<float2*>(mine + r * S::kPitch + S::dimension(m, g));
            float2 x = {acc[m][n][j] * (f * 0x1p24f), acc[m][n][2 + j] * (f * 0x1p20f)};
            if (round) x.x += at->x, x.y += at->y;
            *at = x;
          }
        }
    }
    __syncthreads();
  }
  const bool whole = item.begin == 0 && item.end == item.units;
  const int slot = item.begin == 0;
  float* mine = partial(blockIdx.x, slot);
#pragma unroll 1
  for (int i = threadIdx.x; i < rows * (D / 4); i += S::kThreads) {
    const int r = i / (D / 4), d = i % (D / 4) * 4;
    const float past = s.row_past[r], low = s.row_min[r];
    const float4 shift = *reinterpret_cast<const float4*>(s.v_shift + d);
    float4 x = {fmaf(shift.x, past, low), fmaf(shift.y, past, low), fmaf(shift.z, past, low), fmaf(shift.w, past, low)};
#pragma unroll
    for (int w = 0; w < S::kRedSlots; ++w) {
      const float4 y = *reinterpret_cast<const float4*>(s.red + (w * kRows + r) * S::kPitch + d);
      x.x += y.x, x.y += y.y, x.z += y.z, x.w += y.w;
    }
    if (p.v_extra) {
      const float f = exp2_fast(s.first_score[r] - s.row_max[r]);
      const float4 y = *reinterpret_cast<const float4*>(p.v_extra + item.head * D + d);
      x.x += f * y.x, x.y += f * y.y, x.z += f * y.z, x.w += f * y.w;
    }
    if (with_current) {
      const float f = exp2_fast(s.current_max[r] - s.row_max[r]);
      const float4 y = *reinterpret_cast<const float4*>(s.raw + r * D + d);
      x.x += f * y.x, x.y += f * y.y, x.z += f * y.z, x.w += f * y.w;
    }
    if (whole)
      write_row4(r, d, x, __fdividef(1, s.row_sum[r]));
    else
      *reinterpret_cast<float4*>(mine + r * D + d) = x;
  }
  if (threadIdx.x < rows) {
    const int r = threadIdx.x;
    if (whole) {
      write_lse(r, s.row_max[r], s.row_sum[r]);
    } else {
      mine[kRows * D + r] = s.row_max[r];
      mine[kRows * (D + 1) + r] = s.row_sum[r];
    }
  }
  if (!whole) combine();
  __syncthreads();
}

// The last CTA of an item to arrive adds up the partial results of all.
template <int D, int NT>
__device__ void Kernel<D, NT>::combine() {
  const Plan plan = read_plan();
  const int first = plan.cta_of(item.place);
  const int last = plan.cta_of(item.place + item.units - max(plan.skipped(item.units), 1)), parts = last - first + 1;
  __syncthreads();
  if (threadIdx.x == 0) {
    int* counter = static_cast<int*>(a.workspace) + first;
    const bool is_last = count_arrival(counter) == parts - 1;
    s.misc[2] = is_last;
    if (is_last) *counter = 0;
  }
  __syncthreads();
  if (!s.misc[2]) return;
  // As many threads as there are share the parts of a row: there is nothing to it but the latency of the loads.
  constexpr int kColumns = D / 4;
  const int columns = rows * kColumns, splits = max(S::kThreads / columns, 1);
  float4* share = reinterpret_cast<float4*>(s.red);  // [splits][columns]
#pragma unroll 1
  for (int r = warp; r < rows; r += kWarps) {
    float high = kLowest, weight = 0;
#pragma unroll 1
    for (int c = lane; c < parts; c += 32) {
      const float* from = partial(first + c, c == 0) + kRows * D + r;
      const float x = __ldcg(from), y = __ldcg(from + kRows), next = fmaxf(high, x);
      weight = weight * exp2_fast(high - next) + y * exp2_fast(x - next);
      high = next;
    }
    const float all = warp_max(high);
    weight = warp_sum(weight * exp2_fast(high - all));
    if (lane == 0) {
      s.row_max[r] = all, s.row_sum[r] = weight;
      write_lse(r, all, weight);
    }
  }
  __syncthreads();
#pragma unroll 1
  for (int i = threadIdx.x; i < columns * splits; i += S::kThreads) {
    const int split = i / columns, column = i - split * columns, r = column / kColumns, d = column % kColumns * 4;
    const int end = parts * (split + 1) / splits;
    const float high = s.row_max[r];
    float4 x = {0, 0, 0, 0};
    constexpr int kBatch = 12;  // loads in flight
#pragma unroll 1
    for (int c = parts * split / splits; c < end; c += kBatch) {
      float top_of_part[kBatch];
      float4 y[kBatch];
#pragma unroll
      for (int k = 0; k < kBatch; ++k) {
        const int from = min(c + k, end - 1);
        const float* part = partial(first + from, from == 0);
        top_of_part[k] = c + k < end ? __ldcg(part + kRows * D + r) : kLowest;
        y[k] = __ldcg(reinterpret_cast<const float4*>(part + r * D + d));
      }
#pragma unroll
      for (int k = 0; k < kBatch; ++k) {
        const float f = exp2_fast(top_of_part[k] - high);
        x.x += f * y[k].x, x.y += f * y[k].y, x.z += f * y[k].z, x.w += f * y[k].w;
      }
    }
    if (splits == 1)
      write_row4(r, d, x, __fdividef(1, s.row_sum[r]));
    else
      share[i] = x;
  }
  if (splits == 1) return;
  __syncthreads();
  for (int i = threadIdx.x; i < columns; i += S::kThreads) {
    float4 x = share[i];
#pragma unroll 1
    for (int k = 1; k < splits; ++k) {
      const float4 y = share[k * columns + i];
      x.x += y.x, x.y += y.y, x.z += y.z, x.w += y.w;
    }
    const int r = i / kColumns;
    write_row4(r, i % kColumns * 4, x, __fdividef(1, s.row_sum[r]));
  }
}

}  // namespace wkvquant
