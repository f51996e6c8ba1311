// What the kernels of both ops share.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "api.h"
#include "layout.h"

namespace wkvquant {

constexpr unsigned kFull = 0xffffffff;
constexpr int kChunk = 256;                                           // tokens that share the coefficients of the shift
constexpr int kUnitBits = 5, kUnit = 1 << kUnitBits;                  // tokens of a softmax step
constexpr int kTileBits = 4;                                          // of a position, in a tile
constexpr int kTeams = 2;                                             // of a CTA, at most
constexpr int64_t kCounterBytes = kMaxCtas * kTeams * sizeof(int);    // at the start of the workspace
constexpr int64_t kCtaBytes = kTeams * 2 * kMaxRows * (128 + 2) * 4;  // then two partial results of each team
// and two of each CTA whose item others have parts of, and which has no other item: 0 but in such a launch
constexpr int64_t kWordsBytes = kMaxRows * (128 + 2) * 4;
constexpr int64_t kWorkspaceBytes = kCounterBytes + kMaxCtas * (kCtaBytes + 2 * kWordsBytes);
static_assert(kTile == 1 << kTileBits);
constexpr float kBoost = 4;
constexpr float kLowest = -1e30f;
constexpr float kLog2e = 1.44269504088896341f;
constexpr float kLn2 = 0.693147180559945309f;

// f(D) with a head size that the compiler knows; it must be one that there are kernels of.
template <class F>
auto with_head_size(int head_size, const F& f) {
  switch (head_size) {
    case 64: return f(std::integral_constant<int, 64>());
    case 96: return f(std::integral_constant<int, 96>());
    case 128: return f(std::integral_constant<int, 128>());
  }
  return f(std::integral_constant<int, 256>());
}

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

// Division by a number that the host knows, exact where numerator times divisor is below 2^31.
struct FastDivide {
  uint32_t divisor, reciprocal;
  explicit FastDivide(uint32_t d) : divisor(d), reciprocal(0x7fffffffu / d + 1) {}
  __device__ __forceinline__ uint32_t operator()(uint32_t n) const { return __umulhi(2 * n, reciprocal); }
};

// n / d, n not negative, d positive and the quotient below 2^21, in half the instructions.
__device__ __forceinline__ int divide(int n, int d) {
  const int q = static_cast<int>(__fdividef(static_cast<float>(n), static_cast<float>(d))), rest = n - q * d;
  return q + (rest >= d) - (rest < 0);
}

__device__ __forceinline__ float power_of_two(int e) { return __int_as_float((e + 127) << 23); }

// Power of two that brings x to [2^13, 2^14), as its exponent.
__device__ __forceinline__ int scale_exponent(float x) {
  return min(max((__float_as_int(x) >> 23) - (127 + 13), -80), 80);
}

__device__ __forceinline__ uint32_t pack_half2(float low, float high) {
  const __half2 h = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&h);
}

// x as high and low fp16 parts, two at a time.
__device__ __forceinline__ void split_half2(float a, float b, uint32_t& high, uint32_t& low) {
  const __half2 h = __floats2half2_rn(a, b);
  const float2 f = __half22float2(h);
  high = *reinterpret_cast<const uint32_t*>(&h);
  low = pack_half2(a - f.x, b - f.y);
}

// cos and sin of an angle in units of 2^-64 turns.
__device__ __forceinline__ float2 cos_sin(uint64_t angle) {
  float s, c;
  sincospif(static_cast<float>(static_cast<int32_t>(angle >> 32)) * 0x1p-31f, &s, &c);
  return {c, s};
}

// The same with an error of 2^-20.
__device__ __forceinline__ float2 cos_sin_fast(uint64_t angle) {
  const float x = static_cast<float>(static_cast<int32_t>(angle >> 32)) * (0x1p-31f * 3.14159265f);
  return {__cosf(x), __sinf(x)};
}

// The angle at the centre of the chunk from position `first`, which is half a position before its position kChunk / 2.
__device__ __forceinline__ uint64_t chunk_angle(int first, int64_t turns) {
  return static_cast<uint64_t>(first + kChunk / 2 - 1) * static_cast<uint64_t>(turns) +
         static_cast<uint64_t>(turns >> 1);
}

template <int Lanes = 32>
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int i = Lanes / 2; i; i /= 2) x += __shfl_xor_sync(kFull, x, i);
  return x;
}

// Of numbers that are not negative: they are in the order of their bits.
template <int Lanes = 32>
__device__ __forceinline__ float warp_max_of_magnitudes(float x) {
  if constexpr (Lanes == 32) return __int_as_float(__reduce_max_sync(kFull, __float_as_int(x)));
#pragma unroll
  for (int i = Lanes / 2; i; i /= 2) x = fmaxf(x, __shfl_xor_sync(kFull, x, i));
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
      x[i] = fmaf(x[i], lane & m ? -1.0f : 1.0f, other);
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

// Lanes (a warp or half of one) over a row: lane l has elements 4 (l + lanes i) .. + 3, as x[4 i] .. x[4 i + 3].
__host__ __device__ constexpr int groups_of_lane(int head_size, int lanes = 32) {
  return (head_size / 4 + lanes - 1) / lanes;
}

// Four elements, aligned to their size.
template <class T>
__device__ __forceinline__ void load4(const T* p, float* x) {
  struct alignas(4 * sizeof(T)) {
    T x[4];
  } raw = *reinterpret_cast<const decltype(raw)*>(p);
#pragma unroll
  for (int b = 0; b < 4; ++b) x[b] = to_float(raw.x[b]);
}

// Four elements of a WkvDtype, as they are in memory.
__device__ __forceinline__ void load4_raw(const char* p, int dtype, uint4& x) {
  if (dtype == kFloat32) {
    x = *reinterpret_cast<const uint4*>(p);
  } else {
    const uint2 y = *reinterpret_cast<const uint2*>(p);
    x.x = y.x, x.y = y.y;
  }
}

// N times four elements, as load4_raw loads them. wide: they are fp32; a switch over the types would jump by a table.
template <int N>
__device__ __forceinline__ void convert4(const uint4 (&raw)[N], bool wide, int dtype, float (&x)[4 * N]) {
  if (wide) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      x[4 * i] = __uint_as_float(raw[i].x), x[4 * i + 1] = __uint_as_float(raw[i].y);
      x[4 * i + 2] = __uint_as_float(raw[i].z), x[4 * i + 3] = __uint_as_float(raw[i].w);
    }
  } else if (dtype == kBFloat16) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      x[4 * i] = __uint_as_float(raw[i].x << 16), x[4 * i + 1] = __uint_as_float(raw[i].x & 0xffff0000);
      x[4 * i + 2] = __uint_as_float(raw[i].y << 16), x[4 * i + 3] = __uint_as_float(raw[i].y & 0xffff0000);
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float2 low = __half22float2(*reinterpret_cast<const __half2*>(&raw[i].x));
      const float2 high = __half22float2(*reinterpret_cast<const __half2*>(&raw[i].y));
      x[4 * i] = low.x, x[4 * i + 1] = low.y, x[4 * i + 2] = high.x, x[4 * i + 3] = high.y;
    }
  }
}

// Stores four elements of a WkvDtype.
__device__ __forceinline__ void store4(char* p, int dtype, float4 x) {
  if (dtype == kFloat32) {
    *reinterpret_cast<float4*>(p) = x;
  } else if (dtype == kBFloat16) {
    const __nv_bfloat162 y[2] = {__floats2bfloat162_rn(x.x, x.y), __floats2bfloat162_rn(x.z, x.w)};
    *reinterpret_cast<uint2*>(p) = *reinterpret_cast<const uint2*>(y);
  } else {
    *reinterpret_cast<uint2*>(p) = {pack_half2(x.x, x.y), pack_half2(x.z, x.w)};
  }
}

// Unnormalized Hadamard rotation of a row, in blocks of the largest power of two that divides it.
template <int D, int Lanes = 32>
__device__ __forceinline__ void hadamard_groups(float (&x)[4 * groups_of_lane(D, Lanes)], int lane) {
  constexpr int kGroups = (D & -D) / 4, N = groups_of_lane(D, Lanes);
#pragma unroll
  for (int i = 0; i < N; ++i) hadamard_registers<4>(*reinterpret_cast<float (*)[4]>(x + 4 * i));
  hadamard_lanes < kGroups<Lanes ? kGroups : Lanes>(x, lane);
#pragma unroll
  for (int m = 1; m < kGroups / Lanes; m *= 2)
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (!(i & m))
#pragma unroll
        for (int b = 0; b < 4; ++b) {
          const float y = x[4 * i + b], z = x[4 * (i | m) + b];
          x[4 * i + b] = y + z, x[4 * (i | m) + b] = y - z;
        }
}

}  // namespace wkvquant
