// Rows of an item: the query as operands, coefficients of the shift, and the step's own tokens.
#pragma once

#include "attention_kernel.cuh"

namespace wkvquant {

// Query rows as operands, coefficients of the shift, and the step's own tokens. A warp takes a row, or half of one
// where there may be more rows than warps. Columns of rows that the tile does not have are copies of its last one. Each
// warp calls when_asked() once it has asked for its first rows, and when_loaded() once they are here. A warp meets most
// of this code once, so that what a launch does not need is branched around.
template <int D, int NT, int Strands>
template <class F, class G>
__device__ __forceinline__ void Kernel<D, NT, Strands>::prepare_rows(bool with_current, bool find_parts, int size,
                                                                     int member, const F& when_asked,
                                                                     const G& when_loaded) {
  constexpr int kLanes = kRows <= kWarps ? 32 : 16, kRowsOfWarp = 32 / kLanes;
  constexpr int N = groups_of_lane(D, kLanes), kSlots = (D / 2 + 8 + kLanes - 1) / kLanes;
  constexpr bool kLate = kLanes < 32;  // half a warp has no registers for what few launches need
  int l = lane % kLanes;
  const auto active = [&](int i) { return D % (4 * kLanes) == 0 || l + kLanes * i < D / 4; };
  rows = min(item.queries * group - item.tile * kRows, kRows);
  // Asks for a row in the memory's type; convert4() waits for it.
  const auto ask = [&](const void* base, const Rows& tensor, int token, int head, uint4* to) {
    const char* from = static_cast<const char*>(base) + tensor.at(item.query + token, head) + l * launch.four;
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (active(i)) load4_raw(from + kLanes * i * launch.four, a.dtype, to[i]);
  };
  // Of an array [heads, D].
  const auto load = [&](const float* base, float (&to)[4 * N]) {
    const float* from = base + static_cast<uint32_t>(item.head * D + 4 * l);
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (active(i)) load4(from + 4 * kLanes * i, to + 4 * i);
  };
  const bool stands = 2 * p.rotary_pairs < D;  // a part of the shift does not rotate
  int first = kRowsOfWarp * member, r, own;    // first row of the warp, this lane's, its query token
  bool any;                                    // a warp without a row computes the last one's, which another one stores
  uint4 asked[3 * N];                          // query, key, value
  float x[4 * N], shift[4 * N], more[4 * N];
  int slot[kSlots];
  float2 slot_shift[kSlots];
  const auto ask_row = [&] {
    any = first < rows, r = min(first + lane / kLanes, rows - 1);
    const int row = item.tile * kRows + r;
    own = token_of(row);
#pragma unroll
    for (int i = 0; i < 3 * N; ++i) asked[i] = {0, 0, 0, 0};
    ask(a.query, launch.query, own, item.head * group + row - own * group, asked);
    if (with_current) {
      ask(a.key, launch.key, own, item.head, asked + N);
      ask(a.value, launch.value, own, item.head, asked + 2 * N);
    }
#pragma unroll
    for (int i = 0; i < 4 * N; ++i) x[i] = shift[i] = more[i] = 0;
    load(p.query_scale, x);
    if (!kLate && stands) load(p.k_shift, shift);
    if (!kLate && p.k_extra) load(p.k_extra, more);
#pragma unroll
    for (int i = 0; i < kSlots; ++i) slot[i] = 0, slot_shift[i] = {0, 0};
    if (slots) {
      const int32_t* of_lane = p.slots + l;
      const float2* of_head = p.slot_shift + static_cast<uint32_t>(item.head * slots + l);
#pragma unroll
      for (int i = 0; i < kSlots; ++i) {
        if (l + kLanes * i >= slots) continue;
        slot[i] = of_lane[kLanes * i];
        slot_shift[i] = of_head[kLanes * i];
      }
    }
  };
  float loaded[12 * N];
  float *const raw = loaded, *const key = loaded + 4 * N, *const out = loaded + 8 * N;
  // scores of the step's own token, of the part of the shift that does not rotate, and of what position 0 has more
  float high, fixed, extra;
  const auto save = [&](const float* from) {
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (any && active(i))
        *reinterpret_cast<float4*>(s.raw + r * D + 4 * l + 4 * kLanes * i) = {from[4 * i], from[4 * i + 1],
                                                                              from[4 * i + 2], from[4 * i + 3]};
  };
  const auto take_row = [&] {
    convert4(asked, launch.four == 16, a.dtype, loaded);
    high = fixed = extra = 0;
    if (kLate && stands) load(p.k_shift, shift);
    if (kLate && p.k_extra) load(p.k_extra, more);
#pragma unroll
    for (int i = 0; i < 4 * N; ++i) {
      raw[i] *= a.scale * kLog2e;
      x[i] *= raw[i];
      high += raw[i] * key[i];
    }
    if (p.k_extra)
#pragma unroll
      for (int i = 0; i < 4 * N; ++i) extra += raw[i] * more[i];
    if (stands)
#pragma unroll
      for (int i = 0; i < 4 * N; ++i)
        if (4 * l + 4 * kLanes * (i / 4) + i % 4 >= 2 * p.rotary_pairs) fixed += raw[i] * shift[i];
    save(raw);
    __syncwarp();
  };
  ask_row();
  const bool is_last = member + 1 == size;
  if (is_last) {
#pragma unroll
    for (int i = 0; i < D; i += 128)
      if (D % 128 == 0 || i + 4 * lane < D)
        copy_async(s.v_shift + 4 * lane + i, p.v_shift + static_cast<uint32_t>(item.head * D + 4 * lane) + i);
    end_group();
  }
  when_asked();
  take_row();
  when_loaded();
#pragma unroll 1
  while (true) {
    float largest = 0, together = 0;
    int f = 0;  // exponent of the shift's coefficients
    if (slots && any) {
      float2 ab[kSlots];
      float size = 0;
#pragma unroll
      for (int i = 0; i < kSlots; ++i) {
        const float u = s.raw[r * D + slot[i]], v = s.raw[r * D + slot[i] + p.rotary_pairs];
        ab[i] = {u * slot_shift[i].x + v * slot_shift[i].y, v * slot_shift[i].x - u * slot_shift[i].y};
        size += fabsf(ab[i].x) + fabsf(ab[i].y);
      }
      size = warp_sum<kLanes>(size), high = warp_sum<kLanes>(high);
      f = scale_exponent(size);
      const float shrink = power_of_two(-f);
#pragma unroll
      for (int i = 0; i < kSlots; ++i)
        if (l + kLanes * i < slots) s.ab[r * (slots + 4) + l + kLanes * i] = {ab[i].x * shrink, ab[i].y * shrink};
    } else {
      high = warp_sum<kLanes>(high);
    }
    if (p.hadamard) hadamard_groups<D, kLanes>(x, l);
#pragma unroll
    for (int i = 0; i < 4 * N; ++i) largest = fmaxf(largest, fabsf(x[i]));
    const int e = scale_exponent(warp_max_of_magnitudes<kLanes>(largest));
    // dimensions 4 .. 7 of a word: over 16
    const float unit = power_of_two(-e) * (l % 2 ? 0.0625f : 1.0f);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const __half2 even = __floats2half2_rn(x[4 * i] * unit, x[4 * i + 2] * unit);
      const __half2 odd = __floats2half2_rn(x[4 * i + 1] * unit, x[4 * i + 3] * unit);
      together += __low2float(even), together += __low2float(odd);
      together += __high2float(even), together += __high2float(odd);
      if (!any || !active(i)) continue;
      __half2* word = reinterpret_cast<__half2*>(s.query + r * (D / 8) + l / 2 + kLanes / 2 * i) + l % 2;
      word[0] = even, word[2] = odd;
    }
    together = warp_sum<kLanes>(l % 2 ? 16 * together : together);
    if (p.k_extra || stands) fixed = warp_sum<kLanes>(fixed), extra = warp_sum<kLanes>(extra);
    float weight = 1;
    if (any && with_current && item.queries > 1) {
      const int seen = a.sliding_window ? max(own - a.sliding_window + 1, 0) : 0;
      const int begin = __shfl_sync(kFull, seen, 0), end = __shfl_sync(kFull, own, 31);  // of all the warp's rows
      for (int j = begin; j < end; ++j) {
        float others[8 * N], score = 0;
        const float *other = others, *value = others + 4 * N;
        const bool sees = j >= seen && j < own;
        uint4 asked[2 * N] = {};  // key, value
        if (sees) {
          ask(a.key, launch.key, j, item.head, asked);
          ask(a.value, launch.value, j, item.head, asked + N);
        }
        convert4(asked, launch.four == 16, a.dtype, others);
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
    const int i = r + l;  // the row, and what stands for rows that the tile does not have
    if (any && i < (r + 1 < rows ? r + 1 : kRows)) {
      s.row[i] = {power_of_two(e + 24), together * power_of_two(e), power_of_two(f), fixed};
      s.first_extra[i] = extra, s.first_score[i] = kLowest;
      s.current_max[i] = with_current ? high : kLowest, s.current_sum[i] = with_current ? weight : 0;
    }
    first += kRowsOfWarp * size;
    if (first >= rows) break;
    l = hidden(l);  // few warps come here: nothing of this is to be computed before the loop
    ask_row(), take_row();
  }
  if (find_parts && is_last && lane == 0 &&
      (item.begin > 0 || item.end < item.units)) {  // of the first item the plan says it
    const int2 teams = teams_of(planned().plan, item);
    *reinterpret_cast<int2*>(s.misc + 2) = teams;
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
