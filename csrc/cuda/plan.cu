// Lengths of a step's sequences -> positions of its tokens, and who does what in its attention: once for all layers.
//
// The first CTA makes the plan, the others find positions. Sequences are counted first, a thread each; then every
// team's beginning and first item are looked up, again by a thread each.
#include "attention_kernel.cuh"

namespace wkvquant {
namespace {

constexpr int kThreads = 1024;

// Index of the last of `values`, which ascend, that is at most x; 0 if none is.
template <class F>
__device__ __forceinline__ int last_at_most(int x, int count, const F& values) {
  int low = 0, high = count - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (values(middle) <= x)
      low = middle;
    else
      high = middle - 1;
  }
  return low;
}

struct Counts {
  int units, items, least, longest;
};

// Units and items before each sequence, and of all. The window hides what is before it.
__device__ Counts count(const WkvCudaPlan& a, const Tiling& tiling, Planned& planned) {
  __shared__ Counts of_warps[kThreads / 32];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = a.num_heads / a.num_kv_heads;
  Counts all = {0, 0, INT_MAX, 0};
  for (int first = 0; first < a.num_planned; first += kThreads) {
    const int i = first + threadIdx.x;
    Counts own = {0, 0, INT_MAX, 0};
    if (i < a.num_planned) {
      const int query = a.query_start_loc[i], next = a.query_start_loc[i + 1], length = a.seq_lens[i];
      const int queries = next > query && next <= a.num_tokens ? next - query : 0;
      const int past = static_cast<int>(min(static_cast<int64_t>(max(length - queries, 0)), a.most_past));
      own.items = ((queries * group + (1 << tiling.row_bits) - 1) >> tiling.row_bits) * a.num_kv_heads;
      if (own.items) {
        own.least = own.longest = units_of(past, a.sliding_window);
        own.units = own.least * own.items;
      }
      planned.sequence[i] = {past, query, queries, 0};
    }
    Counts before = own;
#pragma unroll 1
    for (int m = 1; m < 32; m *= 2) {
      const int units = __shfl_up_sync(kFull, before.units, m), items = __shfl_up_sync(kFull, before.items, m);
      if (lane >= m) before.units += units, before.items += items;
    }
    own.least = __reduce_min_sync(kFull, own.least), own.longest = __reduce_max_sync(kFull, own.longest);
    if (lane == 31) of_warps[warp] = {before.units, before.items, own.least, own.longest};
    __syncthreads();
    before.units += all.units - own.units, before.items += all.items - own.items;
#pragma unroll 1
    for (int w = 0; w < kThreads / 32; ++w) {
      const Counts other = of_warps[w];
      if (w < warp) before.units += other.units, before.items += other.items;
      all.units += other.units, all.items += other.items;
      all.least = min(all.least, other.least), all.longest = max(all.longest, other.longest);
    }
    if (i < a.num_planned) planned.prefix[i] = before.units, planned.sequence[i].w = before.items;
    __syncthreads();
  }
  if (threadIdx.x == 0) planned.prefix[a.num_planned] = all.units;
  return all;
}

// The unit at which a team begins that starts at place `x` of the line.
__device__ int unit_at(const WkvCudaPlan& a, const Planned& planned, const Plan& plan, int x) {
  const int seq =
      last_at_most(x, a.num_planned, [&](int i) { return planned.prefix[i] + planned.sequence[i].w * plan.weight; });
  const int4 lengths = planned.sequence[seq];
  const int units = units_of(lengths.x, a.sliding_window), length = units + plan.weight;
  const int inside = x - planned.prefix[seq] - lengths.w * plan.weight, index = divide(inside, length);
  const int unit = inside - index * length - plan.weight;
  return planned.prefix[seq] + index * units + (unit <= 0 ? 0 : unit > units - plan.skipped(units) ? units : unit);
}

__device__ void make_plan(const WkvCudaPlan& a, const Tiling& tiling, Planned& planned) {
  __shared__ Plan plan_of_all;
  const Counts all = count(a, tiling, planned);
  if (threadIdx.x == 0) planned.plan = plan_of_all = share_out(all.units, all.items, all.least == all.longest, tiling);
  __syncthreads();  // of what is in global memory, too
  const Plan plan = plan_of_all;
  for (int i = threadIdx.x; i < tiling.ctas * kTeams; i += kThreads) {
    const int cta = i / kTeams, team = plan.warps < tiling.warps ? i % kTeams : 0, number = team * tiling.ctas + cta;
    Work work = {};
    work.warps = plan.warps | tiling.row_bits << 8;
    if (number < min(plan.teams, plan.units)) {
      const int begin = plan.weight ? unit_at(a, planned, plan, plan.start(number)) : plan.start(number);
      work.end = plan.units;
      if (number + 1 < plan.teams)
        work.end = plan.weight ? unit_at(a, planned, plan, plan.start(number + 1)) : plan.start(number + 1);
      if (begin < work.end) {
        const int seq = last_at_most(begin, a.num_planned, [&](int i) { return planned.prefix[i]; });
        const int group = a.num_heads / a.num_kv_heads;
        work.item = decode(planned, a.sliding_window, group, tiling.row_bits, seq, begin, work.end);
        const int2 teams = teams_of(plan, work.item);
        work.first = teams.x, work.parts = plan.alone ? -teams.y : teams.y;
      } else {
        work.end = 0;
      }
    }
    planned.work[i] = work;
  }
}

__global__ void __launch_bounds__(kThreads) plan_step(const __grid_constant__ WkvCudaPlan a, Tiling tiling) {
  if (blockIdx.x == 0) return make_plan(a, tiling, *static_cast<Planned*>(a.plan));
  const int64_t token = (blockIdx.x - 1) * static_cast<int64_t>(kThreads) + threadIdx.x;
  if (token >= a.num_positions) return;
  const int seq = last_at_most(static_cast<int>(token), a.num_seqs, [&](int i) { return a.query_start_loc[i]; });
  a.positions[token] = max(token + a.seq_lens[seq] - a.query_start_loc[seq + 1], int64_t{0});
}

}  // namespace
}  // namespace wkvquant

extern "C" int wkvquant_cuda_plan(const WkvCudaPlan* a, void* stream) {
  using namespace wkvquant;
  const Tiling tiling = tiling_of(*a);
  const dim3 grid(1 + (a->num_positions + kThreads - 1) / kThreads);
  plan_step<<<grid, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(*a, tiling);
  return cudaGetLastError();
}
