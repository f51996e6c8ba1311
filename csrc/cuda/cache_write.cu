// New K and V -> page: shift, smooth, rotate, range, pack, scatter.
//
// A warp takes one token over some of its heads, so that the angles are made once. Lane l holds dimensions
// 4 (l + 32 i) .. + 3: half a K word (its pair lane has the other half) and one V halfword.
#include "common.cuh"
#include "ptx.cuh"

namespace wkvquant {
namespace {

constexpr int kWarps = 4;

// Order of floats as integers, and back: one instruction then finds the least or the largest of a warp.
__device__ __forceinline__ int ordered(float x) {
  const int i = __float_as_int(x);
  return i ^ (i >> 31 & 0x7fffffff);
}
__device__ __forceinline__ float unordered(int i) { return __int_as_float(i ^ (i >> 31 & 0x7fffffff)); }

// Codes of a row and its (scale, minimum) as two fp16.
template <int N>
__device__ __forceinline__ uint32_t quantize(const float (&x)[4 * N], bool active, uint32_t (&codes)[N]) {
  float low = INFINITY, high = -INFINITY;
  if (active)
#pragma unroll
    for (int i = 0; i < 4 * N; ++i) low = fminf(low, x[i]), high = fmaxf(high, x[i]);
  low = unordered(__reduce_min_sync(kFull, ordered(low)));
  high = unordered(__reduce_max_sync(kFull, ordered(high)));
  const __half minimum = __float2half_rn(fminf(fmaxf(low, -65504.0f), 65504.0f));
  const __half scale = __float2half_rn(fminf(__fdiv_rn(high - low, 15.0f), 65504.0f));
  const float step = __half2float(scale), offset = __half2float(minimum);
  const float inverse = step > 0 ? __frcp_rn(step) : 0;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    codes[i] = 0;
#pragma unroll
    for (int b = 0; b < 4; ++b) {
      const float code = fminf(fmaxf(rintf((x[4 * i + b] - offset) * inverse), 0.0f), 15.0f);
      codes[i] |= static_cast<uint32_t>(code) << (8 * b);
    }
  }
  return __half_as_ushort(scale) | static_cast<uint32_t>(__half_as_ushort(minimum)) << 16;
}

template <int D, class T>
__global__ void __launch_bounds__(kWarps * 32)
    cache_write(const __grid_constant__ WkvCudaCacheWrite a, const __grid_constant__ WkvCudaParams p,
                int heads_per_warp) {
  constexpr int N = groups_of_lane(D), kLanes = D / 4 < 32 ? D / 4 : 32;
  allow_next();
  const int lane = threadIdx.x % 32;
  const int64_t token = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (token >= a.num_tokens) return;
  const int64_t where = a.slot_mapping[token];
  if (where < 0 || where >= a.num_blocks * a.block_size) return;
  const PageLayout layout{D, a.block_size};
  const int64_t block = where / a.block_size;
  const int slot = static_cast<int>(where % a.block_size);
  const bool active = lane < kLanes;
  const int pairs = p.rotary_pairs;

  float cosine[4 * N], sine[4 * N];
  if (pairs) {
    const int64_t position = a.positions[token];
#pragma unroll
    for (int i = 0; i < 4 * N; ++i) {
      const int d = 4 * (lane + 32 * (i / 4)) + i % 4;
      const int j = d < pairs ? d : d - pairs;
      float2 r = {1, 0};
      if (active && j < pairs) r = cos_sin(static_cast<uint64_t>(position) * static_cast<uint64_t>(p.rope_turns[j]));
      cosine[i] = r.x;
      sine[i] = d < pairs ? -r.y : r.y;
    }
  }
  const bool first_position = p.k_first && a.positions[token] == 0;
  const int first = blockIdx.y * heads_per_warp, last = min(first + heads_per_warp, p.num_kv_heads);
  for (int head = first; head < last; ++head) {
    float k[4 * N], v[4 * N];
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const int d = 4 * (lane + 32 * i);
      if (active) {
        load4(static_cast<const T*>(a.key) + token * a.key_stride[0] + head * a.key_stride[1] + d, k + 4 * i);
        load4(static_cast<const T*>(a.value) + token * a.value_stride[0] + head * a.value_stride[1] + d, v + 4 * i);
      } else {
#pragma unroll
        for (int b = 0; b < 4; ++b) k[4 * i + b] = v[4 * i + b] = 0;
      }
    }
    if (active) {
#pragma unroll
      for (int i = 0; i < 4 * N; ++i) {
        const int d = 4 * (lane + 32 * (i / 4)) + i % 4;
        const float* shift = p.k_shift + head * D;
        float s = shift[d];
        if (d < 2 * pairs) s = s * cosine[i] + shift[d < pairs ? d + pairs : d - pairs] * sine[i];
        if (first_position) s = p.k_first[head * D + d];
        k[i] = (k[i] - s) * p.key_scale[head * D + d];
        v[i] -= (first_position ? p.v_first : p.v_shift)[head * D + d];
      }
    }
    if (p.hadamard) hadamard_groups<D>(k, lane);
    uint32_t k_codes[N], v_codes[N];
    const uint32_t k_meta = quantize<N>(k, active, k_codes), v_meta = quantize<N>(v, active, v_codes);
    uint8_t* page = a.kv_cache + block * a.block_stride + head * layout.nbytes();
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const uint32_t high = __shfl_down_sync(kFull, k_codes[i], 1);
      const int group = lane + 32 * i;
      if (active && lane % 2 == 0)
        *reinterpret_cast<uint32_t*>(page + layout.k_word(slot, group / 2)) = k_codes[i] | high << 4;
      uint32_t c = v_codes[i];
      c = (c | c >> 4) & 0x00ff00ff;
      c = (c | c >> 8) & 0xffff;
      if (active) *reinterpret_cast<uint16_t*>(page + layout.v_half(slot, group)) = static_cast<uint16_t>(c);
    }
    if (lane == 0) *reinterpret_cast<uint32_t*>(page + layout.k_meta() + 4 * slot) = k_meta;
    if (lane == 1) *reinterpret_cast<uint32_t*>(page + layout.v_meta() + 4 * slot) = v_meta;
  }
}

template <int D>
cudaError_t launch(const WkvCudaCacheWrite& a, const WkvCudaParams& p, cudaStream_t stream) {
  // few tokens: a warp for every head; many: enough warps without
  const int heads_per_warp = a.num_tokens * p.num_kv_heads <= 8192 ? 1 : a.num_tokens <= 4096 ? 2 : 4;
  const dim3 grid((a.num_tokens + kWarps - 1) / kWarps, (p.num_kv_heads + heads_per_warp - 1) / heads_per_warp);
  if (a.dtype == kBFloat16)
    cache_write<D, __nv_bfloat16><<<grid, kWarps * 32, 0, stream>>>(a, p, heads_per_warp);
  else if (a.dtype == kFloat16)
    cache_write<D, __half><<<grid, kWarps * 32, 0, stream>>>(a, p, heads_per_warp);
  else
    cache_write<D, float><<<grid, kWarps * 32, 0, stream>>>(a, p, heads_per_warp);
  return cudaGetLastError();
}

}  // namespace
}  // namespace wkvquant

extern "C" int wkvquant_cuda_cache_write(const WkvCudaCacheWrite* a, const WkvCudaParams* p, void* stream) {
  using namespace wkvquant;
  if (a->num_tokens == 0) return cudaSuccess;
  return with_head_size(p->head_size, [&](auto d) { return launch<d>(*a, *p, static_cast<cudaStream_t>(stream)); });
}
