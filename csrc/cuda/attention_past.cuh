// A unit of past tokens: shift and codes to scores, to weights, to the output.
#pragma once

#include "attention_kernel.cuh"

namespace wkvquant {

// Coefficients of the basis, as operand B, for the chunk from position `first`; of two strands the second's is `stride`
// further on.
template <int D, int NT, int Strands>
template <bool Tabled>
__device__ __forceinline__ void Kernel<D, NT, Strands>::make_coefficients(int first, int stride, uint4* coef) {
  float2* angle = s.angle + warp * (Strands * slots);
  __syncwarp();
#pragma unroll 1
  for (int i = lane; i < slots; i += 32) {
    const int64_t turns = Tabled ? s.turns[i] : __ldg(p.slot_turns + i);
#pragma unroll
    for (int n = 0; n < Strands; ++n) angle[n * slots + i] = cos_sin_fast(chunk_angle(first + n * stride, turns));
  }
  __syncwarp();
  angle += g / kRows * slots + t;
#pragma unroll 1
  for (int n = 0; n < NT; ++n) {
    const float2* ab = s.ab + min(row_of(8 * n + g), s.misc[7] - 1) * (slots + 4) + t;
    const float2* turned = angle;
    const auto rotated = [&]() -> float4 {  // of the next step
      const float2 c = ab[0], r = turned[0], d = ab[4], q = turned[4];
      ab += 8, turned += 8;
      return {c.x * r.x + c.y * r.y, c.y * r.x - c.x * r.y, d.x * q.x + d.y * q.y, d.y * q.x - d.x * q.y};
    };
    uint4* out = coef + n * steps * 32 + lane;
    // Unrolled, these loops would need the scoreboard of the page's loads, and wait for them.
#pragma unroll 1
    for (int i = 0; i < p.fast_steps; ++i, out += 32) {
      const float4 x = rotated();
      uint4 w = {};
      if constexpr (Tabled)  // of these the high parts count: the basis is rounded, too
        w.x = pack_half2(x.x, x.y), w.y = pack_half2(x.z, x.w);
      else
        split_half2(x.x, x.y, w.x, w.z), split_half2(x.z, x.w, w.y, w.w);
      *out = w;
    }
    if (p.slow_steps == 0) continue;
    const uint4* table = s.chebyshev + lane;
    float c[2][4] = {};
#pragma unroll 1
    for (int i = 0; i < p.slow_steps; ++i, table += 32) {
      const float4 x = rotated();
      if constexpr (Tabled) {
        const uint4 a = *table;
        mma(c[0], a.x, a.y, a.z, a.w, pack_half2(x.x, x.y), pack_half2(x.z, x.w));
      } else {
        uint4 w;
        split_half2(x.x, x.y, w.x, w.z), split_half2(x.z, x.w, w.y, w.w);
        const uint4* chebyshev = reinterpret_cast<const uint4*>(p.chebyshev) + i * 64 + lane;
        const uint4 high = __ldg(chebyshev), low = __ldg(chebyshev + 32);
        mma(c[0], high.x, high.y, high.z, high.w, w.x, w.y);
        mma(c[1], high.x, high.y, high.z, high.w, w.z, w.w);
        mma(c[1], low.x, low.y, low.z, low.w, w.x, w.y);
      }
    }
    uint4 x;  // degrees are rows here and must become the rows of operand B
    split_half2(c[0][0] + c[1][0], c[0][1] + c[1][1], x.x, x.z);
    split_half2(c[0][2] + c[1][2], c[0][3] + c[1][3], x.y, x.w);
    *out = {transpose(x.x), transpose(x.y), transpose(x.z), transpose(x.w)};
  }
  __syncwarp();
}

template <int D, int NT, int Strands>
__device__ __forceinline__ void Kernel<D, NT, Strands>::scores(const uint32_t (&k)[Strands][S::kKWords][4],
                                                               float (&c)[Strands][2][NT][4]) const {
  constexpr uint32_t kLow = 0x000f000f, kHigh = 0x00f000f0;
#pragma unroll
  for (int y = 0; y < Strands; ++y)
#pragma unroll
    for (int x = 0; x < 2; ++x)
#pragma unroll
      for (int n = 0; n < NT; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) c[y][x][n][i] = 0;
#pragma unroll
  for (int j = 0; j < S::kKWords; ++j) {
    uint32_t b[NT][4];
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      const uint4 w = s.query[min(row_of(8 * n + g), s.misc[7] - 1) * (D / 8) + t + 4 * j];
      b[n][0] = w.x, b[n][1] = w.y, b[n][2] = w.z, b[n][3] = w.w;
    }
#pragma unroll
    for (int u = 0; u < 2; ++u)
#pragma unroll
      for (int y = 0; y < Strands; ++y)
#pragma unroll
        for (int x = 0; x < 2; ++x) {
          const uint32_t w0 = k[y][j][2 * x] >> (8 * u), w1 = k[y][j][2 * x + 1] >> (8 * u);
#pragma unroll
          for (int n = 0; n < NT; ++n)
            mma(c[y][x][n], w0 & kLow, w1 & kLow, w0 & kHigh, w1 & kHigh, b[n][2 * u], b[n][2 * u + 1]);
        }
  }
}

// The shift's part of the scores of a chunk's unit. Steps: how many there are, in shared memory; kAny:
// any, in global memory.
template <int D, int NT, int Strands>
template <int Steps>
__device__ __forceinline__ void Kernel<D, NT, Strands>::shift_scores(int unit, const uint4* coef,
                                                                     float (&c)[2][NT][4]) const {
  constexpr bool kTwoSums = Steps == kAny || Steps > 2;  // so that chains of products are short
  float other[2][NT][4];
#pragma unroll
  for (int x = 0; x < 2; ++x)
#pragma unroll
    for (int n = 0; n < NT; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) c[x][n][i] = other[x][n][i] = 0;
  if constexpr (Steps == 0) return;
  // The basis is tabulated for the second half of the chunk. Cosines and even polynomials are the same in the first,
  // sines and odd polynomials, the high halves of the coefficients, change sign, and tokens come in reverse order.
  const bool mirror = unit < kChunk / kUnit / 2;
  const uint32_t sign = mirror ? 0x80000000 : 0;
  const int place = mirror ? 3 - unit : unit - 4, from = mirror ? lane ^ 28 : lane;
  const auto add = [&](float (&to)[4], const uint4& w, uint32_t b0, uint32_t b1) {
    mma(to, w.x, w.y, w.z, w.w, b0 ^ sign, b1 ^ sign);
  };
  // The coefficients of polynomials, the last step's, are large sums: of them the low parts count.
  if constexpr (Steps != kAny) {
    const uint4* basis = s.basis + place * (Steps * 64) + from;
#pragma unroll
    for (int i = 0; i < Steps; ++i) {
      const uint4 w[2] = {basis[i * 64], basis[i * 64 + 32]};
#pragma unroll
      for (int n = 0; n < NT; ++n) {
        const uint4* from = coef + (n * Steps + i) * 32 + lane;
        const uint4 b = i == Steps - 1 ? *from : uint4{from->x, from->y};
        auto& to = i == Steps - 1 && kTwoSums ? other : c;
#pragma unroll
        for (int x = 0; x < 2; ++x) add(to[x][n], w[x], b.x, b.y);
        if (i == Steps - 1)
#pragma unroll
          for (int x = 0; x < 2; ++x) add(to[x][n], w[x], b.z, b.w);
      }
    }
  } else {
    const uint4* basis = reinterpret_cast<const uint4*>(p.basis) + place * (steps * 128) + from;
    int i = 0;
#pragma unroll 1
    for (; i < p.plain_steps; ++i) {
      const uint4 w[2] = {__ldg(basis + i * 128), __ldg(basis + i * 128 + 64)};
#pragma unroll
      for (int n = 0; n < NT; ++n) {
        const uint4 b = coef[(n * steps + i) * 32 + lane];
#pragma unroll
        for (int x = 0; x < 2; ++x) add(c[x][n], w[x], b.x, b.y);
        if (i == p.fast_steps)
#pragma unroll
          for (int x = 0; x < 2; ++x) add(other[x][n], w[x], b.z, b.w);
      }
    }
#pragma unroll 1
    for (; i < steps; ++i) {
      uint4 high[2], low[2];
#pragma unroll
      for (int x = 0; x < 2; ++x)
        high[x] = __ldg(basis + i * 128 + x * 64), low[x] = __ldg(basis + i * 128 + x * 64 + 32);
#pragma unroll
      for (int n = 0; n < NT; ++n) {
        const uint4 b = coef[(n * steps + i) * 32 + lane];
#pragma unroll
        for (int x = 0; x < 2; ++x) add(c[x][n], high[x], b.x, b.y);
#pragma unroll
        for (int x = 0; x < 2; ++x) add(other[x][n], high[x], b.z, b.w);
#pragma unroll
        for (int x = 0; x < 2; ++x) add(other[x][n], low[x], b.x, b.y);
      }
    }
  }
#pragma unroll
  for (int n = 0; n < NT; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float one = kTwoSums ? c[0][n][i] + other[0][n][i] : c[0][n][i];
      const float two = kTwoSums ? c[1][n][i ^ 2] + other[1][n][i ^ 2] : c[1][n][i ^ 2];
      c[0][n][i] = mirror ? two : one;
      c[1][n][i ^ 2] = mirror ? one : two;
    }
}

template <int D, int NT, int Strands>
__device__ __forceinline__ void Kernel<D, NT, Strands>::shift_scores_of_steps(int unit, const uint4* coef,
                                                                              float (&c)[2][NT][4]) const {
  const int kind = p.tabled ? steps : steps ? kAny : 0;
  if (kind == 1)
    shift_scores<1>(unit, coef, c);
  else if (kind == 2)
    shift_scores<2>(unit, coef, c);
  else if (kind == 0)
    shift_scores<0>(unit, coef, c);
  else if (kind == 3)
    shift_scores<3>(unit, coef, c);
  else if (kind == 4)
    shift_scores<4>(unit, coef, c);
  else
    shift_scores<kAny>(unit, coef, c);
}

// Scores of the unit from position `first` to weights p * scale_v as operand B of the output's products; keeps the
// softmax state. present: false where this lane's strand has no unit; its weights are 0.
template <int D, int NT, int Strands>
__device__ __forceinline__ void Kernel<D, NT, Strands>::softmax(int first, bool present, const uint4* meta,
                                                                float (&c)[2][NT][4], const float (&shift)[2][NT][4],
                                                                uint32_t (&weights)[2][NT][2]) {
  float2 k[4], v[4];  // (scale, minimum)
  const uint4 of_k = meta[g / 4 * 16 + g % 4], of_v = meta[g / 4 * 16 + g % 4 + 4];
  const uint32_t k_meta[4] = {of_k.x, of_k.y, of_k.z, of_k.w}, v_meta[4] = {of_v.x, of_v.y, of_v.z, of_v.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    k[i] = __half22float2(*reinterpret_cast<const __half2*>(&k_meta[i]));
    v[i] = __half22float2(*reinterpret_cast<const __half2*>(&v_meta[i]));
  }
#pragma unroll
  for (int n = 0; n < NT; ++n)
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const float4 row = s.row[row_of(8 * n + 2 * t + j)];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& x = c[i / 2][n][i % 2 * 2 + j];
        x = fmaf(x * k[i].x, row.x, fmaf(k[i].y, row.y, row.w));
        x = fmaf(shift[i / 2][n][i % 2 * 2 + j], row.z, x);
      }
    }
  if (first == 0 && p.k_extra && g == 0)
#pragma unroll
    for (int n = 0; n < NT; ++n)
#pragma unroll
      for (int j = 0; j < 2; ++j) c[0][n][j] += s.first_extra[row_of(8 * n + 2 * t + j)];
  const int past = s.misc[4], latest = s.misc[5];
  if (!present || first + kUnit > past || first <= latest) {
    const int last_row = s.misc[6], rows = s.misc[7];
    const int start = present ? first_visible(past, a.sliding_window) : INT_MAX;
    const int token = first + 4 * g;
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (token + i >= past || token + i < start) v[i] = {0, 0};
#pragma unroll
    for (int n = 0; n < NT; ++n)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int hidden = latest - (token_of(last_row) - token_of(last_row - rows + 1 + row_of(8 * n + 2 * t + j)));
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (!present || token + i >= past || token + i <= hidden) c[i / 2][n][i % 2 * 2 + j] = -INFINITY;
      }
  }
  if (first == 0 && g == 0)
#pragma unroll
    for (int n = 0; n < NT; ++n)
#pragma unroll
      for (int j = 0; j < 2; ++j) s.first_score[row_of(8 * n + 2 * t + j)] = c[0][n][j];
  // The subtracted maximum follows where weights would leave a range of 2^(kBoost + kSlack).
  float high[NT][2];
  bool leaves = false;
#pragma unroll
  for (int n = 0; n < NT; ++n)
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      high[n][j] = fmaxf(fmaxf(c[0][n][j], c[0][n][2 + j]), fmaxf(c[1][n][j], c[1][n][2 + j]));
      leaves |= high[n][j] > top[n][j] + (kBoost + kSlack);
    }
  if (__any_sync(kFull, leaves)) {
#pragma unroll
    for (int n = 0; n < NT; ++n)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
#pragma unroll
        for (int m = 4; m < 32; m *= 2) high[n][j] = fmaxf(high[n][j], __shfl_xor_sync(kFull, high[n][j], m));
        const float next = fmaxf(top[n][j], high[n][j] - kBoost), keep = exp2_fast(top[n][j] - next);
        top[n][j] = next;
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
      w[i] = transpose(pack_finite(x[0], x[1]));
    }
#pragma unroll
    for (int x = 0; x < 2; ++x) {
      weights[x][n][0] = __byte_perm(w[2 * x], w[2 * x + 1], 0x5410);
      weights[x][n][1] = __byte_perm(w[2 * x], w[2 * x + 1], 0x7632);
    }
  }
}

template <int D, int NT, int Strands>
__device__ __forceinline__ void Kernel<D, NT, Strands>::output(const uint32_t (&v)[4][S::kVWords],
                                                               const uint32_t (&weights)[2][NT][2]) {
  // Of a half's upper byte both nibbles together and the high one: finish() subtracts the sums. A mask less that way.
  constexpr uint32_t kLow = 0x000f000f, kHigh = 0x00f000f0;
#pragma unroll
  for (int x = 0; x < 2; ++x)
#pragma unroll
    for (int c = 0; c < S::kVWords; ++c)
#pragma unroll
      for (int u = 0; u < 2; ++u) {
        const uint32_t w0 = u ? __byte_perm(v[x][c], 0, 0x4341) : v[x][c];
        const uint32_t w1 = u ? __byte_perm(v[x + 2][c], 0, 0x4341) : v[x + 2][c];
        const bool both = u && D <= 128;  // no register is left with more
        const uint32_t low0 = both ? w0 : w0 & kLow, low1 = both ? w1 : w1 & kLow;
#pragma unroll
        for (int n = 0; n < NT; ++n)
          mma(acc[2 * c + u][n], low0, w0 & kHigh, low1, w1 & kHigh, weights[x][n][0], weights[x][n][1]);
      }
}

// The units of an item, one after the other.
template <int D, int NT, int Strands>
__device__ __forceinline__ void Kernel<D, NT, Strands>::walk_units(int segment, Cursor& cursor, Ahead& ahead) {
  uint4* coef = coefficients();
  uint32_t weights[2][NT][2] = {};  // of the unit before: its output's products follow the scores' of the next
  // A chunk begins where the warp does: 21 units are three chunks then, and not up to four.
  int n = 0;  // units so far
  for (; ahead.segment == segment; ++n) {
    const int unit = ahead.unit, in_chunk = n % (kChunk / kUnit);
    if (steps && in_chunk == 0)
      p.tabled ? make_coefficients<true>(unit * kUnit, 0, coef) : make_coefficients<false>(unit * kUnit, 0, coef);
    float c[1][2][NT][4], shift[2][NT][4];
    const bool more = cursor.segment != INT_MAX;
    // Before the wait for the loads; the scores' products overlap with the output's.
    shift_scores_of_steps(in_chunk, coef, shift);
    scores(ahead.k, c);
    output(ahead.v[0], weights);
    const uint4* scales = s.meta + warp * 32 + ahead.half;
    ahead.half ^= 8;
    wait_for_copies();
    __syncwarp();
    const uint8_t* tile = tile_of(cursor, 0);
    ahead.segment = cursor.segment;
    if (more) load_k(tile, ahead.k[0]);
    if (n) load_v(ahead.next_v, ahead.v[0]);  // of this unit; the first one's is here
    if (more) {
      copy_meta(cursor.tile[0], tile, meta_of_lane(), s.meta + threadIdx.x + ahead.half);
      ahead.next_v = v_of(tile);
      ahead.unit = cursor.unit;
      advance(cursor);
    }
    softmax(unit * kUnit, true, scales, c[0], shift, weights);
  }
  if (n == 0) return;
  output(ahead.v[0], weights);
  if (ahead.segment != INT_MAX) {
    __syncwarp();  // a branch: masked and predicated, the products' operands would all be in registers at once
    load_v(ahead.next_v, ahead.v[0]);
  }
}

// The units of an item, one of each strand at a time. Columns of products that the tile has no rows for are those of
// the second strand: what is done with a column, the shift's products among it, since both are as far in a chunk, is
// done for two units at once.
template <int D, int NT, int Strands>
__device__ __forceinline__ void Kernel<D, NT, Strands>::walk_strands(int segment, Cursor& cursor, Ahead& ahead) {
  uint4* coef = coefficients();
  const int strand = t / 2;  // of this lane's columns of scores
  for (int in_chunk = 0; ahead.segment == segment; in_chunk = (in_chunk + 1) % (kChunk / kUnit)) {
    const int unit = ahead.unit, stride = ahead.length;
    const bool has_unit = strand == 0 || ahead.both;
    float x[2][2][NT][4], c[2][NT][4], shift[2][NT][4];
    // Before the wait for the keys.
    if (steps && in_chunk == 0)
      p.tabled ? make_coefficients<true>(unit * kUnit, stride * kUnit, coef)
               : make_coefficients<false>(unit * kUnit, stride * kUnit, coef);
    shift_scores_of_steps(in_chunk, coef, shift);
    scores(ahead.k, x);
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int i = 0; i < 4; ++i) c[m][0][i] = strand ? x[1][m][0][i] : x[0][m][0][i];
    wait_for_copies();
    __syncwarp();
    load_values(ahead);
    uint32_t weights[2][NT][2];
    softmax((unit + strand * stride) * kUnit, has_unit, s.meta + 32 * warp + 8 * strand, c, shift, weights);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (i && !ahead.both) break;
      uint32_t own[2][NT][2];  // 0 in the other strand's columns
#pragma unroll
      for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int j = 0; j < 2; ++j) own[m][0][j] = g / kRows == i ? weights[m][0][j] : 0;
      output(ahead.v[i], own);
    }
    __syncwarp();
    ahead.note(cursor);
    if (cursor.segment != INT_MAX) {
      load_keys(cursor, ahead);
      advance(cursor);
    } else {
      clear(ahead.k[0]), clear(ahead.k[1]);
    }
  }
}

}  // namespace wkvquant
