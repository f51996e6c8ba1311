// What the kernels of both ops share.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "api.h"
#include "layout.h"

namespace wkvquant {

constexpr unsigned kFull = 0xffffffff;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

__device__ __forceinline__ void store_element(void* base, int dtype, int64_t index, float x) {
  if (dtype == kBFloat16)
    static_cast<__nv_bfloat16*>(base)[index] = __float2bfloat16(x);
  else if (dtype == kFloat16)
    static_cast<__half*>(base)[index] = __float2half(x);
  else
    static_cast<float*>(base)[index] = x;
}

// cos and sin of an angle in units of 2^-64 turns.
__device__ __forceinline__ float2 cos_sin(uint64_t angle) {
  float s, c;
  sincospif(static_cast<float>(static_cast<int32_t>(angle >> 32)) * 0x1p-31f, &s, &c);
  return {c, s};
}

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int i = 16; i; i /= 2) x += __shfl_xor_sync(kFull, x, i);
  return x;
}

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int i = 16; i; i /= 2) x = fmaxf(x, __shfl_xor_sync(kFull, x, i));
  return x;
}

// Unnormalized Sylvester-Hadamard over the low log2(Lanes) bits of the lane, of each x[i].
template <int Lanes, int N>
__device__ __forceinline__ void hadamard_lanes(float (&x)[N], int lane) {
#pragma unroll
  for (int m = 1; m < Lanes; m *= 2)
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float other = __shfl_xor_sync(kFull, x[i], m);
      x[i] = other + (lane & m ? -x[i] : x[i]);
    }
}

// The same over the low log2(Size) bits of i.
template <int Size, int N>
__device__ __forceinline__ void hadamard_registers(float (&x)[N]) {
#pragma unroll
  for (int m = 1; m < Size; m *= 2)
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (!(i & m)) {
        const float a = x[i], b = x[i | m];
        x[i] = a + b;
        x[i | m] = a - b;
      }
}

}  // namespace wkvquant
