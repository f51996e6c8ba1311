// The work of a step: items, units and who takes them; paged_attention.cuh says what these are. plan.cu finds it out
// once for all layers, and each CTA of attention reads what is its own.
#pragma once

#include "common.cuh"

namespace wkvquant {

// Teams of warps share out a line on which every item takes its units and, before them, `weight` for its start and end.
// So a team that begins a second item has fewer units. Where a team would begin just before or in such a gap, it begins
// after it. A team is a CTA, or half of one where there are more items: the end of one team's item and the start of its
// next overlap with the products of the others.
constexpr int kItemWeight = 20;

// So many parts of an item at most are left to its last team; of more, eight at a time are to the last of the eight.
constexpr int kWordsParts = 10, kWordsGroup = 8;

// What is alike in all launches of a shape of the attention kernel.
struct Tiling {
  int row_bits;  // a tile has 2^row_bits rows
  int warps;     // of a CTA
  int teams;     // of a CTA, at most
  int ctas;
};

struct Plan {
  int units;       // of all items
  int warps;       // of a team
  int teams;       // that have units
  int weight;      // of an item, in units
  int each, more;  // the line's length is teams * each + more
  int alone;       // 1: items have several teams, and each of these has no units of any other

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

// equal: all items have as many units.
static __device__ Plan share_out(int units, int items, bool equal, const Tiling& tiling) {
  Plan plan;
  int warps = tiling.warps, most = tiling.ctas, fewest = 2 * warps / 3;  // warps, units of a team; teams
  for (int i = 1; i < tiling.teams && most < items; i *= 2, most *= 2) warps /= 2, fewest /= 2;
  plan.units = units, plan.warps = warps;
  plan.teams = max(min(min(most, units), max(items, divide(units + fewest - 1, fewest))), 1);
  plan.weight = min(kItemWeight, divide(units, plan.teams) / 2), plan.alone = 0;
  if (equal) {  // whole teams an item, or whole items a team, where few teams are left out by that
    const int rounds = divide(items + plan.teams - 1, plan.teams);
    const int even = rounds > 1 ? divide(items, rounds) : divide(plan.teams, items) * items;
    if (even * 16 >= plan.teams * 15 && (rounds == 1 || even * rounds == items))
      plan.teams = even, plan.weight = 0, plan.alone = even > items;
  }
  const int line = units + items * plan.weight;
  plan.each = line / plan.teams;
  plan.more = line - plan.each * plan.teams;
  return plan;
}

struct alignas(16) Item {
  int seq, head, tile;       // tile: of query rows
  int past, query, queries;  // query: first token of the step in `query`
  int first;                 // unit, counted from position 0, that its unit 0 is
  int begin, end, units;     // this team's units, and how many the item has
  int u;                     // the item's unit 0 in the list of all units
  int place;                 // and on the line of the plan
};

// What a team does: `end` is that of its units in the list of all, not behind the item's if it does nothing.
struct Work {
  Item item;         // its first one
  int end;           // of all its units
  int first, parts;  // the teams that have parts of the item: the first of them, how many; minus that if `alone`
  int warps;         // of a team; 2^8 times row_bits of the tiling
};
static_assert(sizeof(Work) == 4 * sizeof(int4));

// The memory of a plan.
struct Planned {
  union {
    Plan plan;
    int4 aligned[4];
  };
  Work work[kMaxCtas * kTeams];  // of each CTA's first and second half, which are one team or two
  int4 sequence[kMaxSeqs];       // past, first query, queries, items before
  int prefix[kMaxSeqs + 1];      // units before a sequence; the last one's is that of all
};

__device__ __forceinline__ int first_visible(int past, int window) { return window ? max(past - window + 1, 0) : 0; }

__device__ __forceinline__ int units_of(int past, int window) {
  return max((past + kUnit - 1) / kUnit - first_visible(past, window) / kUnit, 1);
}

// The item of unit `u`, which is of sequence `seq` or one after it, and its units from there up to `end`. Not inlined:
// it runs seldom, and code costs time, too.
static __device__ __noinline__ Item decode(const Planned& planned, int window, int group, int row_bits, int seq, int u,
                                           int end) {
  Item x;
  while (planned.prefix[seq + 1] <= u) ++seq;
  x.seq = seq;
  const int4 lengths = planned.sequence[seq];
  x.past = lengths.x, x.query = lengths.y, x.queries = lengths.z;
  x.units = units_of(x.past, window);
  x.first = first_visible(x.past, window) / kUnit;
  const int before = planned.prefix[seq], index = divide(u - before, x.units);
  const int tiles = (x.queries * group + (1 << row_bits) - 1) >> row_bits;
  x.head = tiles == 1 ? index : divide(index, tiles);
  x.tile = index - x.head * tiles;
  x.begin = u - before - index * x.units;
  x.end = min(x.units, x.begin + end - u);
  x.u = u - x.begin;
  x.place = x.u + (lengths.w + index + 1) * planned.plan.weight;
  return x;
}

// The teams that have parts of an item: the first of them, how many.
__device__ __forceinline__ int2 teams_of(const Plan& plan, const Item& x) {
  const int first = plan.team_of(x.place);
  return {first, plan.team_of(x.place + x.units - max(plan.skipped(x.units), 1)) - first + 1};
}

}  // namespace wkvquant
