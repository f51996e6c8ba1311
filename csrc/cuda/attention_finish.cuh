// The end of an item: warps and CTAs add up, and the output is written.
#pragma once

#include "attention_kernel.cuh"

namespace wkvquant {

template <int D, int NT, int Strands>
__device__ void Kernel<D, NT, Strands>::write_row4(int r, int d, float4 x, float sum_of_row) const {
  const int row = item.tile * kRows + r, token = token_of(row);
  char* to = static_cast<char*>(a.out) + launch.out.at(item.query + token, item.head * group + row - token * group);
  const float factor = sum_of_row > 0 ? __fdividef(1, sum_of_row) : 0;
  store4(to + d / 4 * launch.four, a.dtype, {x.x * factor, x.y * factor, x.z * factor, x.w * factor});
}

template <int D, int NT, int Strands>
__device__ void Kernel<D, NT, Strands>::write_lse(int r, float top_of_row, float sum_of_row) const {
  if (!a.lse) return;
  const int row = item.tile * kRows + r, token = token_of(row);
  a.lse[(item.query + token) * a.lse_stride[0] + (item.head * group + row - token * group) * a.lse_stride[1]] =
      (top_of_row + __log2f(sum_of_row)) * kLn2;
}

template <int D, int NT, int Strands>
__device__ float* Kernel<D, NT, Strands>::partial(int number, int slot) const {
  return reinterpret_cast<float*>(static_cast<char*>(a.workspace) + kCounterBytes) +
         static_cast<uint32_t>((2 * number + slot) * partial_floats(kRows, D));
}

// Adds parts of a row, each with its maximum and sum, to four numerators, a maximum and a sum.
template <int N>
__device__ __forceinline__ void add_parts(const float2 (&state)[N], const float4 (&y)[N], float4& x, float& high,
                                          float& total) {
  float next = high;
#pragma unroll
  for (int k = 0; k < N; ++k) next = fmaxf(next, state[k].x);
  const float keep = exp2_fast(high - next);
  high = next, total *= keep, x.x *= keep, x.y *= keep, x.z *= keep, x.w *= keep;
#pragma unroll
  for (int k = 0; k < N; ++k) {
    const float f = exp2_fast(state[k].x - high);
    total += f * state[k].y;
    x.x += f * y[k].x, x.y += f * y[k].y, x.z += f * y[k].z, x.w += f * y[k].w;
  }
}

// Parts of an item whose teams have nothing else to do. The last of them adds up. The others leave it words that are 0
// between calls: it reads them until they are not, and empties them. So nothing is waited for but these words, on their
// way to L2 and back. Of many parts each eighth is the last of a group, and the item's last adds up what these leave.
// A CTA waits for CTAs of lower numbers alone, which run already, as CTAs start in this order. Words of groups come
// after those of all CTAs, in the place of the item's first CTA the first group's, and so on.
template <int D, int NT, int Strands>
__device__ float* Kernel<D, NT, Strands>::words_of(int number) const {
  return reinterpret_cast<float*>(static_cast<char*>(a.workspace) + kCounterBytes + kMaxCtas * kCtaBytes) +
         static_cast<uint32_t>(number * partial_floats(kRows, D));
}

template <int D, int NT, int Strands>
__device__ __forceinline__ void Kernel<D, NT, Strands>::leave(float* words, int r, int d, const float4& x, float high,
                                                              float total) const {
  const auto marked = [](float x) { return x == 0 ? -0.0f : x; };
  write_words(reinterpret_cast<float4*>(words + r * D + d), {marked(x.x), x.y, x.z, x.w});
  if (d == 0) write_words(reinterpret_cast<float2*>(words + kRows * D + 2 * r), {marked(high), total});
}

template <int D, int NT, int Strands>
__device__ __forceinline__ void Kernel<D, NT, Strands>::gather(float* words, int count, int r, int d, float4& x,
                                                               float& high, float& total) const {
  constexpr int kBatch = kWordsGroup, kStride = partial_floats(kRows, D);
  float4* numerators = reinterpret_cast<float4*>(words + r * D + d);
  const float2* states = reinterpret_cast<const float2*>(words + kRows * D + 2 * r);
#pragma unroll 1
  for (int c = 0; c < count; c += kBatch, numerators += kBatch * kStride / 4, states += kBatch * kStride / 2) {
    float2 state[kBatch];  // maximum, sum
    float4 y[kBatch];
    uint32_t least, tries = 0;
    do {
      if (++tries >> 22) __trap();  // seconds
#pragma unroll
      for (int k = 0; k < kBatch; ++k) {
        state[k] = {kLowest, -0.0f}, y[k] = {-0.0f, -0.0f, -0.0f, -0.0f};
        if (c + k < count) {
          state[k] = read_words(states + k * (kStride / 2));
          y[k] = read_words(numerators + k * (kStride / 4));
        }
      }
      least = ~0u;
#pragma unroll
      for (int k = 0; k < kBatch; ++k) least = min(least, min(__float_as_uint(state[k].x), __float_as_uint(y[k].x)));
    } while (least == 0);
#pragma unroll
    for (int k = 0; k < kBatch; ++k)  // this thread alone reads them
      if (c + k < count) numerators[k * (kStride / 4)] = {0, 0, 0, 0};
    add_parts(state, y, x, high, total);
  }
}

// Adds up the warps' results of the item. If it is this team's alone, that is the output; of teams that have no other
// item the last adds the others' to it (`gather`). If not, it is stored for the last team of the item to arrive, and
// one thread finds out whether this is the one, while the others go on: misc says so after the next barrier. Returns
// whether it will.
template <int D, int NT, int Strands>
__device__ bool Kernel<D, NT, Strands>::finish(bool with_current) {
  // What does not depend on the other warps comes before the barrier, and what is read after it is asked for at once,
  // at constant distances: this code runs once, and waits and addresses are most of it.
  const int size = this->size(), team = this->team(), member = this->member();
  const bool whole = item.begin == 0 && item.end == item.units;
  const int others = -s.misc[3] - 1;  // not negative: teams whose parts the item's last team waits for
  const int number = team * gridDim.x + blockIdx.x, first_warp = warp - member;
  const int first = s.misc[2];
  const uint32_t index = number - first;
  const bool grouped = others >= kWordsParts;
  const bool is_last = whole || (others >= 0 && number == first + others);
  const int before = grouped ? index % kWordsGroup : index;  // of the group
  const bool leads = is_last || (grouped && before == kWordsGroup - 1);
  const int groups = grouped && is_last ? index / kWordsGroup : 0;  // before this one
  float4 extra = {0, 0, 0, 0};
  const uint32_t values = rows * (D / 4);  // of four
  const auto ask_extra = [&](uint32_t i) {
    if (p.v_extra && i < values)
      extra =
          __ldg(reinterpret_cast<const float4*>(p.v_extra + static_cast<uint32_t>(item.head * D + i % (D / 4) * 4)));
  };
  ask_extra(32 * member + lane);
  float* mine = s.red + warp * (S::kColumns * S::kPitch);
  __syncwarp();
#pragma unroll
  for (int m = 4; m < 32; m *= 2)
#pragma unroll
    for (int n = 0; n < NT; ++n)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        sum[n][j] += __shfl_xor_sync(kFull, sum[n][j], m);
        min_sum[n][j] += __shfl_xor_sync(kFull, min_sum[n][j], m);
      }
#pragma unroll
  for (int n = 0; n < NT; ++n)
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int c = 8 * n + 2 * t + j;
#pragma unroll
      for (int m = 0; m < S::kMTiles; m += 2)
        *reinterpret_cast<float4*>(mine + c * S::kPitch + S::place(S::dimension(m, g))) = {
            acc[m][n][j] * 0x1p24f, acc[m][n][2 + j] * 0x1p20f,
            (D <= 128 ? acc[m + 1][n][j] - acc[m + 1][n][2 + j] : acc[m + 1][n][j]) * 0x1p24f,
            acc[m + 1][n][2 + j] * 0x1p20f};
      if (g == 0) s.part[warp * S::kColumns + c] = {top[n][j], sum[n][j], min_sum[n][j], 0};
    }
  barrier(1 + team, 32 * size);
  float* out = partial(number, item.begin == 0);
  constexpr int kOfRow = kWarps * Strands, kHalf = kOfRow / kTeams;  // columns of a row, kRows apart, of a CTA, a team
  const bool all = size == kWarps;
#pragma unroll 1
  for (uint32_t i = 32 * member + lane; i < values; i += 32 * size) {
    const uint32_t r = i / (D / 4), d = i % (D / 4) * 4;
    // Where a team has half of the warps, its columns are read twice and count once.
    const float4* parts = s.part + first_warp * S::kColumns + r;
    const float* red = s.red + first_warp * (S::kColumns * S::kPitch) + r * S::kPitch + S::place(d);
    const float4* more_parts = parts + (all ? kHalf * kRows : 0);
    const float* more_red = red + (all ? kHalf * kRows * S::kPitch : 0);
    float4 state[kOfRow], y[kOfRow];
#pragma unroll
    for (int w = 0; w < kOfRow; ++w) state[w] = w < kHalf ? parts[w * kRows] : more_parts[(w - kHalf) * kRows];
    const float own = with_current ? s.current_max[r] : kLowest, first_score = s.first_score[r];
    const float own_sum = s.current_sum[r];
    const float4 shift = *reinterpret_cast<const float4*>(s.v_shift + d);
    const float4 current = *reinterpret_cast<const float4*>(s.raw + r * D + d);
#pragma unroll
    for (int w = 0; w < kOfRow; ++w)
      y[w] = *reinterpret_cast<const float4*>(w < kHalf ? red + w * (kRows * S::kPitch)
                                                        : more_red + (w - kHalf) * (kRows * S::kPitch));
    float tops[4] = {own, kLowest, kLowest, kLowest};  // short chains
#pragma unroll
    for (int w = 0; w < kOfRow; ++w) tops[w % 4] = fmaxf(tops[w % 4], state[w].x);
    const float high = fmaxf(fmaxf(tops[0], tops[1]), fmaxf(tops[2], tops[3]));
    float past = 0, low = 0;
    float4 x = {0, 0, 0, 0};
    const auto add = [&](float f, const float4& y) { x.x += f * y.x, x.y += f * y.y, x.z += f * y.z, x.w += f * y.w; };
#pragma unroll
    for (int w = 0; w < kOfRow; ++w) {
      const float f = w < kHalf || all ? exp2_fast(state[w].x - high) : 0;
      past += f * state[w].y, low += f * state[w].z;
      add(f, y[w]);
    }
    add(past, shift);
    x.x += low, x.y += low, x.z += low, x.w += low;
    if (p.v_extra) add(exp2_fast(first_score - high), extra), ask_extra(i + 32 * size);
    float total = past;
    if (with_current) {
      const float f = exp2_fast(own - high);
      total += f * own_sum;
      add(f, current);
    }
    float top_of_row = high;
    if (leads && !whole) {
      float* words = words_of(number - before);
      int count = before;
#pragma unroll 1
      for (int level = 0; level < 2; ++level) {
        gather(words, count, r, d, x, top_of_row, total);
        if (!groups) break;
        words = words_of(kMaxCtas + first), count = groups;
      }
    }
    if (is_last) {
      write_row4(r, d, x, total);
      if (d == 0) write_lse(r, top_of_row, total);
    } else if (others >= 0) {
      leave(words_of(leads ? kMaxCtas + first + index / kWordsGroup : number), r, d, x, top_of_row, total);
    } else {
      *reinterpret_cast<float4*>(out + r * D + d) = x;
      if (d == 0) *reinterpret_cast<float2*>(out + kRows * D + 2 * r) = {high, total};
    }
  }
  if (!whole && others >= 0 && !leads) return false;
  barrier(1 + team, 32 * size);
  if (leads) {
    if (!whole)
      for (int i = threadIdx.x; i < (before + groups) * kRows; i += S::kThreads) {
        const int k = i / kRows, from = k < before ? number - before + k : kMaxCtas + first + k - before;
        reinterpret_cast<float2*>(words_of(from) + kRows * D)[i % kRows] = {0, 0};
      }
    return false;
  }
  if (member + 1 != size || lane != 0) return true;
  int* counter = static_cast<int*>(a.workspace) + s.misc[2];
  const bool all_here = count_arrival(counter) == s.misc[3] - 1;
  s.misc[0] = s.misc[2], s.misc[1] = all_here ? s.misc[3] : 0;
  if (all_here) acquire(), *counter = 0;  // in this order: it would wait for the store
  return true;
}

// Adds up the partial results of an item.
template <int D, int NT, int Strands>
__device__ void Kernel<D, NT, Strands>::combine(const Item& x) {
  const int first = s.misc[0], parts = s.misc[1];
  item = x;
  rows = min(item.queries * group - item.tile * kRows, kRows);
  constexpr int kBatch = 10;  // loads in flight: there is nothing to it but their latency
  constexpr int kStride = 2 * partial_floats(kRows, D);
#pragma unroll 1
  for (uint32_t i = 32 * member() + lane; i < rows * (D / 4); i += 32 * size()) {
    const uint32_t r = i / (D / 4), d = i % (D / 4) * 4;
    const float *numerators = partial(first, 0) + r * D + d, *states = partial(first, 0) + kRows * D + 2 * r;
    float high = kLowest, total = 0;
    float4 x = {0, 0, 0, 0};
#pragma unroll 1
    for (int c = 0; c < parts; c += kBatch, numerators += kBatch * kStride, states += kBatch * kStride) {
      float2 state[kBatch];  // maximum, sum
      float4 y[kBatch];
      const int of_first = c == 0 ? kStride / 2 : 0;  // the first team's is in its other slot
#pragma unroll
      for (int k = 0; k < kBatch; ++k) {  // constant distances: addresses would be as long as all the rest
        state[k] = {kLowest, 0}, y[k] = {0, 0, 0, 0};
        if (c + k < parts) {
          const int at = k ? k * kStride : of_first;
          state[k] = __ldcg(reinterpret_cast<const float2*>(states + at));
          y[k] = __ldcg(reinterpret_cast<const float4*>(numerators + at));
        }
      }
      add_parts(state, y, x, high, total);
    }
    write_row4(r, d, x, total);
    if (d == 0) write_lse(r, high, total);
  }
}

}  // namespace wkvquant
