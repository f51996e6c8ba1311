// The work of a launch: items, units and who takes them; paged_attention.cuh says what these are.
#pragma once

#include "common.cuh"

namespace wkvquant {

// Teams of warps share out a line on which every item takes its units and, before them, `weight` for its start and end.
// So a team that begins a second item has fewer units. Where a team would begin just before or in such a gap, it begins
// after it. A team is a CTA, or half of one where there are more items: the end of one team's item and the start of its
// next overlap with the products of the others.
constexpr int kItemWeight = 20;

struct Plan {
  int units;       // of all items
  int warps;       // of a team
  int teams;       // that have units
  int weight;      // of an item, in units
  int each, more;  // the line's length is teams * each + more

  __device__ int start(int team) const { return team * each + divide(team * more, teams); }
  // The last team that starts at or before place `x`.
  __device__ int team_of(int x) const {
    int team = min(static_cast<int>(static_cast<float>(x) / (each + static_cast<float>(more) / teams)), teams - 1);
    while (start(team) > x) --team;
    while (team + 1 < teams && start(team + 1) <= x) ++team;
    return team;
  }
  __device__ int skipped(int units_of_item) const { return min(weight / 2, units_of_item); }
};

// equal: all items have as many units. warps, most_teams: of a CTA.
static __device__ Plan share_out(int units, int items, bool equal, int ctas, int warps, int most_teams) {
  Plan plan;
  int most = ctas, fewest = 2 * warps / 3;  // teams, units of a team
  for (; most_teams > 1 && most < items; most_teams /= 2, most *= 2) warps /= 2, fewest /= 2;
  plan.units = units, plan.warps = warps;
  plan.teams = max(min(min(most, units), max(items, divide(units + fewest - 1, fewest))), 1);
  plan.weight = min(kItemWeight, divide(units, plan.teams) / 2);
  if (equal) {  // whole teams an item, or whole items a team, where few teams are left out by that
    const int rounds = divide(items + plan.teams - 1, plan.teams);
    const int even = rounds > 1 ? divide(items, rounds) : divide(plan.teams, items) * items;
    if (even * 16 >= plan.teams * 15 && (rounds == 1 || even * rounds == items)) plan.teams = even, plan.weight = 0;
  }
  const int line = units + items * plan.weight;
  plan.each = line / plan.teams;
  plan.more = line - plan.each * plan.teams;
  return plan;
}

struct Item {
  int seq, head, tile;       // tile: of query rows
  int past, query, queries;  // query: first token of the step in `query`
  int first;                 // unit, counted from position 0, that its unit 0 is
  int begin, end, units;     // this team's units, and how many the item has
  int u;                     // the item's unit 0 in the list of all units
  int place;                 // and on the line of the plan
};

__device__ __forceinline__ int first_visible(int past, int window) { return window ? max(past - window + 1, 0) : 0; }

__device__ __forceinline__ int units_of(int past, int window) {
  return max((past + kUnit - 1) / kUnit - first_visible(past, window) / kUnit, 1);
}

// The item of unit `u`, of tiles of so many rows, and its units from there up to `end`. Not inlined: it runs seldom,
// and code costs time, too.
template <int Rows>
static __device__ __noinline__ Item decode(const int* prefix, const int4* sequence, int num_seqs, int window, int group,
                                           int weight, int u, int end) {
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
  const int inside = u - prefix[low], index = divide(inside, x.units);
  const int tiles = (x.queries * group + Rows - 1) / Rows;
  x.head = tiles == 1 ? index : divide(index, tiles);
  x.tile = index - x.head * tiles;
  x.begin = inside - index * x.units;
  x.end = min(x.units, x.begin + end - u);
  x.u = u - x.begin;
  x.place = x.u + (lengths.w + index + 1) * weight;
  return x;
}

// The unit at which a team begins that starts at place `x` of the line.
static __device__ __noinline__ int unit_at(const int* prefix, const int4* sequence, int num_seqs, int window,
                                           const Plan& plan, int x) {
  int low = 0, high = num_seqs - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (prefix[middle] + sequence[middle].w * plan.weight <= x)
      low = middle;
    else
      high = middle - 1;
  }
  const int4 lengths = sequence[low];
  const int units = units_of(lengths.x, window), length = units + plan.weight;
  const int inside = x - prefix[low] - lengths.w * plan.weight, index = divide(inside, length);
  const int unit = inside - index * length - plan.weight;
  return prefix[low] + index * units + (unit <= 0 ? 0 : unit > units - plan.skipped(units) ? units : unit);
}

}  // namespace wkvquant
