// State and main loop of the prefill kernel; prefill.cuh says what it does. The parts that run() calls are in
// prefill_rows.cuh and prefill_past.cuh.
#pragma once

#include <climits>

#include "common.cuh"
#include "ptx.cuh"

namespace wkvquant {

template <int D>
struct PrefillShape {
  static constexpr int kHeadSize = D, kWarps = 4, kThreads = 32 * kWarps, kCtasPerSm = 2;
  static constexpr int kRows = 32 * kWarps;
  static constexpr int kStage = 64;        // tokens that are copied at a time, one tile of the page a warp
  static constexpr int kWords = D / 32;    // K words of a thread and token, V words of a thread and token pair
  static constexpr int kOutTiles = D / 8;  // n-tiles of the output
  // Bytes of a unit: K words [D / 8][32 tokens], V words [4][4 pairs][D / 4], (scale, minimum) of K and of V [32]. Each
  // of the first dimensions is padded such that the four threads of a row read from banks of their own.
  static constexpr int kKStride = 4 * kUnit + 32, kVStride = 4 * D + 32;
  static constexpr int kV = D / 8 * kKStride, kMeta = kV + 4 * kVStride, kUnitBytes = kMeta + 8 * kUnit;
};

struct PrefillShared {
  uint4*
      query;  // [warps][2][D / 16][32] operand A, in K's order of dimensions: 8w + (0, 2), (4, 6) over 16; (1, 3), ..
  uint4* pages;   // [2 stages][2 units][unit bytes]
  uint4* basis;   // [4][steps][2][2][32], as operand B of two n-tiles
  uint4* coef;    // [warps][steps][high, low][2][32] coefficients of the basis, operand A
  uint4* mix;     // [slots / 8][high, low][32] from the query's pairs to coefficients, operand B
  float2* shift;  // [2][slots] k_shift turned to the centre of a chunk, and of the next one
  float *unit, *total, *constant, *first_extra, *first_score, *shrink;  // [rows]

  template <class S>
  __host__ __device__ static int64_t carve(PrefillShared* s, char* base, int steps, int slots) {
    int64_t used = 0;
    auto take = [&](auto*& p, int64_t n) {
      if (base) p = reinterpret_cast<std::remove_reference_t<decltype(p)>>(base + used);
      used += (n * static_cast<int64_t>(sizeof(*p)) + 15) / 16 * 16;
    };
    constexpr int R = S::kRows;
    take(s->query, R * S::kHeadSize / 8), take(s->pages, 4 * S::kUnitBytes / 16);
    take(s->unit, R), take(s->total, R), take(s->constant, R);
    take(s->first_extra, R), take(s->first_score, R), take(s->shrink, R);
    take(s->basis, 4 * steps * 4 * 32), take(s->coef, S::kWarps * steps * 4 * 32), take(s->mix, slots * 8);
    take(s->shift, 2 * slots);
    return used;
  }
};

template <int D>
int64_t prefill_shared_bytes(const WkvCudaParams& p) {
  PrefillShared unused;
  const int steps = p.fast_steps + (p.slow_steps > 0), slots = 8 * (p.fast_steps + p.slow_steps);
  return PrefillShared::carve<PrefillShape<D>>(&unused, nullptr, steps, slots);
}

template <int D>
struct Prefill {
  using S = PrefillShape<D>;
  static_assert(S::kRows * D * 2 <= kCtaBytes);
  static constexpr int kRows = S::kRows, kWords = S::kWords;

  const WkvCudaAttention& a;
  const WkvCudaParams& p;
  PrefillShared s;
  const int warp, lane, g, t;
  const int group, steps, slots;
  const FastDivide tiles_per_block;

  struct Item {
    int seq, head, tile;       // tile: of query rows
    int past, query, queries;  // query: first token of the step in `query`
  } item;
  int rows;      // of the tile
  uint32_t low;  // bit i: low parts of step i of the shift matter to this warp

  // Of this warp's rows g, g + 8, g + 16 and g + 24; columns of the output are 2t and 2t + 1 of each n-tile.
  float acc[2][S::kOutTiles][4];
  float top[4], sum[4], min_sum[4], unit[4], total[4];

  struct Place {  // of a tile of 16 tokens
    int page, tile;
  };

  __device__ Prefill(const WkvCudaAttention& args, const WkvCudaParams& params, char* memory)
      : a(args),
        p(params),
        warp(threadIdx.x / 32),
        lane(threadIdx.x % 32),
        g(lane / 4),
        t(lane % 4),
        group(args.num_heads / params.num_kv_heads),
        steps(params.fast_steps + (params.slow_steps > 0)),
        slots(8 * (params.fast_steps + params.slow_steps)),
        tiles_per_block(args.block_size / kTile) {
    PrefillShared::carve<S>(&s, memory, steps, slots);
  }

  // prefill_rows.cuh
  template <class T>
  __device__ void prepare_rows();
  __device__ void start_rows();
  __device__ void turn_shift(int chunk);
  __device__ void make_mix(int chunk);
  __device__ void make_coefficients();

  // prefill_past.cuh
  __device__ __forceinline__ void load_meta(const char* from, uint32_t (&to)[8]) const;
  __device__ __forceinline__ void scores(const char* from, float (&c)[2][4][4]) const;
  template <bool kMirror>
  __device__ __forceinline__ void shift_scores(int group_of_basis, float (&c)[2][4][4]) const;
  __device__ __forceinline__ void softmax(const char* from, int first, int start, int latest, float (&c)[2][4][4],
                                          uint32_t (&weights)[2][2][4]);
  __device__ __forceinline__ void output(const char* from, const uint32_t (&weights)[2][2][4]);
  __device__ void finish() const;

  // The query's pairs of this CTA's rows, operand A: [warps][2][slots / 8][32]. What a thread reads its warp has
  // written.
  __device__ __forceinline__ uint4* scratch() const {
    char* base = static_cast<char*>(a.workspace) + kCounterBytes + blockIdx.x * kCtaBytes;
    return reinterpret_cast<uint4*>(base) + warp * (2 * slots * 4);
  }

  // Number of all row tiles of a head; `x` becomes that with number `index`, where there is one.
  __device__ int find(int index, Item& x) const {
    int before = 0;
    for (int base = 0; base < a.num_seqs; base += 32) {
      int query = 0, queries = 0;
      if (base + lane < a.num_seqs) {
        query = a.query_start_loc[base + lane];
        const int next = a.query_start_loc[base + lane + 1];
        queries = next > query && next <= a.num_tokens ? next - query : 0;
      }
      const int own = (queries * group + kRows - 1) / kRows;
      int scan = own;
#pragma unroll
      for (int m = 1; m < 32; m *= 2) {
        const int other = __shfl_up_sync(kFull, scan, m);
        if (lane >= m) scan += other;
      }
      const int at = __reduce_add_sync(kFull, before + scan <= index);
      if (at < 32) {
        x.seq = base + at;
        x.tile = index - before - __shfl_sync(kFull, scan - own, at);
        x.query = __shfl_sync(kFull, query, at);
        x.queries = __shfl_sync(kFull, queries, at);
        break;
      }
      before += __shfl_sync(kFull, scan, 31);
    }
    return before;
  }

  // This warp's tile of a stage.
  __device__ __forceinline__ Place locate(int stage) const {
    const int tile = min(stage * (S::kStage / kTile) + warp, (item.past - 1) / kTile), block = tiles_per_block(tile);
    return {__ldg(a.block_table + item.seq * a.block_table_stride + block),
            tile - block * static_cast<int>(tiles_per_block.divisor)};
  }

  __device__ __forceinline__ char* unit_at(int stage, int i) const {
    return reinterpret_cast<char*>(s.pages) + (stage % 2 * 2 + i) * S::kUnitBytes;
  }

  __device__ __forceinline__ void copy_tile(int stage, Place place) const {
    const uint32_t last = static_cast<uint32_t>(a.num_blocks) - 1;
    const uint8_t* from = a.kv_cache + min(static_cast<uint32_t>(place.page), last) * a.block_stride +
                          item.head * (a.block_size * (D + 8));
    const uint8_t *k = from + place.tile * (8 * D), *v = k + D / 2 * a.block_size;
    const uint8_t* meta = from + D * a.block_size + place.tile * (4 * kTile);
    char* to = unit_at(stage, warp / 2);
    const int half = warp % 2;
    const auto move = [&](int at, const uint8_t* data) {
      copy_async(reinterpret_cast<uint4*>(to + at), reinterpret_cast<const uint4*>(data));
    };
    constexpr int kRow = D / 16;  // pieces of 16 bytes of a token pair
#pragma unroll
    for (int i = lane; i < D / 2; i += 32) {
      move(i / 4 * S::kKStride + half * 64 + i % 4 * 16, k + i * 16);
      const int pair = half * 8 + i / kRow;
      move(S::kV + pair / 4 * S::kVStride + pair % 4 * D + i % kRow * 16, v + i * 16);
    }
    if (lane < 8)
      move(S::kMeta + lane / 4 * (4 * kUnit) + half * 64 + lane % 4 * 16,
           meta + lane / 4 * (4 * a.block_size) + lane % 4 * 16);
  }

  __device__ void run() {
    for (int i = threadIdx.x; i < steps * 512; i += S::kThreads) {
      const uint4 x = reinterpret_cast<const uint4*>(p.basis)[i];
      s.basis[i] = {x.x, x.z, x.y, x.w};
    }
    const int tiles = find(INT_MAX, item);
    for (int i = blockIdx.x; i < tiles * p.num_kv_heads; i += gridDim.x) {
      item.head = i / tiles;
      find(i - item.head * tiles, item);
      const int64_t most = static_cast<int64_t>(a.max_blocks) * a.block_size;
      item.past = static_cast<int>(min(static_cast<int64_t>(max(a.seq_lens[item.seq] - item.queries, 0)), most));
      rows = min(item.queries * group - item.tile * kRows, kRows);
      run_item();
    }
  }

  __device__ void run_item() {
    const int past = item.past, window = a.sliding_window;
    const int own = item.tile * kRows / group, last = (item.tile * kRows + rows - 1) / group;
    const int start = window ? max(past + own - window + 1, 0) : 0;  // the first position that a row sees
    const int latest = window ? past + last - window : INT_MIN / 2;  // the last that is hidden from one
    const int begin = start / S::kStage, end = start < past ? (past + S::kStage - 1) / S::kStage : begin;
    __syncthreads();
    Place next = {0, 0};
    if (begin < end) {
      copy_tile(begin, locate(begin));
      next = locate(begin + 1);
      if (steps) turn_shift(begin * S::kStage / kChunk);
    }
    if (a.dtype == kBFloat16)
      prepare_rows<__nv_bfloat16>();
    else
      prepare_rows<__half>();
    start_rows();
#pragma unroll 1
    for (int stage = begin; stage < end; ++stage) {
      wait_for_copies();
      __syncthreads();
      if (stage + 1 < end) {
        copy_tile(stage + 1, next);
        next = locate(stage + 2);
      }
      const int chunk = stage * S::kStage / kChunk;
      if (steps && (stage == begin || stage * S::kStage % kChunk == 0)) {
        make_mix(chunk);
        __syncthreads();
        turn_shift(chunk + 1);
        make_coefficients();
      }
#pragma unroll 1
      for (int i = 0; i < S::kStage / kUnit; ++i) {
        const int first = stage * S::kStage + i * kUnit, of_chunk = first / kUnit % (kChunk / kUnit);
        if (first >= past) break;
        const char* from = unit_at(stage, i);
        float c[2][4][4];
        uint32_t weights[2][2][4];
        scores(from, c);
        if (of_chunk < kChunk / kUnit / 2)
          shift_scores<true>(3 - of_chunk, c);
        else
          shift_scores<false>(of_chunk - 4, c);
        softmax(from, first, start, latest, c, weights);
        output(from, weights);
      }
    }
    finish();
  }
};

}  // namespace wkvquant
