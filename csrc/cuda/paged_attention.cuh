// Past tokens from the page and the step's own tokens as they came -> output.
//
//     item      (sequence, KV head, row tile); row = query token x query head of the group, up to 8 * NT rows a tile
//     unit      32 past tokens of an item; eight in a row, a chunk, share the coefficients of the shift
//     CTA       an equal run of the list of all units of all items; an item that straddles CTAs is combined by
//               whichever of them finishes last, through the workspace
//     warp      an equal run of the CTA's units of an item, with a softmax state of its own
//
// Several CTAs share an SM, so that the start and the end of one's items overlap with the others' products.
//
// The grid is fixed and the list is derived from seq_lens on the device: a captured graph may be replayed with other
// lengths. Nothing at or after the past's length, and nothing before a window, can reach the output.
//
// Products are mma.sync m16n8k16 with tokens (scores) or dimensions (output) as M and rows as N. Codes enter as fp16
// subnormals, the bits of a nibble as they stand (code * 2^-24) or four higher (code * 2^-20); the factor 16 between
// the two is folded into the query and the output. The loads of a page match the operands of the products, so they go
// to registers, one unit ahead, and never through shared memory:
//
//     K   thread (g, t) = (lane / 4, lane % 4) has tokens 4g .. 4g + 3, words t, t + 4, ..; the first product of a
//         unit has tokens 4g and 4g + 1 as its rows g and g + 8, the second one 4g + 2 and 4g + 3
//     V   thread (g, t) has token pairs 4t .. 4t + 3, D / 32 words by g; the first product takes pairs 4t and 4t + 2
//
// The shift's part of the score is a third product: basis of the position times coefficients of the query, each split
// into two fp16 (three products), which is exact to about 2^-22 of the largest coefficient.
//
// Scores are in units of log 2. The subtracted maximum is lowered by kBoost, so that small weights stay above fp16's
// smallest; it cancels.
#pragma once

#include <algorithm>
#include <climits>

#include "common.cuh"

namespace wkvquant {

constexpr int kChunk = 256;
constexpr int kUnit = 32;
constexpr float kBoost = 4;
constexpr float kLowest = -1e30f;
constexpr float kLog2e = 1.44269504088896341f;
constexpr float kLn2 = 0.693147180559945309f;

template <int D, int NT>
struct Shape {
  static constexpr int kHeadSize = D, kTiles = NT, kRows = 8 * NT;
  static constexpr int kWarps = D > 128 ? 8 : NT == 1 ? 6 : 4;
  static constexpr int kCtasPerSm = D > 128 ? 1 : 2;
  static constexpr int kRedSlots = kWarps / (NT * D > 256 ? 4 : 2);
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kKWords = D / 32;  // K words of a thread and token
  static constexpr int kVWords = D / 32;  // V words of a thread and token pair
  static constexpr int kMTiles = D / 16;
  static constexpr bool kQueryInRegisters = NT * D <= 128;
  static constexpr int kPitch = D + 4;

  // First of the two dimensions (d, d + 1) that thread row g has in m-tile `m` of the output.
  __device__ static __forceinline__ int dimension(int m, int g) { return 4 * word(m / 2, g) + 2 * (m % 2); }
  // V word c of thread row g.
  __device__ static __forceinline__ int word(int c, int g) {
    if constexpr (D == 64) return 2 * g + c;
    if constexpr (D == 96) return g + 8 * c;
    return 4 * g + c % 4 + c / 4 * 32;
  }
};

struct Shared {
  uint4* basis;      // [4][steps][2][2][32]
  uint4* query;      // [rows][D / 8], the 8 dimensions of a word in the order 0 2 4 6 1 3 5 7, 4 .. 7 over 16
  uint4* coef;       // [warps][NT][steps][32]
  float2* ab;        // [rows][slots] coefficients of cos and sin at position 0
  float2* angle;     // [warps][slots] cos and sin at the chunk's centre
  float* v_shift;    // [D]
  float* raw;        // [rows][D] the query, then the current tokens' part of the output
  float* red;        // [kRedSlots][rows][pitch]
  uint4* chebyshev;  // [slow steps][2][32]
  float *factor, *total, *shift_factor, *constant;  // [rows]
  float *first_extra, *first_score;                 // [rows] what position 0 has more, and its score
  float *current_max, *current_sum;                 // [rows]
  float *row_max, *row_sum, *row_past, *row_min;    // [rows]
  float *warp_max, *warp_sum, *warp_min;            // [warps][rows]
  int* prefix;                                      // [num_seqs + 1] units before a sequence
  int64_t* turns;                                   // [slots]
  int4* sequence;                                   // [num_seqs] past, first query, queries
  int* misc;                                        // [4]

  template <class S>
  __host__ __device__ static int64_t carve(Shared* s, char* base, int steps, int slots, int slow_steps, int num_seqs) {
    int64_t used = 0;
    auto take = [&](auto*& p, int64_t n) {
      if (base) p = reinterpret_cast<std::remove_reference_t<decltype(p)>>(base + used);
      used += (n * static_cast<int64_t>(sizeof(*p)) + 15) / 16 * 16;
    };
    constexpr int R = S::kRows, W = S::kWarps, D = S::kHeadSize;
    // what has a fixed size comes first, so that its offsets are constants
    take(s->query, R * D / 8), take(s->v_shift, D), take(s->raw, R * D), take(s->red, S::kRedSlots * R * S::kPitch);
    take(s->factor, R), take(s->total, R), take(s->shift_factor, R), take(s->constant, R);
    take(s->first_extra, R), take(s->first_score, R), take(s->current_max, R), take(s->current_sum, R);
    take(s->row_max, R), take(s->row_sum, R), take(s->row_past, R), take(s->row_min, R);
    take(s->warp_max, W * R), take(s->warp_sum, W * R), take(s->warp_min, W * R), take(s->misc, 4);
    take(s->basis, 4 * steps * 4 * 32), take(s->coef, W * S::kTiles * steps * 32), take(s->chebyshev, slow_steps * 64);
    take(s->ab, R * slots), take(s->angle, W * slots), take(s->turns, slots);
    take(s->prefix, num_seqs + 1), take(s->sequence, num_seqs);
    return used;
  }
};

// Partial results in the workspace: counters [kMaxCtas], then two slots a CTA of [rows][D] numerators, [rows] maxima
// and [rows] sums. Slot 1 is of an item whose first units are this CTA's, slot 0 of one that began before.
constexpr int64_t kCounterBytes = kMaxCtas * sizeof(int);
constexpr int64_t partial_floats(int rows, int d) { return static_cast<int64_t>(rows) * (d + 2); }

__device__ __forceinline__ void mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                    uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ __forceinline__ uint32_t transpose(uint32_t x) {
  uint32_t y;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Page data is read once.
template <int N>
__device__ __forceinline__ void load_words(const uint8_t* p, uint32_t* w) {
  if constexpr (N == 4)
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3])
                 : "l"(p));
  else if constexpr (N == 2)
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v2.u32 {%0,%1}, [%2];" : "=r"(w[0]), "=r"(w[1]) : "l"(p));
  else
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.u32 %0, [%1];" : "=r"(w[0]) : "l"(p));
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

__device__ __forceinline__ float power_of_two(int e) { return __int_as_float((e + 127) << 23); }

// Power of two that brings x to [2^13, 2^14), as its exponent.
__device__ __forceinline__ int scale_exponent(float x) {
  return min(max((__float_as_int(x) >> 23) - (127 + 13), -80), 80);
}

// Division by a small constant, exact for numerators below 2^17 and divisors below 2^15.
struct FastDivide {
  uint32_t divisor, reciprocal;
  __device__ explicit FastDivide(uint32_t d) : divisor(d), reciprocal(d == 1 ? 0 : 0xffffffffu / d + 1) {}
  __device__ __forceinline__ uint32_t operator()(uint32_t n) const { return reciprocal ? __umulhi(n, reciprocal) : n; }
};

struct Plan {
  int units;  // of all items
  int ctas;   // that have any
  __device__ int start(int cta) const { return static_cast<int>(static_cast<int64_t>(units) * cta / ctas); }
  __device__ int cta_of(int u) const { return static_cast<int>((static_cast<int64_t>(u + 1) * ctas - 1) / units); }
};

struct Item {
  int seq, head, tile;       // tile: of query rows
  int past, query, queries;  // query: first token of the step in `query`
  int first;                 // unit, counted from position 0, that its unit 0 is
  int begin, end, units;     // this CTA's units, and how many the item has
  int u;                     // the item's unit 0 in the list of all units
};

__device__ __forceinline__ int first_visible(int past, int window) { return window ? max(past - window + 1, 0) : 0; }

__device__ __forceinline__ int units_of(int past, int window) {
  return max((past + kUnit - 1) / kUnit - first_visible(past, window) / kUnit, 1);
}

// The item of unit `u`, and its units from there up to `end`. Not inlined: it runs seldom, and code costs time, too.
static __device__ __noinline__ Item decode(const int* prefix, const int4* sequence, int num_seqs, int window, int group,
                                           int rows_of_tile, int u, int end) {
  Item x;
  int low = 0, high = num_seqs - 1;  // the last sequence whose prefix is <= u: it has units
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (prefix[middle] <= u)
      low = middle;
    else
      high = middle - 1;
  }
  x.seq = low;
  const int4 lengths = sequence[low];
  x.past = lengths.x, x.query = lengths.y, x.queries = lengths.z;
  x.units = units_of(x.past, window);
  x.first = first_visible(x.past, window) / kUnit;
  const int inside = u - prefix[low], index = inside / x.units;
  const int tiles = (x.queries * group + rows_of_tile - 1) / rows_of_tile;
  x.head = index / tiles;
  x.tile = index - x.head * tiles;
  x.begin = inside - index * x.units;
  x.end = min(x.units, x.begin + end - u);
  x.u = u - x.begin;
  return x;
}

static __device__ __noinline__ void store_row4(void* out, int dtype, int64_t at, float4 x, float factor) {
  store_element(out, dtype, at, x.x * factor);
  store_element(out, dtype, at + 1, x.y * factor);
  store_element(out, dtype, at + 2, x.z * factor);
  store_element(out, dtype, at + 3, x.w * factor);
}

template <int D, int NT>
struct Kernel {
  using S = Shape<D, NT>;
  static constexpr int kWarps = S::kWarps, kRows = S::kRows;

  const WkvCudaAttention& a;
  const WkvCudaParams& p;
  Shared s;
  const int warp, lane, g, t;
  const int group, steps, slots;
  const FastDivide tiles_per_block;
  const uint32_t page_bytes, block_stride;  // of a (block, head), of a block

  // Of the row tile.
  Item item;
  int rows;
  uint32_t q[S::kQueryInRegisters ? NT : 1][S::kQueryInRegisters ? S::kKWords : 1][4];
  float factor[NT][2], total[NT][2], shift_factor[NT][2], constant[NT][2];
  // Softmax state of this warp: columns are rows 2t, 2t + 1 of each n-tile.
  float acc[S::kMTiles][NT][4];
  float top[NT][2], sum[NT][2], min_sum[NT][2];

  // Walks this warp's units over all of the CTA's items. The page is that of this lane's tile of K; the lane's tile of
  // V, which may be another one, is looked up in the other lanes.
  struct Cursor {
    int next_unit;  // of the list of all units
    int segment;    // items so far, INT_MAX: at the end
    int seq, head, past, first;
    int unit, end;  // of the item, this warp's
    int page, tile;
  };

  __device__ Kernel(const WkvCudaAttention& args, const WkvCudaParams& params, char* memory)
      : a(args),
        p(params),
        warp(threadIdx.x / 32),
        lane(threadIdx.x % 32),
        g(lane / 4),
        t(lane % 4),
        group(args.num_heads / params.num_kv_heads),
        steps(params.fast_steps + (params.slow_steps > 0)),
        slots(8 * (params.fast_steps + params.slow_steps)),
        tiles_per_block(args.block_size / kTile),
        page_bytes(args.block_size * (D + 8)),
        block_stride(static_cast<uint32_t>(args.block_stride)) {
    Shared::carve<S>(&s, memory, steps, slots, params.slow_steps, args.num_seqs);
  }

  __device__ __forceinline__ int tiles_of(int queries) const { return (queries * group + kRows - 1) / kRows; }

  // Lengths of the sequences and the units before each. An item costs about as much as four units.
  __device__ void make_plan() {
    if (warp == 0) {
      const int64_t most = static_cast<int64_t>(a.max_blocks) * a.block_size;
      int before = 0, items = 0;
      for (int i = lane; i - lane < a.num_seqs; i += 32) {
        int units = 0;
        if (i < a.num_seqs) {
          const int query = a.query_start_loc[i], next = a.query_start_loc[i + 1], length = a.seq_lens[i];
          const int queries = next > query && next <= a.num_tokens ? next - query : 0;
          const int past = static_cast<int>(min(static_cast<int64_t>(max(length - queries, 0)), most));
          const int own = tiles_of(queries) * p.num_kv_heads;
          items += own;
          units = own ? units_of(past, a.sliding_window) * own : 0;
          s.sequence[i] = {past, query, queries, 0};
        }
        int scan = units;
#pragma unroll
        for (int m = 1; m < 32; m *= 2) {
          const int other = __shfl_up_sync(kFull, scan, m);
          if (lane >= m) scan += other;
        }
        if (i < a.num_seqs) s.prefix[i] = before + scan - units;
        before += __shfl_sync(kFull, scan, 31);
      }
      items = __reduce_add_sync(kFull, items);
      if (lane == 0) s.prefix[a.num_seqs] = before, s.misc[0] = items;
    }
    __syncthreads();
  }

  __device__ Plan read_plan() const {
    Plan plan;
    plan.units = s.prefix[a.num_seqs];
    plan.ctas = min(static_cast<int>(gridDim.x), max(s.misc[0], (plan.units + 3) / 4));
    return plan;
  }

  __device__ __forceinline__ Item decode_at(int u, int end) const {
    return decode(s.prefix, s.sequence, a.num_seqs, a.sliding_window, group, kRows, u, end);
  }

  __device__ __forceinline__ void advance(Cursor& c, int end_unit) const {
    ++c.unit;
    while (c.unit >= c.end || (c.first + c.unit) * kUnit >= c.past) {
      if (c.next_unit >= end_unit) {
        c.segment = INT_MAX;
        return;
      }
      const Item x = decode_at(c.next_unit, end_unit);
      ++c.segment;
      const int count = x.end - x.begin;
      c.next_unit += count;
      c.unit = x.begin + count * warp / kWarps;
      c.end = x.begin + count * (warp + 1) / kWarps;
      c.seq = x.seq, c.head = x.head, c.past = x.past, c.first = x.first;
    }
    const int tile = min((c.first + c.unit) * (kUnit / kTile) + g / 4, (c.past - 1) / kTile);
    const int block = tiles_per_block(tile);
    c.tile = tile - block * tiles_per_block.divisor;
    c.page = __ldg(a.block_table + c.seq * a.block_table_stride + block);
  }

  __device__ __forceinline__ const uint8_t* slice(const Cursor& c, int page) const {
    const uint32_t last = static_cast<uint32_t>(a.num_blocks) - 1;
    return a.kv_cache + static_cast<uint64_t>(min(static_cast<uint32_t>(page), last)) * block_stride +
           c.head * page_bytes;
  }

  // Words t, t + 4, .. of tokens 4g .. 4g + 3.
  __device__ __forceinline__ void load_k(const Cursor& c, uint32_t (&k)[S::kKWords][4]) const {
    const uint8_t* base = slice(c, c.page) + c.tile * (8 * D) + t * 64 + g % 4 * 16;
#pragma unroll
    for (int j = 0; j < S::kKWords; ++j) load_words<4>(base + j * 256, k[j]);
  }

  __device__ __forceinline__ void load_meta(const Cursor& c, uint32_t (&k)[4], uint32_t (&v)[4]) const {
    const uint8_t* base = slice(c, c.page) + D * a.block_size + c.tile * (4 * kTile) + g % 4 * 16;
    load_words<4>(base, k);
    load_words<4>(base + 4 * a.block_size, v);
  }

  // Words of token pairs 4t .. 4t + 3.
  __device__ __forceinline__ void load_v(const Cursor& c, uint32_t (&v)[4][S::kVWords]) const {
    const int from = t / 2 * 16, page = __shfl_sync(kFull, c.page, from), tile = __shfl_sync(kFull, c.tile, from);
    const uint8_t* base = slice(c, page) + D / 2 * a.block_size + tile * (8 * D) + t % 2 * (4 * D) + 4 * S::word(0, g);
    constexpr int kRun = D == 64 ? 2 : D == 96 ? 1 : 4;
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int c = 0; c < S::kVWords; c += kRun)
        load_words<kRun>(base + i * D + 4 * (S::word(c, 0) - S::word(0, 0)), v[i] + c);
  }

  // ---- rows of an item -------------------------------------------------------------------------------------------

  // Query rows as operands, coefficients of the shift, and the step's own tokens.
  template <class T>
  __device__ void prepare_rows(bool with_current) {
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
        for (int i = lane; i < D; i += 32) operand[i] = __half();
        for (int i = lane; i < slots; i += 32) s.ab[r * slots + i] = {0, 0};
        if (lane == 0) {
          s.factor[r] = s.total[r] = s.shift_factor[r] = s.constant[r] = s.current_sum[r] = 0;
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
        s.factor[r] = power_of_two(e + 24);
        s.total[r] = together * power_of_two(e);
        s.shift_factor[r] = power_of_two(f);
        s.constant[r] = fixed;
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

  __device__ void start_rows() {
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
        const int r = 8 * n + 2 * t + c;
        factor[n][c] = s.factor[r], total[n][c] = s.total[r];
        shift_factor[n][c] = s.shift_factor[r], constant[n][c] = s.constant[r];
        top[n][c] = kLowest, sum[n][c] = 0, min_sum[n][c] = 0;
      }
#pragma unroll
    for (int m = 0; m < S::kMTiles; ++m)
#pragma unroll
      for (int n = 0; n < NT; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) acc[m][n][i] = 0;
  }

  // ---- past tokens -----------------------------------------------------------------------------------------------

  // The angle at the chunk's centre, which is half a position before its position kChunk / 2.
  __device__ static __forceinline__ uint64_t angle_at(int chunk, int64_t turns) {
    return static_cast<uint64_t>(chunk * kChunk + kChunk / 2 - 1) * static_cast<uint64_t>(turns) +
           static_cast<uint64_t>(turns >> 1);
  }

  // Coefficients of the basis for the chunk, as operand B.
  __device__ __forceinline__ void make_coefficients(int chunk, uint4* coef) {
    float2* angle = s.angle + warp * slots;
    __syncwarp();
    for (int i = lane; i < slots; i += 32) angle[i] = cos_sin(angle_at(chunk, s.turns[i]));
    __syncwarp();
#pragma unroll 1
    for (int n = 0; n < NT; ++n) {
      const float2* ab = s.ab + (8 * n + g) * slots;
      const auto rotated = [&](int step) -> uint4 {
        uint4 w;
        const float2 c = ab[8 * step + t], r = angle[8 * step + t], d = ab[8 * step + t + 4],
                     q = angle[8 * step + t + 4];
        split_half2(c.x * r.x + c.y * r.y, c.y * r.x - c.x * r.y, w.x, w.z);
        split_half2(d.x * q.x + d.y * q.y, d.y * q.x - d.x * q.y, w.y, w.w);
        return w;
      };
      uint4* out = coef + n * steps * 32 + lane;
#pragma unroll 1
      for (int i = 0; i < p.fast_steps; ++i) out[i * 32] = rotated(i);
      if (p.slow_steps == 0) continue;
      float c[4] = {}, correction[4] = {};
#pragma unroll 1
      for (int i = 0; i < p.slow_steps; ++i) {
        const uint4 w = rotated(p.fast_steps + i);
        const uint4 high = s.chebyshev[i * 64 + lane], low = s.chebyshev[i * 64 + 32 + lane];
        mma(c, high.x, high.y, high.z, high.w, w.x, w.y);
        mma(correction, high.x, high.y, high.z, high.w, w.z, w.w);
        mma(correction, low.x, low.y, low.z, low.w, w.x, w.y);
      }
      uint4 x;  // degrees are rows here and must become the rows of operand B
      split_half2(c[0] + correction[0], c[1] + correction[1], x.x, x.z);
      split_half2(c[2] + correction[2], c[3] + correction[3], x.y, x.w);
      out[p.fast_steps * 32] = {transpose(x.x), transpose(x.y), transpose(x.z), transpose(x.w)};
    }
    __syncwarp();
  }

  __device__ __forceinline__ void scores(const uint32_t (&k)[S::kKWords][4], float (&c)[2][NT][4]) const {
    constexpr uint32_t kLow = 0x000f000f, kHigh = 0x00f000f0;
#pragma unroll
    for (int x = 0; x < 2; ++x)
#pragma unroll
      for (int n = 0; n < NT; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) c[x][n][i] = 0;
#pragma unroll
    for (int j = 0; j < S::kKWords; ++j) {
      uint32_t b[NT][4];
#pragma unroll
      for (int n = 0; n < NT; ++n) {
        if constexpr (S::kQueryInRegisters) {
#pragma unroll
          for (int i = 0; i < 4; ++i) b[n][i] = q[n][j][i];
        } else {
          const uint4 w = s.query[(8 * n + g) * (D / 8) + t + 4 * j];
          b[n][0] = w.x, b[n][1] = w.y, b[n][2] = w.z, b[n][3] = w.w;
        }
      }
#pragma unroll
      for (int u = 0; u < 2; ++u)
#pragma unroll
        for (int x = 0; x < 2; ++x) {
          const uint32_t w0 = k[j][2 * x] >> (8 * u), w1 = k[j][2 * x + 1] >> (8 * u);
#pragma unroll
          for (int n = 0; n < NT; ++n)
            mma(c[x][n], w0 & kLow, w1 & kLow, w0 & kHigh, w1 & kHigh, b[n][2 * u], b[n][2 * u + 1]);
        }
    }
  }

  __device__ __forceinline__ void shift_scores(int first, const uint4* coef, float (&c)[2][NT][4]) const {
    float correction[2][NT][4];  // a chain of products of its own
#pragma unroll
    for (int x = 0; x < 2; ++x)
#pragma unroll
      for (int n = 0; n < NT; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) c[x][n][i] = correction[x][n][i] = 0;
    // The basis is tabulated for the second half of the chunk. Cosines and even polynomials are the same in the first,
    // sines and odd polynomials, the high halves of the coefficients, change sign, and tokens come in reverse order.
    const int unit = first / kUnit % (kChunk / kUnit);
    const bool mirror = unit < kChunk / kUnit / 2;
    const uint32_t sign = mirror ? 0x80000000 : 0;
    const uint4* basis = s.basis + (mirror ? 3 - unit : unit - 4) * (steps * 128) + (mirror ? lane ^ 28 : lane);
#pragma unroll 2
    for (int i = 0; i < steps; ++i) {
      uint4 b[NT];
#pragma unroll
      for (int n = 0; n < NT; ++n) {
        b[n] = coef[(n * steps + i) * 32 + lane];
        b[n].x ^= sign, b[n].y ^= sign, b[n].z ^= sign, b[n].w ^= sign;
      }
      uint4 high[2], low[2];
#pragma unroll
      for (int x = 0; x < 2; ++x) high[x] = basis[i * 128 + x * 64], low[x] = basis[i * 128 + x * 64 + 32];
#pragma unroll
      for (int n = 0; n < NT; ++n) {
#pragma unroll
        for (int x = 0; x < 2; ++x) mma(c[x][n], high[x].x, high[x].y, high[x].z, high[x].w, b[n].x, b[n].y);
#pragma unroll
        for (int x = 0; x < 2; ++x) mma(correction[x][n], high[x].x, high[x].y, high[x].z, high[x].w, b[n].z, b[n].w);
#pragma unroll
        for (int x = 0; x < 2; ++x) mma(correction[x][n], low[x].x, low[x].y, low[x].z, low[x].w, b[n].x, b[n].y);
      }
    }
#pragma unroll
    for (int n = 0; n < NT; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float one = c[0][n][i] + correction[0][n][i], other = c[1][n][i ^ 2] + correction[1][n][i ^ 2];
        c[0][n][i] = mirror ? other : one;
        c[1][n][i ^ 2] = mirror ? one : other;
      }
  }

  // Scores to weights p * scale_v as operand B of the output's products; keeps the softmax state.
  __device__ __forceinline__ void softmax(int first, int past, int latest, uint32_t (&k_meta)[4], uint32_t (&v_meta)[4],
                                          float (&c)[2][NT][4], const float (&shift)[2][NT][4],
                                          uint32_t (&weights)[2][NT][2]) {
    float2 k[4], v[4];  // (scale, minimum)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      k[i] = __half22float2(*reinterpret_cast<const __half2*>(&k_meta[i]));
      v[i] = __half22float2(*reinterpret_cast<const __half2*>(&v_meta[i]));
    }
#pragma unroll
    for (int n = 0; n < NT; ++n)
#pragma unroll
      for (int j = 0; j < 2; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float& x = c[i / 2][n][i % 2 * 2 + j];
          x = fmaf(x * k[i].x, factor[n][j], fmaf(k[i].y, total[n][j], constant[n][j]));
          x = fmaf(shift[i / 2][n][i % 2 * 2 + j], shift_factor[n][j], x);
        }
    if (first == 0 && p.k_extra && g == 0)
#pragma unroll
      for (int n = 0; n < NT; ++n)
#pragma unroll
        for (int j = 0; j < 2; ++j) c[0][n][j] += s.first_extra[8 * n + 2 * t + j];
    if (first + kUnit > past || first <= latest) {
      const int last_row = s.misc[1], rows = s.misc[3];
      const int start = first_visible(past, a.sliding_window);
      const int token = first + 4 * g;
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (token + i >= past || token + i < start) v[i] = {0, 0};
#pragma unroll
      for (int n = 0; n < NT; ++n)
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int hidden = latest - (last_row / group - (last_row - rows + 1 + 8 * n + 2 * t + j) / group);
#pragma unroll
          for (int i = 0; i < 4; ++i)
            if (token + i >= past || token + i <= hidden) c[i / 2][n][i % 2 * 2 + j] = -INFINITY;
        }
    }
    if (first == 0 && g == 0)
#pragma unroll
      for (int n = 0; n < NT; ++n)
#pragma unroll
        for (int j = 0; j < 2; ++j) s.first_score[8 * n + 2 * t + j] = c[0][n][j];
    float next[NT][2];
    bool changed = false;
#pragma unroll
    for (int n = 0; n < NT; ++n)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        float x = fmaxf(fmaxf(c[0][n][j], c[0][n][2 + j]), fmaxf(c[1][n][j], c[1][n][2 + j]));
#pragma unroll
        for (int m = 4; m < 32; m *= 2) x = fmaxf(x, __shfl_xor_sync(kFull, x, m));
        next[n][j] = fmaxf(top[n][j], x - kBoost);
        changed |= next[n][j] != top[n][j];
      }
    if (__any_sync(kFull, changed)) {
#pragma unroll
      for (int n = 0; n < NT; ++n)
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const float keep = exp2_fast(top[n][j] - next[n][j]);
          top[n][j] = next[n][j];
          sum[n][j] *= keep, min_sum[n][j] *= keep;
#pragma unroll
          for (int m = 0; m < S::kMTiles; ++m) acc[m][n][j] *= keep, acc[m][n][2 + j] *= keep;
        }
    }
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      uint32_t w[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float x[2];
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          x[j] = exp2_fast(c[i / 2][n][i % 2 * 2 + j] - top[n][j]);
          sum[n][j] += x[j];
          min_sum[n][j] = fmaf(x[j], v[i].y, min_sum[n][j]);
          x[j] *= v[i].x;
        }
        w[i] = transpose(pack_half2(x[0], x[1]));
      }
#pragma unroll
      for (int x = 0; x < 2; ++x) {
        weights[x][n][0] = __byte_perm(w[2 * x], w[2 * x + 1], 0x5410);
        weights[x][n][1] = __byte_perm(w[2 * x], w[2 * x + 1], 0x7632);
      }
    }
  }

  __device__ __forceinline__ void output(const uint32_t (&v)[4][S::kVWords], const uint32_t (&weights)[2][NT][2]) {
    constexpr uint32_t kLow = 0x000f000f, kHigh = 0x00f000f0;
#pragma unroll
    for (int x = 0; x < 2; ++x)
#pragma unroll
      for (int c = 0; c < S::kVWords; ++c)
#pragma unroll
        for (int u = 0; u < 2; ++u) {
          const uint32_t w0 = v[x][c] >> (8 * u), w1 = v[x + 2][c] >> (8 * u);
#pragma unroll
          for (int n = 0; n < NT; ++n)
            mma(acc[2 * c + u][n], w0 & kLow, w0 & kHigh, w1 & kLow, w1 & kHigh, weights[x][n][0], weights[x][n][1]);
        }
  }

  // ---- end of an item --------------------------------------------------------------------------------------------

  __device__ void write_row4(int r, int d, float4 x, float inverse) const {
    const int row = item.tile * kRows + r;
    const int64_t at =
        (item.query + row / group) * a.out_stride[0] + (item.head * group + row % group) * a.out_stride[1] + d;
    store_row4(a.out, a.dtype, at, x, inverse);
  }

  __device__ void write_lse(int r, float top_of_row, float sum_of_row) const {
    if (!a.lse) return;
    const int row = item.tile * kRows + r;
    a.lse[(item.query + row / group) * a.lse_stride[0] + (item.head * group + row % group) * a.lse_stride[1]] =
        (top_of_row + __log2f(sum_of_row)) * kLn2;
  }

  __device__ float* partial(int cta, int slot) const {
    return reinterpret_cast<float*>(static_cast<char*>(a.workspace) + kCounterBytes) +
           (2 * cta + slot) * partial_floats(kRows, D);
  }

  __device__ void finish(bool with_current) {
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
      float4 x = {fmaf(shift.x, past, low), fmaf(shift.y, past, low), fmaf(shift.z, past, low),
                  fmaf(shift.w, past, low)};
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
  __device__ void combine() {
    const Plan plan = read_plan();
    const int first = plan.cta_of(item.u), last = plan.cta_of(item.u + item.units - 1), parts = last - first + 1;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
      int* counter = static_cast<int*>(a.workspace) + first;
      const int before = atomicAdd(counter, 1);
      s.misc[2] = before == parts - 1;
      if (before == parts - 1) *counter = 0;
      __threadfence();
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
#pragma unroll 4
      for (int c = parts * split / splits; c < end; ++c) {
        const float* part = partial(first + c, c == 0);
        const float f = exp2_fast(__ldcg(part + kRows * D + r) - high);
        const float4 y = __ldcg(reinterpret_cast<const float4*>(part + r * D + d));
        x.x += f * y.x, x.y += f * y.y, x.z += f * y.z, x.w += f * y.w;
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

  __device__ void copy_async(uint4* to, const uint32_t* from, int count) const {
    for (int i = threadIdx.x; i < count; i += S::kThreads)
      asm volatile(
          "cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(to + i))),
          "l"(reinterpret_cast<const uint4*>(from) + i));
  }

  __device__ void run() {
    copy_async(s.basis, p.basis, steps * 512);
    copy_async(s.chebyshev, p.chebyshev, p.slow_steps * 64);
    copy_async(reinterpret_cast<uint4*>(s.turns), reinterpret_cast<const uint32_t*>(p.slot_turns), slots / 2);
    make_plan();
    const Plan plan = read_plan();
    if (static_cast<int>(blockIdx.x) >= plan.ctas) return;
    const int begin = plan.start(blockIdx.x), end = plan.start(blockIdx.x + 1);

    Cursor cursor;  // of the unit that is in registers or on its way there
    cursor.next_unit = begin, cursor.segment = -1;
    cursor.unit = cursor.end = cursor.first = cursor.past = 0;
    uint32_t k[S::kKWords][4], v[4][S::kVWords], k_meta[4], v_meta[4];
    advance(cursor, end);
    int now = cursor.segment, now_first = (cursor.first + cursor.unit) * kUnit;
    if (now != INT_MAX) {
      load_k(cursor, k);
      load_meta(cursor, k_meta, v_meta);
      load_v(cursor, v);
      advance(cursor, end);
    }
    uint4* coef = s.coef + warp * (NT * steps * 32);
    int segment = 0;
    for (int u = begin; u < end; ++segment) {
      item = decode_at(u, end);
      const bool with_current = item.end == item.units;
      if (a.dtype == kBFloat16)
        prepare_rows<__nv_bfloat16>(with_current);
      else if (a.dtype == kFloat16)
        prepare_rows<__half>(with_current);
      else
        prepare_rows<float>(with_current);
      if (segment == 0) asm volatile("cp.async.wait_all;" ::: "memory");
      const int past = item.past, last_row = item.tile * kRows + rows - 1;
      // the last row of the tile hides the most of a window
      const int latest = a.sliding_window ? past + last_row / group - a.sliding_window : INT_MIN / 2;
      if (threadIdx.x == 0) s.misc[1] = last_row, s.misc[3] = rows;
      __syncthreads();
      start_rows();
      int chunk = -1;
      while (now == segment) {
        if (steps && now_first / kChunk != chunk) {
          chunk = now_first / kChunk;
          make_coefficients(chunk, coef);
        }
        float c[2][NT][4], shift[2][NT][4];
        uint32_t weights[2][NT][2];
        const bool more = cursor.segment != INT_MAX;
        scores(k, c);
        if (more) load_k(cursor, k);
        shift_scores(now_first, coef, shift);
        softmax(now_first, past, latest, k_meta, v_meta, c, shift, weights);
        if (more) load_meta(cursor, k_meta, v_meta);
        output(v, weights);
        now = cursor.segment;
        if (more) {
          load_v(cursor, v);
          now_first = (cursor.first + cursor.unit) * kUnit;
          advance(cursor, end);
        }
      }
      // Decoded again rather than kept in registers during the loop.
      item = decode_at(u, end);
      u += item.end - item.begin;
      rows = min(item.queries * group - item.tile * kRows, kRows);
      finish(item.end == item.units);
    }
  }
};

template <int D, int NT>
__global__ void __launch_bounds__(Shape<D, NT>::kThreads, Shape<D, NT>::kCtasPerSm)
    paged_attention(const __grid_constant__ WkvCudaAttention a, const __grid_constant__ WkvCudaParams p) {
  extern __shared__ __align__(16) char memory[];
  Kernel<D, NT>(a, p, memory).run();
}

template <int D, int NT>
cudaError_t launch(const WkvCudaAttention& a, const WkvCudaParams& p, cudaStream_t stream) {
  Shared unused;
  const int steps = p.fast_steps + (p.slow_steps > 0);
  const int64_t bytes =
      Shared::carve<Shape<D, NT>>(&unused, nullptr, steps, 8 * (p.fast_steps + p.slow_steps), p.slow_steps, a.num_seqs);
  static int64_t allowed[64] = {};
  int device = 0;
  if (cudaError_t e = cudaGetDevice(&device)) return e;
  if (bytes > allowed[device % 64]) {
    if (cudaError_t e = cudaFuncSetAttribute(paged_attention<D, NT>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                             static_cast<int>(bytes)))
      return cudaGetLastError();
    allowed[device % 64] = bytes;
  }
  paged_attention<D, NT>
      <<<std::min(a.num_sms * Shape<D, NT>::kCtasPerSm, kMaxCtas), Shape<D, NT>::kThreads, bytes, stream>>>(a, p);
  return cudaGetLastError();
}

// One row tile of 8 where the batch's mean query length needs no more.
template <int D>
cudaError_t launch_any(const WkvCudaAttention& a, const WkvCudaParams& p, cudaStream_t stream) {
  const int64_t group = a.num_heads / p.num_kv_heads;
  const bool one = group * ((a.num_tokens + a.num_seqs - 1) / a.num_seqs) <= 8;
  return one ? launch<D, 1>(a, p, stream) : launch<D, 2>(a, p, stream);
}

cudaError_t launch_64(const WkvCudaAttention&, const WkvCudaParams&, cudaStream_t);
cudaError_t launch_96(const WkvCudaAttention&, const WkvCudaParams&, cudaStream_t);
cudaError_t launch_128(const WkvCudaAttention&, const WkvCudaParams&, cudaStream_t);
cudaError_t launch_256(const WkvCudaAttention&, const WkvCudaParams&, cudaStream_t);

}  // namespace wkvquant
