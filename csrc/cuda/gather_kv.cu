// Keys and values of sequences in one piece, as fp16: past tokens from the pages, the step's own as they came.
//
// A CTA takes a tile of 16 tokens, whose rotations its warps share, and a warp four tokens of a KV head at a time. Lane
// l has dimensions 4 (l + 32 i) .. + 3, as in cache_write.cu. Codes of two tokens are the halves of a half2: the
// Hadamard rotation sums up to 128 of 15 at most, which fp16 has exactly.
#include "common.cuh"
#include "ptx.cuh"

namespace wkvquant {
namespace {

constexpr int kWarps = 8;
constexpr int kPart = 4;

__device__ __forceinline__ __half2 as_half2(uint32_t x) { return *reinterpret_cast<const __half2*>(&x); }
__device__ __forceinline__ uint32_t as_word(__half2 x) { return *reinterpret_cast<const uint32_t*>(&x); }

// Four floats as fp16, the largest finite number for what is larger. In one store: the compiler makes two of a uint2's.
__device__ __forceinline__ void store_finite(__half* to, const float* x) {
  const __half2 most = __float2half2_rn(65504.0f), least = __hneg2(most);
  const __half2 a = __floats2half2_rn(x[0], x[1]), b = __floats2half2_rn(x[2], x[3]);
  const uint2 both = {as_word(__hmin2_nan(__hmax2_nan(a, least), most)),
                      as_word(__hmin2_nan(__hmax2_nan(b, least), most))};
  __stcg(reinterpret_cast<uint2*>(to), both);
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

// Cosine and sine of each token's pair j at pair_at(j), where lanes read without conflicts; the last column is 1 and 0,
// for dimensions that do not rotate.
template <int D>
struct Rotation {
  float2 of[kTile][D / 2 + 1];
  __device__ static int pair_at(int j) { return j % 4 * (D / 8) + j / 4; }
};

// What a warp gathers at a time: kPart tokens of a KV head.
template <int D>
struct Part {
  static constexpr int N = groups_of_lane(D), kBlock = D & -D, kLanes = D / 4 < 32 ? D / 4 : 32;
  uint4 k_words[N];  // four tokens
  uint32_t v_words[N][2];
  uint32_t meta;       // lane t: of token t's key, lane kPart + t: of its value
  float scale[4 * N];  // of transformed keys
  float shift[4 * N];  // K_t is shift cos + turned sin
  float turned[4 * N];
  float v_shift[4 * N];

  __device__ static int dimension(int lane, int i) { return 4 * (lane + 32 * (i / 4)) + i % 4; }

  // slot: of the first token. Lanes without dimensions get zeros.
  __device__ void load(const WkvCudaParams& p, int head, const uint8_t* page, const PageLayout& layout, int slot,
                       int lane) {
    const int64_t metas = (lane < kPart ? layout.k_meta() : layout.v_meta()) + 4 * (slot + lane % kPart);
    meta = *reinterpret_cast<const uint32_t*>(page + metas);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const int group = lane + 32 * i;
      k_words[i] = {}, v_words[i][0] = v_words[i][1] = 0;
      if (lane >= kLanes) continue;
      k_words[i] = *reinterpret_cast<const uint4*>(page + layout.k_word(slot, group / 2));
#pragma unroll
      for (int b = 0; b < 2; ++b)
        v_words[i][b] = *reinterpret_cast<const uint32_t*>(page + layout.v_half(slot + 2 * b, group));
      const int64_t at = head * D + 4 * group;
      load4(p.query_scale + at, scale + 4 * i);
      load4(p.k_shift + at, shift + 4 * i);
      load4(p.k_turned + at, turned + 4 * i);
      load4(p.v_shift + at, v_shift + 4 * i);
    }
  }

  // The first `count` tokens to rows of `keys` and `values`, a token `stride` apart. rotation: rows of theirs; places:
  // of the lane's dimensions in one. kFirst: the first token is at position 0 and has shifts of its own.
  template <bool kFirst>
  __device__ void store(const WkvCudaParams& p, int head, int count, const float2 (*rotation)[D / 2 + 1],
                        const int (&places)[4 * N], __half* keys, __half* values, int64_t stride, int lane) const {
    // what a minimum is times in a rotated key, and in the first dimension of a rotated block
    const float minimum_of_all = p.hadamard ? 0 : 1, minimum_of_first = p.hadamard ? kBlock : 1;
    const int64_t row = head * D;
#pragma unroll
    for (int t = 0; t < kPart; t += 2) {
      if (t >= count) break;
      __half2 x[4 * N];
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const uint32_t a = (t ? k_words[i].z : k_words[i].x) >> (lane % 2 * 4);
        const uint32_t b = (t ? k_words[i].w : k_words[i].y) >> (lane % 2 * 4);
        x[4 * i] = codes_of<0>(a, b), x[4 * i + 1] = codes_of<1>(a, b);
        x[4 * i + 2] = codes_of<2>(a, b), x[4 * i + 3] = codes_of<3>(a, b);
      }
      if (p.hadamard) hadamard_codes<D>(x, lane);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float2 m = __half22float2(as_half2(__shfl_sync(kFull, meta, t + half)));
        const float2 n = __half22float2(as_half2(__shfl_sync(kFull, meta, kPart + t + half)));
        if (t + half >= count || lane >= kLanes) continue;
        const float all = m.y * minimum_of_all;
        float k[4 * N], v[4 * N];
#pragma unroll
        for (int i = 0; i < 4 * N; ++i) {
          k[i] = half ? __high2float(x[i]) : __low2float(x[i]);
          const uint32_t code = v_words[i / 4][t / 2] >> (half * 16 + i % 4 * 4) & 15;
          v[i] = fmaf(__int_as_float(code | 0x4b000000) - 8388608.0f, n.x, n.y + v_shift[i]);
        }
        if (N == 2 && p.hadamard)
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const float low = k[i], high = k[(4 + i) % (4 * N)];
            k[i] = low + high, k[(4 + i) % (4 * N)] = low - high;
          }
#pragma unroll
        for (int i = 0; i < 4 * N; ++i) {
          const float2 r = rotation[t + half][places[i]];
          const bool starts = i % 4 == 0 && dimension(lane, i) % kBlock == 0;
          const float s = kFirst ? p.k_first[row + dimension(lane, i)] : shift[i] * r.x + turned[i] * r.y;
          k[i] = fmaf(fmaf(k[i], m.x, starts ? m.y * minimum_of_first : all), scale[i], s);
          if (kFirst) v[i] += p.v_first[row + dimension(lane, i)] - v_shift[i];
        }
#pragma unroll
        for (int i = 0; i < N; ++i) {
          const int64_t at = (t + half) * stride + dimension(lane, 4 * i);
          store_finite(keys + at, k + 4 * i);
          store_finite(values + at, v + 4 * i);
        }
      }
    }
  }
};

template <int D, class T>
__global__ void __launch_bounds__(kWarps * 32, D == 256 ? 2 : 3)
    gather_kv(const __grid_constant__ WkvCudaGather a, const __grid_constant__ WkvCudaParams p) {
  __shared__ Rotation<D> rotation;
  const int seq = blockIdx.y, begin = a.query_start_loc[seq];
  const int past = a.seq_lens[seq] - (a.query_start_loc[seq + 1] - begin);
  const int64_t row = a.key_start_loc[seq] + static_cast<int64_t>(blockIdx.x) * kTile;
  const int64_t end = min(static_cast<int64_t>(a.key_start_loc[seq + 1]), a.num_keys);
  const int count = static_cast<int>(min(end - row, static_cast<int64_t>(kTile)));
  if (count <= 0) return;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int first = a.first[seq] + static_cast<int>(blockIdx.x) * kTile;
  const int64_t stride = static_cast<int64_t>(p.num_kv_heads) * D;
  __half *keys = a.keys + row * stride, *values = a.values + row * stride;

  const int old = min(max(past - first, 0), count);
  if (old > 0) {
    const PageLayout layout{D, a.block_size};
    const int64_t block = max(a.block_table[seq * a.block_table_stride + first / a.block_size], 0);
    const uint8_t* pages = a.kv_cache + min(block, a.num_blocks - 1) * a.block_stride;
    const int slot = first % a.block_size;
    const int parts = (old + kPart - 1) / kPart, units = p.num_kv_heads * parts;
    Part<D> part;
    auto load = [&](int unit) {
      const int head = unit / parts;
      part.load(p, head, pages + head * layout.nbytes(), layout, slot + unit % parts * kPart, lane);
    };
    if (warp < units) load(warp);
    for (int t = warp; t < old; t += kWarps) {
      for (int j = lane; j < p.rotary_pairs; j += 32)
        rotation.of[t][rotation.pair_at(j)] =
            cos_sin(static_cast<uint64_t>(first + t) * static_cast<uint64_t>(p.rope_turns[j]));
      if (lane == 0) rotation.of[t][D / 2] = {1, 0};
    }
    int places[4 * Part<D>::N];
#pragma unroll
    for (int i = 0; i < 4 * Part<D>::N; ++i) {
      const int d = part.dimension(lane, i), pairs = p.rotary_pairs;
      places[i] = d < pairs ? rotation.pair_at(d) : d < 2 * pairs ? rotation.pair_at(d - pairs) : D / 2;
    }
    __syncthreads();
    for (int unit = warp; unit < units; unit += kWarps) {
      if (unit != warp) load(unit);
      const int head = unit / parts, t = unit % parts * kPart;
      const int64_t at = t * stride + head * D;
      part.template store<false>(p, head, min(kPart, old - t), rotation.of + t, places, keys + at, values + at, stride,
                                 lane);
      if (p.k_first && first + t == 0)
        part.template store<true>(p, head, 1, rotation.of, places, keys + at, values + at, stride, lane);
    }
  }

  if (lane >= Part<D>::kLanes) return;
  for (int unit = warp; unit < (count - old) * p.num_kv_heads; unit += kWarps) {
    const int t = old + unit / p.num_kv_heads, head = unit % p.num_kv_heads;
    const int64_t token = begin + first + t - past;
    if (token >= a.num_tokens) break;
#pragma unroll
    for (int i = 0; i < groups_of_lane(D); ++i) {
      const int d = 4 * (lane + 32 * i);
      float k[4], v[4];
      load4(static_cast<const T*>(a.key) + token * a.key_stride[0] + head * a.key_stride[1] + d, k);
      load4(static_cast<const T*>(a.value) + token * a.value_stride[0] + head * a.value_stride[1] + d, v);
      store_finite(keys + t * stride + head * D + d, k);
      store_finite(values + t * stride + head * D + d, v);
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
  return with_head_size(p->head_size, [&](auto d) { return launch<d>(*a, *p, static_cast<cudaStream_t>(stream)); });
}
