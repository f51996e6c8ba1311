// Runs CUDA kernels on a CPU, one fiber a thread, so that their arithmetic can be tested where there is no GPU: lanes
// of a warp meet at every shuffle and product, threads of a block at every barrier, blocks run one after the other.
// Warps run as far ahead of the others as barriers let them, in random order. It finds wrong results, reads of
// unwritten shared memory (filled with NaN), deadlocks and barriers that are missing between warps, but no race inside
// a warp and no cost.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <climits>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <vector>
using std::max;
using std::min;
struct Warp {
  int count = 0;
  unsigned gen = 0;
  uint32_t buf[2][32][6];
};
struct Fiber {
  ucontext_t ctx;
  jmp_buf jb;
  bool started = false, done = false;
  int tid;
  std::vector<char> stack;
};
extern Fiber* cur;
extern int n_threads;
extern std::vector<Warp> warps;
extern int cta_count[16];
extern unsigned cta_gen[16];
extern int alive;
extern jmp_buf sched;
extern dim3 e_block, e_grid;
#define threadIdx (dim3(cur->tid, 0, 0))
#define blockIdx e_block
#define gridDim e_grid
inline void yield_() {
  if (!_setjmp(cur->jb)) _longjmp(sched, 1);
}
inline unsigned arrive() {
  Warp& w = warps[cur->tid / 32];
  unsigned g = w.gen;
  if (++w.count == 32) {
    w.count = 0;
    ++w.gen;
  } else
    while (w.gen == g) yield_();
  return g & 1;
}
inline uint32_t (*put(std::initializer_list<uint32_t> v))[6] {
  Warp& w = warps[cur->tid / 32];
  int i = 0;
  for (auto x : v) w.buf[w.gen & 1][cur->tid % 32][i++] = x;
  unsigned b = arrive();
  return w.buf[b];
}
#define __syncthreads e_syncthreads
inline void e_barrier(int id, int threads) {
  unsigned g = cta_gen[id];
  if (++cta_count[id] == threads) {
    cta_count[id] = 0;
    ++cta_gen[id];
  } else
    while (cta_gen[id] == g) yield_();
}
inline void e_syncthreads() { e_barrier(0, n_threads); }
inline void e_syncwarp() { arrive(); }
#define __syncwarp e_syncwarp
template <class T>
inline uint32_t bits(T x) {
  uint32_t r;
  memcpy(&r, &x, 4);
  return r;
}
template <class T>
inline T from(uint32_t x) {
  T r;
  memcpy(&r, &x, 4);
  return r;
}
#define SH(name, expr)                             \
  template <class T>                               \
  inline T name(unsigned, T v, int k) {            \
    auto b = put({bits(v)});                       \
    int l = cur->tid % 32;                         \
    int s = expr;                                  \
    return from<T>(b[s < 0 || s > 31 ? l : s][0]); \
  }
SH(__shfl_xor_sync, l ^ k)
SH(__shfl_sync, k) SH(__shfl_up_sync, l - k) SH(__shfl_down_sync, l + k)
inline unsigned long long __shfl_sync(unsigned mask, unsigned long long v, int k) {
  const uint32_t low = __shfl_sync(mask, (uint32_t)v, k);
  return (unsigned long long)__shfl_sync(mask, (uint32_t)(v >> 32), k) << 32 | low;
}
inline int __reduce_add_sync(unsigned, int v) {
  auto b = put({bits(v)});
  int r = 0;
  for (int i = 0; i < 32; ++i) r += (int)b[i][0];
  return r;
}
inline int __reduce_min_sync(unsigned, int v) {
  auto b = put({bits(v)});
  int r = INT_MAX;
  for (int i = 0; i < 32; ++i) r = min(r, (int)b[i][0]);
  return r;
}
inline int __reduce_max_sync(unsigned, int v) {
  auto b = put({bits(v)});
  int r = INT_MIN;
  for (int i = 0; i < 32; ++i) r = max(r, (int)b[i][0]);
  return r;
}
inline int __any_sync(unsigned, bool v) {
  auto b = put({v});
  int r = 0;
  for (int i = 0; i < 32; ++i) r |= b[i][0];
  return r;
}
template <class T>
inline T __ldg(const T* p) {
  return *p;
}
template <class T>
inline T __ldcg(const T* p) {
  return *p;
}
template <class T>
inline void __stcg(T* p, T x) {
  *p = x;
}
inline unsigned __umulhi(unsigned a, unsigned b) { return (uint64_t)a * b >> 32; }
inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t s) {
  uint64_t v = a | (uint64_t)b << 32;
  uint32_t r = 0;
  for (int i = 0; i < 4; ++i) r |= (uint32_t)((v >> (8 * ((s >> (4 * i)) & 7))) & 255) << (8 * i);
  return r;
}
inline int __float_as_int(float x) { return (int)bits(x); }
inline float __int_as_float(int x) { return from<float>((uint32_t)x); }
inline unsigned __float_as_uint(float x) { return bits(x); }
inline float __uint_as_float(uint32_t x) { return from<float>(x); }
inline void sincospif(float x, float* s, float* c) {
  *s = sin(M_PI * (double)x);
  *c = cos(M_PI * (double)x);
}
inline float e_cos(float x) { return cosf(x); }
#define __cosf e_cos
inline float e_sin(float x) { return sinf(x); }
#define __sinf e_sin
inline float e_log2(float x) { return log2f(x); }
#define __log2f e_log2
inline float e_fdiv(float a, float b) { return a / b; }
#define __fdividef e_fdiv
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1 / a; }
inline __half2 __hfma2(__half2 a, __half2 b, __half2 c) {
  const float2 x = __half22float2(a), y = __half22float2(b), z = __half22float2(c);
  return __floats2half2_rn(fmaf(x.x, y.x, z.x), fmaf(x.y, y.y, z.y));
}
namespace wkvquant {
inline void mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  auto m = put({a0, a1, a2, a3, b0, b1});
  int lane = cur->tid % 32, g = lane / 4, t = lane % 4;
  auto h = [&](uint32_t w, int i) -> float {
    _Float16 r;
    uint16_t x = w >> (16 * i);
    memcpy(&r, &x, 2);
    return (float)r;
  };
  for (int row = 0; row < 2; ++row)
    for (int col = 0; col < 2; ++col) {
      float s = 0;
      for (int k = 0; k < 16; ++k) {
        int q = (k % 8) / 2;
        float A = h(m[g * 4 + q][row + (k >= 8 ? 2 : 0)], k % 2), B = h(m[(2 * t + col) * 4 + q][4 + (k >= 8)], k % 2);
        s += A * B;
      }
      c[2 * row + col] += s;
    }
}
inline uint32_t transpose(uint32_t x) {
  auto m = put({x});
  int lane = cur->tid % 32, g = lane / 4, t = lane % 4;
  auto e = [&](int r, int c) -> uint32_t { return (m[r * 4 + c / 2][0] >> (16 * (c % 2))) & 0xffff; };
  return e(2 * t, g) | e(2 * t + 1, g) << 16;
}
inline float exp2_fast(float x) { return exp2f(x); }
inline uint32_t pack_finite(float low, float high) {
  auto finite = [](float x) { return std::isnan(x) ? x : fminf(fmaxf(x, -65504.0f), 65504.0f); };
  __half2 h = __floats2half2_rn(finite(low), finite(high));
  uint32_t y;
  memcpy(&y, &h, 4);
  return y;
}
template <int N>
inline void load_words(const uint8_t* p, uint32_t* w) {
  if ((uintptr_t)p % (4 * N)) {
    fprintf(stderr, "misaligned\n");
    abort();
  }
  memcpy(w, p, 4 * N);
}
inline int count_arrival(int* counter) { return (*counter)++; }
inline void __trap() { abort(); }
inline float4 read_words(const float4* p) { return *p; }
inline float2 read_words(const float2* p) { return *p; }
inline void write_words(float4* p, float4 x) { *p = x; }
inline void write_words(float2* p, float2 x) { *p = x; }
inline void acquire() {}
inline int hidden(int x) { return x; }
inline uint64_t wide_product(uint32_t a, uint32_t b) { return static_cast<uint64_t>(a) * b; }
inline void copy_async(void* to, const void* from) { memcpy(to, from, 16); }
inline void wait_for_copies() {}
inline void end_group() {}
inline void wait_for_groups() {}
inline void barrier(int id, int threads) { e_barrier(id, threads); }
inline void allow_next() {}
inline void wait_for_previous() {}
}  // namespace wkvquant
template <class F>
void run_grid(dim3 grid, int threads, F body) {
  e_grid = grid;
  n_threads = threads;
  static std::vector<Fiber*> pool;
  while ((int)pool.size() < threads) {
    pool.push_back(new Fiber);
    pool.back()->stack.resize(1 << 17);
  }
  static F* fn;
  fn = &body;
  for (unsigned by = 0; by < grid.y; ++by)
    for (unsigned bx = 0; bx < grid.x; ++bx) {
      e_block = dim3(bx, by, 0);
      warps.assign(threads / 32, Warp());
      for (int i = 0; i < 16; ++i) cta_count[i] = cta_gen[i] = 0;
      alive = threads;
      for (int i = 0; i < threads; ++i) {
        Fiber& f = *pool[i];
        f.started = f.done = false;
        f.tid = i;
      }
      long idle = 0;
      unsigned random = 1;
      while (alive) {
        random = random * 1664525 + 1013904223;
        const int warp = (random >> 16) % (threads / 32), mask = random >> 31 ? 31 : 0;
        unsigned before = warps[warp].gen - 1;
        for (int x = 0, left = 32 * (1 + (random >> 8) % 64); left && (x % 32 || warps[warp].gen != before);
             ++x, --left) {
          if (x % 32 == 0) before = warps[warp].gen;
          Fiber& f = *pool[warp * 32 + (x % 32 ^ mask)];
          if (f.done) continue;
          cur = &f;
          if (!_setjmp(sched)) {
            if (f.started) _longjmp(f.jb, 1);
            f.started = true;
            getcontext(&f.ctx);
            f.ctx.uc_stack.ss_sp = f.stack.data();
            f.ctx.uc_stack.ss_size = f.stack.size();
            f.ctx.uc_link = nullptr;
            makecontext(&f.ctx, (void (*)())(+[] {
              (*fn)();
              cur->done = true;
              --alive;
              _longjmp(sched, 1);
            }),
                        0);
            setcontext(&f.ctx);
          }
          if (++idle > 400000000L) {
            fprintf(stderr, "deadlock\n");
            abort();
          }
        }
      }
    }
}
#undef __device__
#undef __host__
#undef __global__
#undef __forceinline__
#undef __noinline__
#undef __launch_bounds__
#undef __grid_constant__
#undef __shared__
#define __device__
#define __shared__ static
#define __host__
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)
#define __grid_constant__
