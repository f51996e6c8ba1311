// Past tokens from the page and the step's own tokens as they came -> output.
//
//     item          (sequence, KV head, up to 64 rows, range of past tokens); row = query token x query head of the
//     group past          chunks of 128 tokens, 4 rows at a time: integer products on the codes, scale and minimum
//     outside current       blocks of 64 keys in fp32, causal merge         items of one row that hold different parts
//     of its past, by log-sum-exp
//
// Decode, speculation and prefill differ in the number of rows and of items only. Products on the codes cost prefill no
// more than fp32 products on dequantized keys would (19 multiply-adds a cycle against at most 16), so there is nothing
// to dequantize.
//
// Arithmetic of the past, exact but for the rounding of its two operands:
//     score   q' = H (q * k_smooth) as 16-bit integers in two bytes; 32-bit sums of q' * code; times scale_t, plus
//             minimum_t sum(q'), plus the shift, a product with the basis of prepare.cpp
//     output  w_t = p_t * scale_t as 15-bit integers of the chunk's largest; 32-bit sums of w_t * code
// Scores are in units of log 2.
#pragma once

#include <omp.h>

#include <type_traits>

#include "cache_write.h"
#include "layout.h"
#include "vec.h"

namespace {

constexpr int kChunk = wkvquant::kChunk;
constexpr int kTiles = kChunk / wkvquant::kTile;
constexpr int kRows = 64;  // of an item; no group of query heads is larger
constexpr int kKeys = 64;  // current keys of a block
constexpr int kMinSplit = 512;
constexpr int kItemsPerThread = 4;
constexpr float kLog2e = 1.44269504088896341f;
constexpr float kQueryMax = 32512.0f;  // 127 * 256: the high byte stays below 128 after rounding
constexpr float kWeightMax = 32767.0f;
constexpr float kMeanCode = 7.5f;  // what rounding took off the weights is put back times this: a third of the error

struct Item {
  int32_t seq, head;           // KV head
  int32_t query, num_queries;  // first query token of the step, and how many
  int32_t begin, end;          // past tokens, begin a multiple of kChunk
  int32_t split, num_splits;   // this item's part of the past, and how many parts there are
  int64_t partial;             // floats before its partial result
};

// C[R][NC vectors V] (+)= A[R][depth] . B[depth][NC vectors V]
template <class V, int R, int NC, bool Accumulate>
WKV_INLINE void product_tile(int depth, const float* a, int lda, const float* b, int ldb, float* c, int ldc) {
  constexpr int kWidth = sizeof(V) / sizeof(float);
  V sum[R][NC];
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < NC; ++j) sum[r][j] = Accumulate ? load<V>(c + r * ldc + j * kWidth) : V{};
  for (int i = 0; i < depth; ++i)
    for (int j = 0; j < NC; ++j) {
      const V column = load<V>(b + i * ldb + j * kWidth);
      for (int r = 0; r < R; ++r) sum[r][j] += a[r * lda + i] * column;
    }
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < NC; ++j) store(c + r * ldc + j * kWidth, sum[r][j]);
}

template <class Isa, int R, bool Accumulate>
WKV_INLINE void product(int columns, int depth, const float* a, int lda, const float* b, int ldb, float* c, int ldc) {
  using V = typename Isa::Column;
  constexpr int kWidth = sizeof(V) / sizeof(float), kStep = Isa::kColumns * kWidth;
  int j = 0;
  for (; j + kStep <= columns; j += kStep)
    product_tile<V, R, Isa::kColumns, Accumulate>(depth, a, lda, b + j, ldb, c + j, ldc);
  for (; j < columns; j += kWidth) product_tile<V, R, 1, Accumulate>(depth, a, lda, b + j, ldb, c + j, ldc);
}

// What a thread needs for one item. Sizes depend on the head size, so the arrays are cut from one scratch block.
struct Work {
  float* query;                              // [kRows][D], times scale * log2(e)
  int32_t* operand;                          // [kRows][D / 8][4] bytes of q': see Isa::score_tile
  float *a, *b;                              // [kRows][active_padded] coefficients of the shift at position 0
  float* coefficient;                        // [4][2 * active_padded + 16] of the basis, at the chunk
  float* past;                               // [kRows][padded] sum w code, in the order of the V words
  float* out;                                // [kRows][D] numerator of the softmax
  float* keys;                               // [D][kKeys]
  float* values;                             // [kKeys][D]
  float* score;                              // [4][kChunk]
  int16_t* weight;                           // [4][kChunk]
  float *k_scale, *k_min, *v_scale, *v_min;  // [kChunk], zero where there is no token
  float *cosine, *sine;                      // [active_padded] at the chunk
  float* max;                                // [kRows] running maximum
  float *sum, *min_sum;                      // [kRows][16] sum p and sum p minimum_t, lanes to be added up
  float *step, *total, *constant;            // [kRows] unit of q', sum q', part of the shift that does not rotate
  float *first, *first_weight;               // [kRows] extra score of position 0, its p
  const uint8_t *k_tile[kTiles], *v_tile[kTiles];
  int padded, pitch;  // columns of `past`; floats of a row of `coefficient`

  static size_t carve(Work* w, char* base, int d, int active) {
    size_t used = 0;
    const auto take = [&](auto*& p, size_t n) {
      p = reinterpret_cast<std::remove_reference_t<decltype(p)>>(base + used);
      used += (n * sizeof(*p) + 63) / 64 * 64;
    };
    w->padded = (d + 63) / 64 * 64;
    w->pitch = 2 * active + wkvquant::kChebyshev;
    take(w->query, kRows * d), take(w->operand, kRows * d / 2);
    take(w->a, kRows * active), take(w->b, kRows * active), take(w->coefficient, 4 * w->pitch);
    take(w->past, kRows * w->padded), take(w->out, kRows * d);
    take(w->keys, d * kKeys), take(w->values, kKeys * d);
    take(w->score, 4 * kChunk), take(w->weight, 4 * kChunk);
    take(w->k_scale, kChunk), take(w->k_min, kChunk), take(w->v_scale, kChunk), take(w->v_min, kChunk);
    take(w->cosine, active), take(w->sine, active);
    take(w->max, kRows), take(w->sum, kRows * kLanes), take(w->min_sum, kRows * kLanes);
    take(w->step, kRows), take(w->total, kRows), take(w->constant, kRows);
    take(w->first, kRows), take(w->first_weight, kRows);
    return used;
  }
};

template <class Isa>
struct Attention {
  const wkvquant::AttentionArgs& args;
  const wkvquant::Prepared& params;
  Work w;
  Item item;
  int group, rows;
  int64_t past_len, first_row;  // first_row: of the sequence's step in query

  Attention(const wkvquant::AttentionArgs& a, char* base) : args(a), params(*a.params) {
    Work::carve(&w, base, params.head_size, params.active_padded);
    group = a.num_heads / params.num_kv_heads;
  }

  // First position that the query token `q` of the step sees.
  int64_t first_visible(int q) const {
    const int64_t first = past_len + q - args.sliding_window + 1;
    return args.sliding_window && first > 0 ? first : 0;
  }

  void begin(const Item& next) {
    item = next;
    rows = item.num_queries * group;
    first_row = args.query_start_loc[item.seq];
    past_len = args.seq_lens[item.seq] - (args.query_start_loc[item.seq + 1] - first_row);
    const int d = params.head_size;
    for (int r = 0; r < rows; ++r) {
      const int64_t token = first_row + item.query + r / group, head = item.head * group + r % group;
      float* q = w.query + r * d;
      load_row<Isa>(args.query, args.dtype, token * args.query_stride[0] + head * args.query_stride[1], d, q);
      for (int i = 0; i < d; i += kLanes) store(q + i, load<f32>(q + i) * (args.scale * kLog2e));
      w.max[r] = -INFINITY;
      store(w.sum + r * kLanes, f32{});
      store(w.min_sum + r * kLanes, f32{});
      w.first_weight[r] = 0;
      memset(w.past + r * w.padded, 0, w.padded * sizeof(float));
      if (item.begin < item.end) transform_query(r);
    }
  }

  template <int N, int B>
  void transform(const float* q, const float* scale, f32* x) {
    for (int i = 0; i < N; ++i) x[i] = load<f32>(q + i * kLanes) * load<f32>(scale + i * kLanes);
    if (params.hadamard)
      for (int i = 0; i < N; i += B) hadamard<Isa, B>(x + i);
  }

  void transform_query(int r) {
    const int d = params.head_size;
    const float *q = w.query + r * d, *scale = params.query_scale + item.head * d;
    f32 x[kMaxHeadSize / kLanes];
    switch (d) {
      case 64: transform<4, 4>(q, scale, x); break;
      case 80: transform<5, 1>(q, scale, x); break;
      case 96: transform<6, 2>(q, scale, x); break;
      case 128: transform<8, 8>(q, scale, x); break;
      case 256: transform<16, 16>(q, scale, x); break;
    }
    f32 largest = f32{}, total = f32{};
    for (int i = 0; i < d / kLanes; ++i) largest = Isa::max(largest, Isa::max(x[i], -x[i]));
    const float most = Isa::reduce_max(largest);
    w.step[r] = most / kQueryMax;
    const float inverse = most > 0 ? kQueryMax / most : 0;
    int8_t* bytes = reinterpret_cast<int8_t*>(w.operand + r * d / 2);
    for (int i = 0; i < d / kLanes; ++i) {
      const i32 value = round_int(x[i] * inverse);
      total += __builtin_convertvector(value, f32);
      int32_t v[kLanes];
      store(v, value);
      for (int j = 0; j < kLanes; ++j) {
        int8_t* group_bytes = bytes + 16 * ((i * kLanes + j) / 8) + j % 8;
        group_bytes[0] = static_cast<int8_t>((v[j] + 128) >> 8);
        group_bytes[8] = static_cast<int8_t>(v[j]);
      }
    }
    // Of the rounded q': its error then meets scale * code + minimum, which is centred, instead of the larger codes.
    w.total[r] = Isa::reduce_add(total) * w.step[r];
    w.first[r] = 0;
    if (params.k_first)
      for (int i = 0; i < d; ++i) w.first[r] += q[i] * params.k_extra[item.head * d + i];
    const float* shift = params.k_shift + item.head * d;
    const int n = params.pairs;
    w.constant[r] = 0;
    if (!params.has_k_shift) return;
    for (int i = 2 * n; i < d; ++i) w.constant[r] += q[i] * shift[i];
    float *a = w.a + r * params.active_padded, *b = w.b + r * params.active_padded;
    for (int i = 0; i < params.active; ++i) {
      const int j = params.pair[i];
      a[i] = q[j] * shift[j] + q[j + n] * shift[j + n];
      b[i] = q[j + n] * shift[j] - q[j] * shift[j + n];
    }
    for (int i = params.active; i < params.active_padded; ++i) a[i] = b[i] = 0;
  }

  // --- past ---

  void past() {
    for (int t = item.begin; t < item.end; t += kChunk) chunk(t);
  }

  void chunk(int begin) {
    const int end = item.end - begin < kChunk ? item.end : begin + kChunk;
    const int tiles = (end - begin + kLanes - 1) / kLanes;
    load_chunk(begin, end, tiles);
    int r = 0;
    for (; r + 4 <= rows; r += 4) chunk_rows<4>(r, begin, end, tiles);
    if (rows - r == 3) chunk_rows<3>(r, begin, end, tiles);
    if (rows - r == 2) chunk_rows<2>(r, begin, end, tiles);
    if (rows - r == 1) chunk_rows<1>(r, begin, end, tiles);
  }

  void load_chunk(int begin, int end, int tiles) {
    const wkvquant::PageLayout layout{params.head_size, args.block_size};
    const int32_t* table = args.block_table + item.seq * args.block_table_stride;
    const int64_t head = item.head * layout.nbytes();
    for (int i = 0; i < tiles; ++i) {
      const int t = begin + i * kLanes, slot = t % args.block_size;
      const uint8_t* page = args.kv_cache + table[t / args.block_size] * args.block_stride + head;
      const int64_t tile = slot / kLanes * layout.tile_bytes();
      w.k_tile[i] = page + tile;
      w.v_tile[i] = page + layout.v_codes() + tile;
      const u32 k = load<u32>(page + layout.k_meta() + 4 * slot), v = load<u32>(page + layout.v_meta() + 4 * slot);
      store(w.k_scale + i * kLanes, Isa::from_half(k & 0xffff));
      store(w.k_min + i * kLanes, Isa::from_half(k >> 16));
      store(w.v_scale + i * kLanes, Isa::from_half(v & 0xffff));
      store(w.v_min + i * kLanes, Isa::from_half(v >> 16));
    }
    // Slots past the end hold anything, NaN too.
    for (int t = end - begin; t < tiles * kLanes; ++t) w.k_scale[t] = w.k_min[t] = w.v_scale[t] = w.v_min[t] = 0;
    if (params.active) rotation_at(begin + kChunk / 2, params.pair_turns, params.active_padded, w.cosine, w.sine);
  }

  // Coefficients of the basis for one row at the chunk's centre.
  void basis_coefficients(int r, float* c) {
    const int active = params.active_padded;
    const float *a = w.a + r * active, *b = w.b + r * active;
    for (int j = 0; j < active; ++j) {
      c[2 * j] = a[j] * w.cosine[j] + b[j] * w.sine[j];
      c[2 * j + 1] = b[j] * w.cosine[j] - a[j] * w.sine[j];
    }
    if (params.basis_rows == 2 * params.fast) return;
    // Even polynomials take the coefficient of the cosine, odd ones that of the sine: one broadcast of the pair.
    using V = typename Isa::Column;
    constexpr int kWidth = sizeof(V) / sizeof(float), kVectors = wkvquant::kChebyshev / kWidth;
    const int slow = params.active - params.fast;
    const float *pair = c + 2 * params.fast, *table = params.chebyshev;
    V sum[2][kVectors] = {};  // two, because a multiply-add takes four cycles
    const auto add = [&](V* to, int j) {
      const V both = broadcast_pair(pair + 2 * j);
      for (int i = 0; i < kVectors; ++i) to[i] += both * load<V>(table + j * wkvquant::kChebyshev + i * kWidth);
    };
    int j = 0;
    for (; j + 2 <= slow; j += 2) add(sum[0], j), add(sum[1], j + 1);
    if (j < slow) add(sum[0], j);
    for (int i = 0; i < kVectors; ++i) store(c + 2 * params.fast + i * kWidth, sum[0][i] + sum[1][i]);
  }

  static WKV_INLINE typename Isa::Column broadcast_pair(const float* p) {
    double both;
    memcpy(&both, p, 8);
    return (typename Isa::Column)(both - typename Isa::Doubles{});
  }

  template <int R>
  void chunk_rows(int row, int begin, int end, int tiles) {
    const int d = params.head_size, columns = tiles * kLanes;
    if (params.active) {
      for (int r = 0; r < R; ++r) basis_coefficients(row + r, w.coefficient + r * w.pitch);
      product<Isa, R, false>(columns, params.basis_rows, w.coefficient, w.pitch, params.basis, kChunk, w.score, kChunk);
    }
    const bool masked = end - begin < columns || first_visible(item.query + item.num_queries - 1) > begin;
    f32 largest[R];
    for (int r = 0; r < R; ++r) largest[r] = splat(-INFINITY);
    for (int i = 0; i < tiles; ++i) {
      i32 dot[R];
      Isa::template score_tile<R>(w.k_tile[i], d / 8, w.operand + row * d / 2, d / 2, dot);
      const f32 scale = load<f32>(w.k_scale + i * kLanes), minimum = load<f32>(w.k_min + i * kLanes);
      for (int r = 0; r < R; ++r) {
        float* out = w.score + r * kChunk + i * kLanes;
        f32 s = minimum * w.total[row + r] + w.constant[row + r];
        s += __builtin_convertvector(dot[r], f32) * (scale * w.step[row + r]);
        if (params.active) s += load<f32>(out);
        if (begin + i == 0) s += lane_index() == 0 ? splat(w.first[row + r]) : f32{};
        if (masked) {
          const i32 position = lane_index() + (begin + i * kLanes);
          const int first = first_visible(item.query + (row + r) / group);
          s = position < first ? splat(-INFINITY) : s;
          s = position < end ? s : splat(-INFINITY);
        }
        store(out, s);
        largest[r] = Isa::max(largest[r], s);
      }
    }
    float decay[R], unit[R];
    for (int r = 0; r < R; ++r) {
      const float first = begin == 0 ? w.score[r * kChunk] : -INFINITY;
      soften(row + r, r, columns, Isa::reduce_max(largest[r]), decay[r], unit[r]);
      if (first > -INFINITY)
        w.first_weight[row + r] = exp2_vec<Isa>(splat(first - w.max[row + r]))[0];
      else
        w.first_weight[row + r] *= decay[r];
    }
    for (int column = 0; column < w.padded; column += 64) {
      i32 acc[R][4];
      for (int r = 0; r < R; ++r)
        for (int k = 0; k < 4; ++k) acc[r][k] = i32{};
      Isa::template accumulate<R>(w.v_tile, column, tiles, d, w.weight, kChunk, acc);
      for (int r = 0; r < R; ++r)
        for (int k = 0; k < 4; ++k) {
          float* out = w.past + (row + r) * w.padded + column + k * kLanes;
          store(out, load<f32>(out) * decay[r] + __builtin_convertvector(acc[r][k], f32) * unit[r]);
        }
    }
  }

  // 2^(before - next); the usual case of an unchanged maximum costs nothing.
  static WKV_INLINE float decay_of(float before, float next) {
    return before == next ? 1.0f : exp2_vec<Isa>(splat(before - next))[0];
  }

  static WKV_INLINE void add_lanes(float* sum, float decay, f32 more) { store(sum, load<f32>(sum) * decay + more); }

  // Softmax step of row r (index `local` of four): scores -> integer weights. decay: factor on what was summed so far;
  // unit: what an integer weight of one stands for.
  WKV_INLINE void soften(int r, int local, int columns, float most, float& decay, float& unit) {
    float* score = w.score + local * kChunk;
    int16_t* weight = w.weight + local * kChunk;
    decay = 1;
    unit = 0;
    const float next = most > w.max[r] ? most : w.max[r];
    if (next == -INFINITY) {  // a window hides the whole chunk
      memset(weight, 0, columns * sizeof(int16_t));
      return;
    }
    f32 sum = f32{}, min_sum = f32{}, heaviest = f32{};
    for (int t = 0; t < columns; t += kLanes) {
      const f32 p = exp2_vec<Isa>(load<f32>(score + t) - next);
      const f32 scaled = p * load<f32>(w.v_scale + t);
      sum += p;
      min_sum += p * load<f32>(w.v_min + t);
      heaviest = Isa::max(heaviest, scaled);
      store(score + t, scaled);
    }
    const float top = Isa::reduce_max(heaviest);
    decay = decay_of(w.max[r], next);
    unit = top / kWeightMax;
    const float inverse = top > 0 ? kWeightMax / top : 0;
    f32 exact = f32{};
    i32 rounded = i32{};
    for (int t = 0; t < columns; t += kLanes) {
      const f32 scaled = load<f32>(score + t);
      const i32 integer = round_int(scaled * inverse);
      Isa::store_shorts(weight + t, integer);
      exact += scaled;
      rounded += integer;
    }
    w.max[r] = next;
    add_lanes(w.sum + r * kLanes, decay, sum);
    min_sum += kMeanCode * (exact - __builtin_convertvector(rounded, f32) * unit);
    add_lanes(w.min_sum + r * kLanes, decay, min_sum);
  }

  // Sums over the codes -> sums over the values.
  void finish_past() {
    const int d = params.head_size;
    const float* shift = params.v_shift + item.head * d;
    const float* extra = params.v_first ? params.v_extra + item.head * d : nullptr;
    for (int r = 0; r < rows; ++r) {
      const float* past = w.past + r * w.padded;
      const float minimum = Isa::reduce_add(load<f32>(w.min_sum + r * kLanes));
      const float sum = Isa::reduce_add(load<f32>(w.sum + r * kLanes));
      float* out = w.out + r * d;
      for (int i = 0; i < d; ++i) {
        const int word = i / 4;
        out[i] = past[word / kLanes * 64 + i % 4 * kLanes + word % kLanes] + minimum + sum * shift[i];
      }
      if (extra && w.first_weight[r] != 0)
        for (int i = 0; i < d; ++i) out[i] += w.first_weight[r] * extra[i];
    }
  }

  // --- current ---

  void current() {
    const int last = item.query + item.num_queries;
    const int64_t first = first_visible(item.query) - past_len;
    for (int k = first > 0 ? first / kKeys * kKeys : 0; k < last; k += kKeys) {
      const int count = last - k < kKeys ? last - k : kKeys;
      load_keys(k, count);
      int r = 0;
      for (; r + 4 <= rows; r += 4) current_rows<4>(r, k, count);
      for (; r < rows; ++r) current_rows<1>(r, k, count);
    }
  }

  void load_keys(int key, int count) {
    const int d = params.head_size;
    for (int k = 0; k < count; ++k) {
      const int64_t token = first_row + key + k;
      load_row<Isa>(args.value, args.dtype, token * args.value_stride[0] + item.head * args.value_stride[1], d,
                    w.values + k * d);
    }
    alignas(64) float rows[kLanes][kMaxHeadSize];
    for (int k = 0; k < count; k += kLanes) {
      const int n = count - k < kLanes ? count - k : kLanes;
      for (int i = 0; i < n; ++i) {
        const int64_t token = first_row + key + k + i;
        load_row<Isa>(args.key, args.dtype, token * args.key_stride[0] + item.head * args.key_stride[1], d, rows[i]);
      }
      if (n == kLanes)
        for (int i = 0; i < d; i += kLanes) Isa::transpose(&rows[0][i], kMaxHeadSize, w.keys + i * kKeys + k, kKeys);
      else
        for (int i = 0; i < n; ++i)
          for (int j = 0; j < d; ++j) w.keys[j * kKeys + k + i] = rows[i][j];
    }
  }

  template <int R>
  void current_rows(int row, int key, int count) {
    const int last = item.query + (row + R - 1) / group;
    if (key > last) return;
    count = last + 1 - key < count ? last + 1 - key : count;
    const int d = params.head_size, columns = (count + kLanes - 1) / kLanes * kLanes;
    product<Isa, R, false>(columns, d, w.query + row * d, d, w.keys, kKeys, w.score, kChunk);
    for (int r = 0; r < R; ++r) {
      const int query = item.query + (row + r) / group;
      const int64_t window = first_visible(query) - past_len;
      const int first = window > 0 ? window : 0, end = query + 1 < key + count ? query + 1 : key + count;
      float* score = w.score + r * kChunk;
      f32 largest = splat(-INFINITY);
      for (int t = 0; t < columns; t += kLanes) {
        f32 s = load<f32>(score + t);
        if (key + t + kLanes > end || key + t < first) {
          const i32 index = lane_index() + (key + t);
          s = index < end ? s : splat(-INFINITY);
          s = index < first ? splat(-INFINITY) : s;
          store(score + t, s);
        }
        largest = Isa::max(largest, s);
      }
      const float most = Isa::reduce_max(largest), before = w.max[row + r];
      const float next = most > before ? most : before;
      if (next == -INFINITY) {
        memset(score, 0, columns * sizeof(float));
        continue;
      }
      f32 sum = f32{};
      for (int t = 0; t < columns; t += kLanes) {
        const f32 p = exp2_vec<Isa>(load<f32>(score + t) - next);
        store(score + t, p);
        sum += p;
      }
      const float decay = decay_of(before, next);
      w.max[row + r] = next;
      add_lanes(w.sum + (row + r) * kLanes, decay, sum);
      float* out = w.out + (row + r) * d;
      if (decay != 1)
        for (int i = 0; i < d; i += kLanes) store(out + i, load<f32>(out + i) * decay);
    }
    product<Isa, R, true>(d, count, w.score, kChunk, w.values, d, w.out + row * d, d);
  }

  // --- results ---

  void write(int r, float* numerator, float most, float sum) {
    const int d = params.head_size;
    const int64_t token = first_row + item.query + r / group, head = item.head * group + r % group;
    const float inverse = 1 / sum;
    for (int i = 0; i < d; i += kLanes) store(numerator + i, load<f32>(numerator + i) * inverse);
    store_row<Isa>(args.out, args.dtype, token * args.out_stride[0] + head * args.out_stride[1], d, numerator);
    if (args.lse) args.lse[token * args.lse_stride[0] + head * args.lse_stride[1]] = (most + log2f(sum)) / kLog2e;
  }

  // A partial result: [rows][D] numerators, [rows] maxima, [rows] sums.
  void run(const Item& next, float* partials) {
    begin(next);
    past();
    finish_past();
    if (item.split == 0) current();
    const int d = params.head_size;
    if (item.num_splits == 1) {
      for (int r = 0; r < rows; ++r) write(r, w.out + r * d, w.max[r], Isa::reduce_add(load<f32>(w.sum + r * kLanes)));
      return;
    }
    float* partial = partials + item.partial;
    memcpy(partial, w.out, rows * d * sizeof(float));
    memcpy(partial + rows * d, w.max, rows * sizeof(float));
    for (int r = 0; r < rows; ++r) partial[rows * d + rows + r] = Isa::reduce_add(load<f32>(w.sum + r * kLanes));
  }

  // `next` is the first of its splits; their partial results follow one another.
  void merge(const Item& next, const float* partials) {
    item = next;
    rows = item.num_queries * group;
    first_row = args.query_start_loc[item.seq];
    const int d = params.head_size;
    const int64_t size = static_cast<int64_t>(rows) * (d + 2);
    for (int r = 0; r < rows; ++r) {
      float most = -INFINITY, sum = 0;
      for (int s = 0; s < item.num_splits; ++s) {
        const float m = partials[item.partial + s * size + rows * d + r];
        most = m > most ? m : most;
      }
      float* out = w.out;
      memset(out, 0, d * sizeof(float));
      for (int s = 0; s < item.num_splits; ++s) {
        const float* partial = partials + item.partial + s * size;
        const float factor = exp2f(partial[rows * d + r] - most);
        sum += factor * partial[rows * d + rows + r];
        for (int i = 0; i < d; i += kLanes)
          store(out + i, load<f32>(out + i) + factor * load<f32>(partial + r * d + i));
      }
      write(r, out, most, sum);
    }
  }
};

// Items of a call: every thread gets several of about equal work, no split shorter than kMinSplit tokens.
struct Plan {
  Item* items = nullptr;
  float* partials = nullptr;
  int num_items = 0;
  bool split = false;

  int build(const wkvquant::AttentionArgs& a, int threads) {
    const int heads = a.params->num_kv_heads, group = a.num_heads / heads, d = a.params->head_size;
    const int per_item = group < kRows ? kRows / group : 1;
    const auto for_blocks = [&](auto&& visit) {
      for (int seq = 0; seq < a.num_seqs; ++seq) {
        const int queries = a.query_start_loc[seq + 1] - a.query_start_loc[seq];
        const int past = a.seq_lens[seq] - queries;
        // Later queries attend more current keys: the long items first.
        for (int last = queries; last > 0; last -= last % per_item ? last % per_item : per_item) {
          const int count = last % per_item ? last % per_item : per_item;
          const int visible = past + (last - count) - a.sliding_window + 1;
          const int begin = a.sliding_window && visible > 0 ? visible / kChunk * kChunk : 0;
          visit(seq, last - count, count, begin < past ? begin : past, past);
        }
      }
    };
    int64_t work = 0;
    for_blocks([&](int, int query, int count, int begin, int end) {
      work += static_cast<int64_t>(count) * (end - begin + query + count);
    });
    const int64_t target = work * heads / (static_cast<int64_t>(threads) * kItemsPerThread) + 1;
    const auto splits_of = [&](int count, int begin, int end) {
      int64_t length = (target / count + kChunk - 1) / kChunk * kChunk;
      length = length < kMinSplit ? kMinSplit : length;
      const int64_t n = (end - begin + length - 1) / length;
      return static_cast<int>(n > 1 ? n : 1);
    };
    int64_t count_items = 0, floats = 0;
    for_blocks([&](int, int, int count, int begin, int end) {
      const int splits = splits_of(count, begin, end);
      count_items += static_cast<int64_t>(splits) * heads;
      if (splits > 1) floats += static_cast<int64_t>(splits) * heads * count * group * (d + 2);
    });
    const size_t item_bytes = (count_items * sizeof(Item) + 63) / 64 * 64;
    char* memory = static_cast<char*>(wkvquant::scratch(1, item_bytes + floats * sizeof(float) + 64));
    if (!memory) return kNoMemory;
    items = reinterpret_cast<Item*>(memory);
    partials = reinterpret_cast<float*>(memory + item_bytes);
    int64_t offset = 0;
    for_blocks([&](int seq, int query, int count, int begin, int end) {
      const int splits = splits_of(count, begin, end);
      const int chunks = (end - begin + kChunk - 1) / kChunk;
      for (int head = 0; head < heads; ++head)
        for (int s = 0; s < splits; ++s) {
          const int from = begin + chunks * s / splits * kChunk, to = begin + chunks * (s + 1) / splits * kChunk;
          items[num_items++] = Item{seq, head, query, count, from, to < end ? to : end, s, splits, offset};
          if (splits > 1) offset += static_cast<int64_t>(count) * group * (d + 2);
        }
      split |= splits > 1;
    });
    return kOk;
  }
};

// Sequences and the blocks of their past fit the tensors.
inline int check(const wkvquant::AttentionArgs& a) {
  if (a.num_heads > kRows * a.params->num_kv_heads) return kBadGroup;
  if (a.query_start_loc[0] < 0 || a.query_start_loc[a.num_seqs] > a.num_tokens) return kBadSequence;
  for (int seq = 0; seq < a.num_seqs; ++seq) {
    const int queries = a.query_start_loc[seq + 1] - a.query_start_loc[seq];
    if (queries < 0) return kBadSequence;
    if (queries == 0) continue;
    const int past = a.seq_lens[seq] - queries, blocks = (past + a.block_size - 1) / a.block_size;
    if (past < 0 || blocks > a.max_blocks) return kBadSequence;
    for (int b = 0; b < blocks; ++b) {
      const int32_t block = a.block_table[seq * a.block_table_stride + b];
      if (block < 0 || block >= a.num_blocks) return kBadBlock;
    }
  }
  return kOk;
}

template <class Isa>
int paged_attention(const wkvquant::AttentionArgs& a) {
  if (const int status = check(a)) return status;
  Plan plan;
  if (const int status = plan.build(a, omp_get_max_threads())) return status;
  bool failed = false;
#pragma omp parallel
  {
    Work sizes;
    const size_t bytes = Work::carve(&sizes, nullptr, a.params->head_size, a.params->active_padded);
    char* memory = static_cast<char*>(wkvquant::scratch(0, bytes));
    if (!memory) {
#pragma omp atomic write
      failed = true;
    }
#pragma omp barrier
    if (!failed) {
      Attention<Isa> attention(a, memory);
#pragma omp for schedule(dynamic, 1)
      for (int i = 0; i < plan.num_items; ++i) attention.run(plan.items[i], plan.partials);
      if (plan.split) {
#pragma omp for schedule(static)
        for (int i = 0; i < plan.num_items; ++i)
          if (plan.items[i].num_splits > 1 && plan.items[i].split == 0) attention.merge(plan.items[i], plan.partials);
      }
    }
  }
  return failed ? kNoMemory : kOk;
}

}  // namespace
