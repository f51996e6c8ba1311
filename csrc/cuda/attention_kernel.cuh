// State and main loop of the attention kernel; paged_attention.cuh says what it does. The parts that run() calls are in
// attention_load, _rows, _past and _finish.cuh.
#pragma once

#include <algorithm>
#include <climits>

#include "attention_plan.cuh"
#include "ptx.cuh"

namespace wkvquant {

constexpr float kSlack = 2;
constexpr int kAny = -1;  // number of steps that is not known to the compiler

template <int D, int NT, int Strands>
struct Shape {
  static_assert(Strands == 1 || (Strands == 2 && NT == 1));
  static constexpr int kHeadSize = D, kTiles = NT, kStrands = Strands;
  static constexpr int kColumns = 8 * NT, kRows = kColumns / Strands;  // of products, of a tile
  static constexpr int kRowBits = kRows == 4 ? 2 : kRows == 8 ? 3 : 4;
  static constexpr int kWarps = D > 128 ? 8 : NT == 1 ? 6 : 4;
  static constexpr int kCtasPerSm = D > 128 ? 1 : 2;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kKWords = D / 32;  // K words of a thread and token
  static constexpr int kVWords = D / 32;  // V words of a thread and token pair
  static constexpr int kMTiles = D / 16;
  static constexpr int kPitch = D + 4;

  // First of the two dimensions (d, d + 1) that thread row g has in m-tile `m` of the output.
  __device__ static __forceinline__ int dimension(int m, int g) { return 4 * word(m / 2, g) + 2 * (m % 2); }
  // Where a dimension is in `red`: lanes that store 16 bytes at once meet in no bank.
  __device__ static __forceinline__ uint32_t place(uint32_t d) {
    return D == 96 ? d : d ^ (d / (D == 64 ? 8 : 16) % 2 * 4);
  }
  // V word c of thread row g.
  __device__ static __forceinline__ int word(int c, int g) {
    if constexpr (D == 64) return 2 * g + c;
    if constexpr (D == 96) return g + 8 * c;
    return 4 * g + c % 4 + c / 4 * 32;
  }
};

__host__ __device__ inline int steps_of(const WkvCudaParams& p) { return p.fast_steps + (p.slow_steps > 0); }
__host__ __device__ inline int slots_of(const WkvCudaParams& p) { return 8 * (p.fast_steps + p.slow_steps); }

struct Shared {
  uint4* meta;            // [warps][2 halves of a unit][2 units][4 of K, 4 of V] scales of four tokens
  const uint8_t** tiles;  // [warps][2 halves][2] where the tiles of a unit of each strand begin
  uint4* query;           // [rows][D / 8], the 8 dimensions of a word in the order 0 2 4 6 1 3 5 7, 4 .. 7 over 16
  uint4* basis;           // tables of the shift, as in WkvCudaParams, where they are `tabled`
  uint4* chebyshev;
  int64_t* turns;
  float2* ab;      // [rows][slots + 4] coefficients of cos and sin at position 0
  float2* angle;   // [warps][strands][slots] cos and sin at the chunk's centre
  float* v_shift;  // [D]
  float* raw;      // [rows][D] the query, then the current tokens' part of the output
  float*
      red;  // [warps][columns][pitch] numerators; before them coefficients of the shift, [warps][NT][steps][32] uint4
  float4* row;  // [rows] what turns products into scores: factor, total, factor of the shift, constant
  float *first_extra, *first_score;  // [rows] what position 0 has more, and its score
  float *current_max, *current_sum;  // [rows]
  float4* part;                      // [warps][columns] maximum, sum, sum of minima
  int* warps;                        // [warps] of a team, the same for all
  Item* item;                        // [2] this one and the one before
  int4* walk;  // [warps] of what the warp asks for next: next item's unit in the list of all units, sequence, last
               // tile, end of the team's units
  int* misc;   // [8] first CTA that has a part of the item before, the item's parts if this CTA adds them up, the same
               // two of this item (before it is known who adds them up; minus the item's parts if its CTAs have no
               // other), past tokens, the last of them that a window hides from any row, last row of the tile, its rows

  // Where things are whose sizes the compiler does not know, in bytes.
  struct Layout {
    int team_bytes, basis, chebyshev, turns, angle, bytes;
  };

  // Fixed offsets: what is of a team begins at the first one returned, `moved` bytes further on, and ends in `ab`, at
  // the second.
  template <class S>
  __host__ __device__ static int2 carve(Shared* s, char* base, int moved) {
    int used = 0;
    auto take = [&](auto*& p, int n) {
      p = reinterpret_cast<std::remove_reference_t<decltype(p)>>(base + used);
      used += (n * static_cast<int>(sizeof(*p)) + 15) / 16 * 16;
    };
    constexpr int R = S::kRows, C = S::kColumns, W = S::kWarps, D = S::kHeadSize, N = S::kStrands;
    take(s->red, W * C * S::kPitch), take(s->part, W * C), take(s->warps, W), take(s->walk, W);
    take(s->meta, W * 32), take(s->tiles, N > 1 ? W * 4 : 0);
    const int first = used;
    base += moved;
    take(s->query, R * D / 8), take(s->v_shift, D), take(s->raw, R * D);
    take(s->row, R), take(s->first_extra, R), take(s->first_score, R), take(s->current_max, R), take(s->current_sum, R);
    take(s->item, 2), take(s->misc, 8), take(s->ab, 0);
    return {first, used};
  }

  template <class S>
  static Layout layout(const WkvCudaParams& p, int teams) {
    Shared unused;
    const int2 fixed = carve<S>(&unused, nullptr, 0);
    const int steps = p.tabled ? steps_of(p) : 0, slots = slots_of(p);
    Layout x;
    x.team_bytes = fixed.y - fixed.x + S::kRows * (slots + 4) * sizeof(float2);
    x.basis = fixed.x + teams * x.team_bytes;
    x.chebyshev = x.basis + steps * (4 * 2 * 32) * sizeof(uint4);
    x.turns = x.chebyshev + (p.tabled ? p.slow_steps * 32 * sizeof(uint4) : 0);
    x.angle = x.turns + (p.tabled ? slots * sizeof(int64_t) : 0);
    x.bytes = x.angle + S::kWarps * S::kStrands * slots * sizeof(float2);
    return x;
  }

  template <class S>
  __device__ void carve(char* base, int team, const Layout& x) {
    carve<S>(this, base, team ? x.team_bytes : 0);
    basis = reinterpret_cast<uint4*>(base + x.basis), chebyshev = reinterpret_cast<uint4*>(base + x.chebyshev);
    turns = reinterpret_cast<int64_t*>(base + x.turns), angle = reinterpret_cast<float2*>(base + x.angle);
  }
};

template <int D, int NT, int Strands>
int64_t shared_bytes(const WkvCudaParams& p, int teams) {
  return Shared::layout<Shape<D, NT, Strands>>(p, teams).bytes;
}

// The shape for so many query tokens a sequence, in the mean.
template <int D, class F>
auto with_shape(int queries, int group, const F& f) {
  const int rows = queries * group;
  if (rows <= 4) return f(Shape<D, 1, 2>());
  if constexpr (D <= 128)
    if (rows > 8) return f(Shape<D, 2, 1>());
  return f(Shape<D, 1, 1>());
}

// The same where the head size is not known to the compiler.
template <class F>
auto with_shape(int head_size, int queries, int group, const F& f) {
  return with_head_size(head_size, [&](auto d) { return with_shape<d>(queries, group, f); });
}

// Teams of a CTA that a multiprocessor with `bytes` of shared memory has room for; 0 where it has none for any.
inline int most_teams(const WkvCudaParams& p, int queries, int group, int64_t bytes) {
  return with_shape(p.head_size, queries, group, [&](auto shape) {
    using S = decltype(shape);
    const auto needed = [&](int teams) { return shared_bytes<S::kHeadSize, S::kTiles, S::kStrands>(p, teams); };
    int teams = kTeams;
    while (teams > 1 && needed(teams) > bytes / S::kCtasPerSm - 1024) teams /= 2;
    return needed(teams) <= bytes ? teams : 0;
  });
}

inline Tiling tiling_of(const WkvCudaPlan& a) {
  return with_shape(a.head_size, a.queries, a.num_heads / a.num_kv_heads, [&](auto shape) {
    using S = decltype(shape);
    return Tiling{S::kRowBits, S::kWarps, a.teams, std::min(a.num_sms * S::kCtasPerSm, kMaxCtas)};
  });
}

// Of a CTA with one team; -1 where there is no such shape.
template <int D>
int64_t shared_bytes_of(const WkvCudaParams& p, int tiles, int strands) {
  if (tiles == 1 && strands == 1) return shared_bytes<D, 1, 1>(p, 1);
  if (tiles == 1 && strands == 2) return shared_bytes<D, 1, 2>(p, 1);
  if constexpr (D <= 128)
    if (tiles == 2 && strands == 1) return shared_bytes<D, 2, 1>(p, 1);
  return -1;
}

// Rows of a tensor: how many bytes tokens and heads are apart.
struct Rows {
  uint32_t token, head;

  Rows(const int64_t (&stride)[2], int element) : token(stride[0] * element), head(stride[1] * element) {}

  __device__ __forceinline__ uint64_t at(uint32_t of_token, uint32_t of_head) const {
    return wide_product(of_token, token) + wide_product(of_head, head);
  }
};

// What is the same for all CTAs and the host finds out once.
struct Launch {
  FastDivide tiles_per_block, group;
  Shared::Layout layout;
  int steps, slots;
  int table_words;                                        // of 16 bytes, of the tables of the shift
  uint32_t page_bytes, block_stride, block_table_stride;  // of a (block, head), of a block; elements of a sequence
  uint32_t four;                                          // bytes of four elements
  Rows query, key, value, out;

  Launch(const WkvCudaAttention& a, const WkvCudaParams& p, const Shared::Layout& of_shared)
      : tiles_per_block(a.block_size / kTile),
        group(a.num_heads / p.num_kv_heads),
        layout(of_shared),
        steps(steps_of(p)),
        slots(slots_of(p)),
        table_words(steps * (4 * 2 * 32) + p.slow_steps * 32 + slots / 2),
        page_bytes(a.block_size * token_bytes(p.head_size)),
        block_stride(a.block_stride),
        block_table_stride(a.block_table_stride),
        four(a.dtype == kFloat32 ? 16 : 8),
        query(a.query_stride, four / 4),
        key(a.key_stride, four / 4),
        value(a.value_stride, four / 4),
        out(a.out_stride, four / 4) {}
};

// Partial results in the workspace: counters [kMaxCtas], then two slots a CTA of [rows][D] numerators, [rows] maxima
// and [rows] sums. Slot 1 is of an item whose first units are this CTA's, slot 0 of one that began before.
constexpr int partial_floats(int rows, int d) { return rows * (d + 2); }

template <int D, int NT, int Strands>
struct Kernel {
  using S = Shape<D, NT, Strands>;
  static_assert(kTeams * 2 * partial_floats(S::kRows, D) * sizeof(float) <= kCtaBytes);
  static_assert(partial_floats(S::kRows, D) * sizeof(float) <= kWordsBytes);
  static constexpr int kWarps = S::kWarps, kRows = S::kRows;

  const WkvCudaAttention& a;
  const WkvCudaParams& p;
  Shared s;
  const int warp, lane, g, t;
  const Launch& launch;
  const int group, steps, slots;
  char* const memory;

  // Of the row tile.
  Item item;
  int rows;
  // Softmax state of this warp: columns are rows 2t, 2t + 1 of each n-tile.
  float acc[S::kMTiles][NT][4];
  float top[NT][2], sum[NT][2], min_sum[NT][2];

  // Walks this warp's units over all of the CTA's items: one after the other, or the first of both strands, then the
  // second of both, and so on. The page is that of this lane's tile of K; the lane's tile of V may be another one.
  struct Cursor {
    int segment;  // items so far, INT_MAX: at the end
    int head;
    int unit, end;     // of the item, this warp's, counted from position 0; of two strands the first's
    int last, length;  // two strands: the end of the first, its units
    int page[Strands], tile[Strands];

    // The second strand has a unit, too.
    __device__ __forceinline__ bool both() const { return unit + length < end; }
  };

  // What is in registers or on its way there.
  struct Ahead {
    uint32_t k[Strands][S::kKWords][4], v[Strands][4][S::kVWords];
    int segment;            // INT_MAX: nothing
    int unit;               // of two strands the first's
    const uint8_t* next_v;  // one strand: where V of the unit is
    int half;               // one strand: where its scales are, of two places: 0 or 8
    int length;             // two strands: units of the first
    bool both;              // the second has a unit, too

    __device__ __forceinline__ void note(const Cursor& c) {
      segment = c.segment, unit = c.unit;
      if constexpr (Strands == 2) length = c.length, both = c.both();
    }
  };

  __device__ Kernel(const WkvCudaAttention& args, const WkvCudaParams& params, const Launch& of_launch, char* of_memory)
      : a(args),
        p(params),
        warp(threadIdx.x / 32),
        lane(threadIdx.x % 32),
        g(lane / 4),
        t(lane % 4),
        launch(of_launch),
        group(of_launch.group.divisor),
        steps(of_launch.steps),
        slots(of_launch.slots),
        memory(of_memory) {
    s.carve<S>(memory, 0, launch.layout);
  }

  // Query token of a row.
  __device__ __forceinline__ int token_of(int row) const { return launch.group(row); }

  // Of the shift, for a chunk. As many steps as a head size has (D / 16) fit: 32 * NT * D bytes.
  __device__ __forceinline__ uint4* coefficients() const {
    return reinterpret_cast<uint4*>(s.red + warp * (S::kColumns * S::kPitch));
  }

  __device__ __forceinline__ const Planned& planned() const { return *static_cast<const Planned*>(a.plan); }

  // Not kept in registers: warps of the team, the team in the CTA, this warp in the team.
  __device__ int size() const { return s.warps[warp]; }
  __device__ int team() const { return warp >= size(); }
  __device__ int member() const { return warp - team() * size(); }
  __device__ void team_barrier() const { barrier(1 + team(), 32 * size()); }

  // Starts to copy the tables of the shift.
  __device__ void start_tables() {
#pragma unroll 1
    for (int i = threadIdx.x; i < launch.table_words; i += S::kThreads)
      copy_async(s.basis + i, reinterpret_cast<const uint4*>(p.basis) + i);
    end_group();
  }

  // The plan's word on what this warp's team does.
  __device__ __forceinline__ Work work_of_team() const {
    union {
      int4 words[4];
      Work work;
    } x;
    const int4* from = reinterpret_cast<const int4*>(planned().work + kTeams * blockIdx.x + (warp >= kWarps / kTeams));
#pragma unroll
    for (int i = 0; i < 4; ++i) x.words[i] = __ldg(from + i);
    return x.work;
  }

  // The item of unit `u`, of sequence `seq` or one after it.
  __device__ __forceinline__ Item decode_at(int seq, int u, int end) const {
    return decode(planned(), a.sliding_window, group, S::kRowBits, seq, u, end);
  }

  // attention_load.cuh
  __device__ __forceinline__ int4 enter(Cursor& c, const Item& x, int end_unit, int size, int member) const;
  __device__ __forceinline__ void settle(Cursor& c, int4 walk) const;
  __device__ __forceinline__ void advance(Cursor& c) const;
  __device__ __forceinline__ const uint8_t* tile_of(const Cursor& c, int i) const;
  __device__ __forceinline__ void load_k(const uint8_t* tile, uint32_t (&k)[S::kKWords][4]) const;
  __device__ __forceinline__ int meta_of_lane() const;
  __device__ __forceinline__ void copy_meta(int tile_of_page, const uint8_t* tile, int of_lane, uint4* place) const;
  __device__ __forceinline__ const uint8_t* v_of(const uint8_t* tile) const;
  __device__ __forceinline__ void load_v(const uint8_t* base, uint32_t (&v)[4][S::kVWords]) const;
  __device__ __forceinline__ void load_keys(const Cursor& c, Ahead& ahead) const;
  __device__ __forceinline__ void load_values(Ahead& ahead) const;

  // attention_rows.cuh
  template <class F, class G>
  __device__ __forceinline__ void prepare_rows(bool with_current, bool find_parts, int size, int member,
                                               const F& when_asked, const G& when_loaded);
  __device__ void start_rows();

  // attention_past.cuh
  // Row of a column of products.
  static __device__ __forceinline__ int row_of(int column) { return Strands == 1 ? column : column % kRows; }
  template <bool Tabled>
  __device__ __forceinline__ void make_coefficients(int first, int stride, uint4* coef);
  __device__ __forceinline__ void scores(const uint32_t (&k)[Strands][S::kKWords][4],
                                         float (&c)[Strands][2][NT][4]) const;
  template <int Steps>
  __device__ __forceinline__ void shift_scores(int unit, const uint4* coef, float (&c)[2][NT][4]) const;
  __device__ __forceinline__ void shift_scores_of_steps(int unit, const uint4* coef, float (&c)[2][NT][4]) const;
  __device__ __forceinline__ void softmax(int first, bool present, const uint4* meta, float (&c)[2][NT][4],
                                          const float (&shift)[2][NT][4], uint32_t (&weights)[2][NT][2]);
  __device__ __forceinline__ void output(const uint32_t (&v)[4][S::kVWords], const uint32_t (&weights)[2][NT][2]);
  __device__ __forceinline__ void walk_units(int segment, Cursor& cursor, Ahead& ahead);
  __device__ __forceinline__ void walk_strands(int segment, Cursor& cursor, Ahead& ahead);

  // attention_finish.cuh
  __device__ void write_row4(int r, int d, float4 x, float sum_of_row) const;
  __device__ void write_lse(int r, float top_of_row, float sum_of_row) const;
  __device__ float* partial(int cta, int slot) const;
  __device__ bool finish(bool with_current);
  __device__ float* words_of(int number) const;
  __device__ __forceinline__ void leave(float* words, int r, int d, const float4& x, float high, float total) const;
  __device__ __forceinline__ void gather(float* words, int count, int r, int d, float4& x, float& high,
                                         float& total) const;
  __device__ void combine(const Item& x);

  __device__ void run() {
    const Work work = work_of_team();
    if (p.tabled) start_tables();
    if (work.warps >> 8 != S::kRowBits) __trap();  // a captured call is replayed over the plan of another shape
    item = work.item;
    const int begin = item.u + item.begin, end = work.end;
    int size = work.warps & 255, member = warp - (warp < size ? 0 : size);  // not kept in registers during the loop
    if (lane == 0) s.warps[warp] = size;
    if (begin >= end) {
      wait_for_previous(), wait_for_groups();
      __syncthreads();
      return;
    }
    s.carve<S>(memory, member < warp, launch.layout);
    if (member + 1 == size && lane == 0) *reinterpret_cast<int2*>(s.misc + 2) = {work.first, work.parts};
    Cursor cursor;  // of what is to be asked for next
    Ahead ahead;
    int segment = 0;
    bool before = false;  // others have parts of the item before
    for (int u = begin; u < end || before; ++segment) {
      if (u < end) {
        if (segment) item = decode_at(item.seq, u, end);
        const bool with_current = item.end == item.units;
        const auto find_pages = [&] {
          if (segment) return;
          cursor.segment = -1;
          settle(cursor, enter(cursor, item, end, size, member));
          ahead.note(cursor);
          ahead.half = 0;
        };
        // The first pages, after the rows' own loads, which wait for what is ahead of them.
        const auto start_pages = [&] {
          if (segment == 0) wait_for_previous();  // the cache write, where it may still run: pages alone are of it
          if (segment || ahead.segment == INT_MAX) return;
          if constexpr (Strands == 1) {
            const uint8_t* tile = tile_of(cursor, 0);
            load_k(tile, ahead.k[0]);
            copy_meta(cursor.tile[0], tile, meta_of_lane(), s.meta + threadIdx.x);
            load_v(ahead.next_v = v_of(tile), ahead.v[0]);
          } else {
            load_keys(cursor, ahead);
          }
        };
        prepare_rows(with_current, segment > 0, size, member, find_pages, start_pages);
        if (segment == 0 && ahead.segment != INT_MAX) advance(cursor);
        const int last_row = item.tile * kRows + rows - 1;
        if (member + 1 == size && lane == 0) {
          // the last row of the tile hides the most of a window
          const int latest = a.sliding_window ? item.past + token_of(last_row) - a.sliding_window : INT_MIN / 2;
          *reinterpret_cast<int4*>(s.misc + 4) = {item.past, latest, last_row, rows};
          s.item[segment % 2] = item;
        }
      }
      wait_for_groups();  // the tables, and what rows need at the end of the item
      if (segment)
        team_barrier();
      else
        __syncthreads();
      if (before && s.misc[1]) combine(s.item[(segment - 1) % 2]);
      if (u >= end) return;
      rows = s.misc[7];
      start_rows();
      if constexpr (Strands == 1)
        walk_units(segment, cursor, ahead);
      else
        walk_strands(segment, cursor, ahead);
      // anew, so that the loop keeps no register for addresses that it does not need
      if constexpr (D <= 128 && NT == 1 && Strands == 1) s.carve<S>(memory, hidden(team()), launch.layout);
      item = s.item[segment % 2];  // not kept in registers during the loop
      rows = s.misc[7];
      before = finish(item.end == item.units);
      u = item.u + item.end;
      size = this->size(), member = this->member();
    }
  }
};

}  // namespace wkvquant
