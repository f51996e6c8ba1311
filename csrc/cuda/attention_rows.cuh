// Rows of an item: the query as operands, coefficients of the shift, and the step's own tokens.
#pragma once

#include "attention_kernel.cuh"

namespace wkvquant {

// Query rows as operands, coefficients of the shift, and the step's own tokens. A warp takes a row, or half of one
// where there may be more rows than warps. Columns of rows that the tile does not have are copies of its last one. Each
// warp calls when_loaded() once its first rows are here.
template <int D, int NT, int Strands>
template <class F>
__device__ void Kernel<D, NT, Strands>::prepare_rows(bool with_current, bool find_parts, const F& when_loaded) {
  constexpr int kLanes = kRows <= kWarps ? 32 : 16, kRowsOfWarp = 32 / kLanes;
  constexpr int N = groups_of_lane(D, kLanes), kSlots = (D / 2 + 8 + kLanes - 1) / kLanes;
  const int l = lane % kLanes, size = this->size(), member = this->member();
  const auto active = [&](int i) { return D % (4 * kLanes) == 0 || l + kLanes * i < D / 4; };
  rows = min(item.queries * group - item.tile * kRows, kRows);
  const int64_t of_head = item.head * D + 4 * l;  // in [heads, D]
  const int64_t keys = item.query * a.key_stride[0] + item.head * a.key_stride[1] + 4 * l;
  const int64_t values = item.query * a.value_stride[0] + item.head * a.value_stride[1] + 4 * l;
  // Asks for a row in the memory's type; convert() waits for it.
  const auto ask = [&](const void* base, int64_t at, uint4(&to)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (active(i)) load4_raw(base, a.dtype, at + 4 * kLanes * i, to[i]);
  };
  const auto convert = [&](const uint4(&from)[N], float (&to)[4 * N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) convert4(from[i], a.dtype, to + 4 * i);
  };
  if (kRowsOfWarp * member >= rows) when_loaded();
#pragma unroll 1
  for (int first = kRowsOfWarp * member; first < rows; first += kRowsOfWarp * size) {
    const int r = min(first + lane / kLanes, rows - 1), row = item.tile * kRows + r;
    const int own = token_of(row), head = item.head * group + row - own * group;
    float raw[4 * N] = {}, x[4 * N] = {}, key[4 * N] = {}, out[4 * N] = {}, shift[4 * N] = {}, more[4 * N] = {};
    int slot[kSlots];
    float2 slot_shift[kSlots], ab[kSlots];
    uint4 asked[3][N] = {};  // query, key, value
    ask(a.query, (item.query + own) * a.query_stride[0] + head * a.query_stride[1] + 4 * l, asked[0]);
    if (with_current) {
      ask(a.key, keys + own * a.key_stride[0], asked[1]);
      ask(a.value, values + own * a.value_stride[0], asked[2]);
    }
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (!active(i)) continue;
      const int at = 4 * kLanes * i;
      load4(p.query_scale + of_head + at, x + 4 * i);
      if (4 * l + at + 3 >= 2 * p.rotary_pairs) load4(p.k_shift + of_head + at, shift + 4 * i);
      if (p.k_extra) load4(p.k_extra + of_head + at, more + 4 * i);
    }
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
      const bool used = l + kLanes * i < slots;
      slot[i] = used ? p.slots[l + kLanes * i] : 0;
      slot_shift[i] = used ? p.slot_shift[item.head * slots + l + kLanes * i] : float2{0, 0};
    }
    convert(asked[0], raw), convert(asked[1], key), convert(asked[2], out);
    // scores of the step's own token, of the part of the shift that does not rotate, and of what position 0 has more
    float high = 0, fixed = 0, extra = 0, size = 0, largest = 0, together = 0;
    float* saved = s.raw + r * D + 4 * l;
#pragma unroll
    for (int i = 0; i < 4 * N; ++i) {
      raw[i] *= a.scale * kLog2e;
      x[i] *= raw[i];
      high += raw[i] * key[i];
      extra += raw[i] * more[i];
      if (4 * l + 4 * kLanes * (i / 4) + i % 4 >= 2 * p.rotary_pairs) fixed += raw[i] * shift[i];
    }
    const auto save = [&](const float (&from)[4 * N]) {
#pragma unroll
      for (int i = 0; i < N; ++i)
        if (active(i))
          *reinterpret_cast<float4*>(saved + 4 * kLanes * i) = {from[4 * i], from[4 * i + 1], from[4 * i + 2],
                                                                from[4 * i + 3]};
    };
    save(raw);
    __syncwarp();
    if (first == kRowsOfWarp * member) when_loaded();
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
      const float u = s.raw[r * D + slot[i]], v = s.raw[r * D + slot[i] + p.rotary_pairs];
      ab[i] = {u * slot_shift[i].x + v * slot_shift[i].y, v * slot_shift[i].x - u * slot_shift[i].y};
      size += fabsf(ab[i].x) + fabsf(ab[i].y);
    }
    if (p.hadamard) hadamard_groups<D, kLanes>(x, l);
#pragma unroll
    for (int i = 0; i < 4 * N; ++i) largest = fmaxf(largest, fabsf(x[i]));
    size = warp_sum<kLanes>(size), high = warp_sum<kLanes>(high);
    fixed = warp_sum<kLanes>(fixed), extra = warp_sum<kLanes>(extra);
    const int e = scale_exponent(warp_max_of_magnitudes<kLanes>(largest)), f = scale_exponent(size);
    // dimensions 4 .. 7 of a word: over 16
    const float unit = power_of_two(-e) * (l % 2 ? 0.0625f : 1.0f), shrink = power_of_two(-f);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      __half h[4];
#pragma unroll
      for (int b = 0; b < 4; ++b) {
        h[b] = __float2half_rn(x[4 * i + b] * unit);
        together += __half2float(h[b]);
      }
      if (!active(i)) continue;
      __half2* word = reinterpret_cast<__half2*>(s.query + r * (D / 8) + l / 2 + kLanes / 2 * i) + l % 2;
      word[0] = __halves2half2(h[0], h[2]), word[2] = __halves2half2(h[1], h[3]);
    }
    together = warp_sum<kLanes>(l % 2 ? 16 * together : together);
#pragma unroll
    for (int i = 0; i < kSlots; ++i)
      if (l + kLanes * i < slots) s.ab[r * (slots + 4) + l + kLanes * i] = {ab[i].x * shrink, ab[i].y * shrink};
    float weight = 1;
    if (with_current && item.queries > 1) {
      const int seen = a.sliding_window ? max(own - a.sliding_window + 1, 0) : 0;
      const int begin = __shfl_sync(kFull, seen, 0), end = __shfl_sync(kFull, own, 31);  // of all the warp's rows
      for (int j = begin; j < end; ++j) {
        float other[4 * N], value[4 * N], score = 0;
        const bool sees = j >= seen && j < own;
        uint4 of_key[N] = {}, of_value[N] = {};
        if (sees)
          ask(a.key, keys + j * a.key_stride[0], of_key), ask(a.value, values + j * a.value_stride[0], of_value);
        convert(of_key, other), convert(of_value, value);
#pragma unroll
        for (int i = 0; i < 4 * N; ++i) score += raw[i] * other[i];
        score = warp_sum<kLanes>(score);
        if (!sees) score = -INFINITY;
        const float next = fmaxf(high, score), keep = exp2_fast(high - next), take = exp2_fast(score - next);
        high = next;
        weight = weight * keep + take;
#pragma unroll
        for (int i = 0; i < 4 * N; ++i) out[i] = out[i] * keep + take * value[i];
      }
    }
    __syncwarp();
    save(out);
    if (l == 0)
      for (int i = r; i < (r + 1 < rows ? r + 1 : kRows); ++i) {
        s.row[i] = {power_of_two(e + 24), together * power_of_two(e), power_of_two(f), fixed};
        s.first_extra[i] = extra, s.first_score[i] = kLowest;
        s.current_max[i] = with_current ? high : kLowest, s.current_sum[i] = with_current ? weight : 0;
      }
  }
  if (member + 1 < size) return;
#pragma unroll
  for (int i = 0; i < D; i += 128) {
    const int d = 4 * lane + i;
    if (D % 128 == 0 || d < D)
      *reinterpret_cast<float4*>(s.v_shift + d) = __ldg(reinterpret_cast<const float4*>(p.v_shift + item.head * D + d));
  }
  if (find_parts && lane == 0 && (item.begin > 0 || item.end < item.units)) {  // of the first item the plan says it
    const int2 teams = teams_of(planned().plan, item);
    s.misc[4] = teams.x, s.misc[5] = teams.y;
  }
}

template <int D, int NT, int Strands>
__device__ void Kernel<D, NT, Strands>::start_rows() {
#pragma unroll
  for (int n = 0; n < NT; ++n)
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      top[n][c] = kLowest, sum[n][c] = 0, min_sum[n][c] = 0;
    }
#pragma unroll
  for (int m = 0; m < S::kMTiles; ++m)
#pragma unroll
    for (int n = 0; n < NT; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) acc[m][n][i] = 0;
}

}  // namespace wkvquant
