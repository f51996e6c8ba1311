// Keys and values of sequences in one piece, as fp16: past tokens from the pages, the step's own as they came.
//
// A CTA takes a tile of 16 tokens, whose rotations its warps share, and a warp a KV head at a time. Lane l has
// dimensions 4 (l + 32 i) .. + 3, as in cache_write.cu. Codes of two tokens are the halves of a half2: the Hadamard
// rotation sums up to 128 of 15 at most, which fp16 has exactly.
#include "common.cuh"
#include "ptx.cuh"

namespace wkvquant {
namespace {

constexpr int kWarps = 8;

__device__ __forceinline__ __half2 as_half2(uint32_t x) { return *reinterpret_cast<const __half2*>(&x); }
__device__ __forceinline__ uint32_t as_word(__half2 x) { return *reinterpret_cast<const uint32_t*>(&x); }

// Four floats as fp16, the largest finite number for what is larger.
__device__ __forceinline__ uint2 pack_finite(const float* x) {
  const __half2 most = __float2half2_rn(65504.0f), least = __hneg2(most);
  const __half2 a = __floats2half2_rn(x[0], x[1]), b = __floats2half2_rn(x[2], x[3]);
  return {as_word(__hmin2_nan(__hmax2_nan(a, least), most)), as_word(__hmin2_nan(__hmax2_nan(b, least), most))};
}

// Codes of a byte each of two words, as numbers: those of `low` in the low half.
template <int Byte>
__device__ __forceinline__ __half2 codes_of(uint32_t low, uint32_t high) {
  const uint32_t both = __byte_perm(low, high, Byte | (4 + Byte) << 8);
  return __hsub2(as_half2((both & 0x000f000f) | 0x64006400), __float2half2_rn(1024.0f));
}

// hadamard_groups of two rows at once, but for the last step of head size 256.
template <int D>
__device__ __forceinline__ void hadamard_codes(__half2 (&x)[4 * groups_of_lane(D)], int lane) {
  constexpr int kLanes = (D & -D) / 4 < 32 ? (D & -D) / 4 : 32, N = groups_of_lane(D);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const __half2 a = __hadd2(x[4 * i], x[4 * i + 1]), b = __hsub2(x[4 * i], x[4 * i + 1]);
    const __half2 c = __hadd2(x[4 * i + 2], x[4 * i + 3]), d = __hsub2(x[4 * i + 2], x[4 * i + 3]);
    x[4 * i] = __hadd2(a, c), x[4 * i + 1] = __hadd2(b, d), x[4 * i + 2] = __hsub2(a, c), x[4 * i + 3] = __hsub2(b, d);
  }
#pragma unroll
  for (int m = 1; m < kLanes; m *= 2) {
    const __half2 sign = __float2half2_rn(lane & m ? -1.0f : 1.0f);
#pragma unroll
    for (int i = 0; i < 4 * N; ++i) x[i] = __hfma2(x[i], sign, as_half2(__shfl_xor_sync(kFull, as_word(x[i]), m)));
  }
}

template <int D>
struct Tile {
  static constexpr int N = groups_of_lane(D), kBlock = D & -D, kLanes = D / 4 < 32 ? D / 4 : 32;
  float2 (*rotation)[D / 2];  // [16][pair j at j % 4 * D / 8 + j / 4]
  int lane, first, past;      // position of the tile's first token; tokens of the tile that are past
  __half *keys, *values;      // rows of the tile's first token and the warp's head
  int64_t stride;             // elements between tokens

  __device__ bool active() const { return lane < kLanes; }
  __device__ static int pair_at(int j) { return j % 4 * (D / 8) + j / 4; }

  __device__ void load_keys(const WkvCudaParams& p, int head, const uint8_t* page, const PageLayout& layout, int slot,
                            uint32_t meta) {
    float scale[4 * N], shift[4 * N], turned[4 * N];  // K_t is shift cos + turned sin
    int pair[4 * N];                                  // or shift alone, below 0
    uint4 words[N][4];
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const int group = lane / 2 + 16 * i;
#pragma unroll
      for (int b = 0; b < 4; ++b)
        if (active()) words[i][b] = reinterpret_cast<const uint4*>(page + layout.k_word(slot, group))[b];
    }
#pragma unroll
    for (int i = 0; i < 4 * N; ++i) {
      const int d = 4 * (lane + 32 * (i / 4)) + i % 4, at = head * D + d, pairs = p.rotary_pairs;
      scale[i] = shift[i] = turned[i] = 0, pair[i] = -1;
      if (!active()) continue;
      scale[i] = p.query_scale[at];
      shift[i] = p.k_shift[at];
      if (d < 2 * pairs) {
        turned[i] = d < pairs ? -p.k_shift[at + pairs] : p.k_shift[at - pairs];
        pair[i] = pair_at(d < pairs ? d : d - pairs);
      }
    }
    const float minimum_of_all = p.hadamard ? 0 : 1;  // what the minimum is times in a transformed key, and in the
    const float minimum_of_first = p.hadamard ? kBlock : 1;  // first dimension of a rotated block
#pragma unroll
    for (int t = 0; t < 16; t += 2) {
      if (t >= past) break;
      __half2 x[4 * N];
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const uint4 w = words[i][t / 4];
        const uint32_t a = (t % 4 ? w.z : w.x) >> (lane % 2 * 4), b = (t % 4 ? w.w : w.y) >> (lane % 2 * 4);
        x[4 * i] = codes_of<0>(a, b), x[4 * i + 1] = codes_of<1>(a, b);
        x[4 * i + 2] = codes_of<2>(a, b), x[4 * i + 3] = codes_of<3>(a, b);
      }
      if (p.hadamard) hadamard_codes<D>(x, lane);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float2 m = __half22float2(as_half2(__shfl_sync(kFull, meta, t + half)));
        float y[4 * N];
#pragma unroll
        for (int i = 0; i < 4 * N; ++i) y[i] = half ? __high2float(x[i]) : __low2float(x[i]);
        if (N == 2 && p.hadamard)
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const float low = y[i], high = y[(4 + i) % (4 * N)];
            y[i] = low + high, y[(4 + i) % (4 * N)] = low - high;
          }
        const bool at_first = p.k_first && first + t + half == 0;
#pragma unroll
        for (int i = 0; i < 4 * N; ++i) {
          const int d = 4 * (lane + 32 * (i / 4)) + i % 4;
          float s = shift[i];
          if (pair[i] >= 0) {
            const float2 r = rotation[t + half][pair[i]];
            s = s * r.x + turned[i] * r.y;
          }
          if (at_first && active()) s = p.k_first[head * D + d];
          y[i] = fmaf(y[i], m.x, m.y * (d % kBlock ? minimum_of_all : minimum_of_first)) * scale[i] + s;
        }
        if (t + half < past && active())
#pragma unroll
          for (int i = 0; i < N; ++i)
            *reinterpret_cast<uint2*>(keys + (t + half) * stride + 4 * (lane + 32 * i)) = pack_finite(y + 4 * i);
      }
    }
  }

  __device__ void load_values(const WkvCudaParams& p, int head, const uint8_t* page, const PageLayout& layout, int slot,
                              uint32_t meta) {
    uint32_t words[N][8];
    float shift[4 * N];
#pragma unroll
    for (int i = 0; i < N; ++i)
#pragma unroll
      for (int b = 0; b < 8; ++b)
        if (active())
          words[i][b] = *reinterpret_cast<const uint32_t*>(page + layout.v_half(slot + 2 * b, lane + 32 * i));
#pragma unroll
    for (int i = 0; i < 4 * N; ++i) shift[i] = active() ? p.v_shift[head * D + 4 * (lane + 32 * (i / 4)) + i % 4] : 0;
#pragma unroll
    for (int t = 0; t < 16; ++t) {
      if (t >= past) break;
      const float2 m = __half22float2(as_half2(__shfl_sync(kFull, meta, 16 + t)));
      const bool at_first = p.v_first && first + t == 0;
      if (!active()) continue;
      float y[4 * N];
#pragma unroll
      for (int i = 0; i < 4 * N; ++i) {
        const int d = 4 * (lane + 32 * (i / 4)) + i % 4;
        const float code = __int_as_float((words[i / 4][t / 2] >> (t % 2 * 16 + i % 4 * 4) & 15) | 0x4b000000);
        y[i] = fmaf(code - 8388608.0f, m.x, m.y + (at_first ? p.v_first[head * D + d] : shift[i]));
      }
#pragma unroll
      for (int i = 0; i < N; ++i)
        *reinterpret_cast<uint2*>(values + t * stride + 4 * (lane + 32 * i)) = pack_finite(y + 4 * i);
    }
  }
};

template <int D, class T>
__global__ void __launch_bounds__(kWarps * 32)
    gather_kv(const __grid_constant__ WkvCudaGather a, const __grid_constant__ WkvCudaParams p) {
  __shared__ float2 rotation[16][D / 2];
  const int seq = blockIdx.y, begin = a.query_start_loc[seq];
  const int past = a.seq_lens[seq] - (a.query_start_loc[seq + 1] - begin);
  const int64_t row = a.key_start_loc[seq] + static_cast<int64_t>(blockIdx.x) * kTile;
  const int64_t end = min(static_cast<int64_t>(a.key_start_loc[seq + 1]), a.num_keys);
  const int count = static_cast<int>(min(end - row, static_cast<int64_t>(kTile)));
  if (count <= 0) return;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int first = a.first[seq] + static_cast<int>(blockIdx.x) * kTile;
  const int old = min(max(past - first, 0), count);
  if (old > 0 && p.rotary_pairs) {
    for (int t = warp; t < old; t += kWarps)
      for (int j = lane; j < p.rotary_pairs; j += 32)
        rotation[t][Tile<D>::pair_at(j)] =
            cos_sin(static_cast<uint64_t>(first + t) * static_cast<uint64_t>(p.rope_turns[j]));
    __syncthreads();
  }
  const PageLayout layout{D, a.block_size};
  const int entry = old > 0 ? a.block_table[seq * a.block_table_stride + first / a.block_size] : 0;
  const uint8_t* block = a.kv_cache + min(static_cast<int64_t>(max(entry, 0)), a.num_blocks - 1) * a.block_stride;
  const int slot = first % a.block_size;
  const int64_t stride = static_cast<int64_t>(p.num_kv_heads) * D;
  for (int head = warp; head < p.num_kv_heads; head += kWarps) {
    __half *keys = a.keys + row * stride + head * D, *values = a.values + row * stride + head * D;
    if (old > 0) {
      const uint8_t* page = block + head * layout.nbytes();
      const int64_t of_lane = (lane < 16 ? layout.k_meta() : layout.v_meta()) + 4 * (slot + lane % 16);
      const uint32_t meta = *reinterpret_cast<const uint32_t*>(page + of_lane);
      Tile<D> tile{rotation, lane, first, old, keys, values, stride};
      tile.load_keys(p, head, page, layout, slot, meta);
      tile.load_values(p, head, page, layout, slot, meta);
    }
    for (int t = old; t < count; ++t) {
      const int64_t token = begin + first + t - past;
      if (token >= a.num_tokens) break;
#pragma unroll
      for (int i = 0; i < groups_of_lane(D); ++i) {
        const int d = 4 * (lane + 32 * i);
        if (lane >= Tile<D>::kLanes) continue;
        float k[4], v[4];
        load4(static_cast<const T*>(a.key) + token * a.key_stride[0] + head * a.key_stride[1] + d, k);
        load4(static_cast<const T*>(a.value) + token * a.value_stride[0] + head * a.value_stride[1] + d, v);
        *reinterpret_cast<uint2*>(keys + t * stride + d) = pack_finite(k);
        *reinterpret_cast<uint2*>(values + t * stride + d) = pack_finite(v);
      }
    }
  }
}

template <int D>
cudaError_t launch(const WkvCudaGather& a, const WkvCudaParams& p, cudaStream_t stream) {
  const dim3 grid((a.max_keys + kTile - 1) / kTile, a.num_seqs);
  if (a.dtype == kBFloat16)
    gather_kv<D, __nv_bfloat16><<<grid, kWarps * 32, 0, stream>>>(a, p);
  else if (a.dtype == kFloat16)
    gather_kv<D, __half><<<grid, kWarps * 32, 0, stream>>>(a, p);
  else
    gather_kv<D, float><<<grid, kWarps * 32, 0, stream>>>(a, p);
  return cudaGetLastError();
}

}  // namespace
}  // namespace wkvquant

extern "C" int wkvquant_cuda_gather_kv(const WkvCudaGather* a, const WkvCudaParams* p, void* stream) {
  using namespace wkvquant;
  if (a->num_seqs == 0 || a->max_keys == 0) return cudaSuccess;
  const cudaStream_t s = static_cast<cudaStream_t>(stream);
  switch (p->head_size) {
    case 64: return launch<64>(*a, *p, s);
    case 96: return launch<96>(*a, *p, s);
    case 128: return launch<128>(*a, *p, s);
    case 256: return launch<256>(*a, *p, s);
  }
  return cudaErrorInvalidValue;
}
