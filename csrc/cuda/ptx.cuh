// Instructions that C++ has no name for. The emulation of the tests replaces this file.
#pragma once

#include <cstdint>

namespace wkvquant {

__device__ __forceinline__ void mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                    uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ __forceinline__ uint32_t transpose(uint32_t x) {
  uint32_t y;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Two fp16, the largest finite ones where that is too few.
__device__ __forceinline__ uint32_t pack_finite(float low, float high) {
  uint32_t y;
  asm("cvt.rn.satfinite.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}

// x, as if it could be another number.
__device__ __forceinline__ int hidden(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// a * b. The compiler forgets that a factor has 32 bits once it has widened it elsewhere.
__device__ __forceinline__ uint64_t wide_product(uint32_t a, uint32_t b) {
  uint64_t x;
  asm("mul.wide.u32 %0, %1, %2;" : "=l"(x) : "r"(a), "r"(b));
  return x;
}

// Page data is read once.
template <int N>
__device__ __forceinline__ void load_words(const uint8_t* p, uint32_t* w) {
  if constexpr (N == 4)
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3])
                 : "l"(p));
  else if constexpr (N == 2)
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v2.u32 {%0,%1}, [%2];" : "=r"(w[0]), "=r"(w[1]) : "l"(p));
  else
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.u32 %0, [%1];" : "=r"(w[0]) : "l"(p));
}

// 16 bytes from global to shared memory; wait_for_copies() waits for this thread's.
__device__ __forceinline__ void copy_async(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(to))),
               "l"(from)
               : "memory");
}

// Makes a group of this thread's copies so far. wait_for_groups() waits for all groups, and for no later copy.
__device__ __forceinline__ void end_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }

__device__ __forceinline__ void wait_for_groups() { asm volatile("cp.async.wait_group 0;" ::: "memory"); }

__device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Of `threads` threads of the CTA; 0 is the barrier of all.
__device__ __forceinline__ void barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Lets the stream's next kernel begin, if it was launched to do so.
__device__ __forceinline__ void allow_next() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Waits for the stream's kernels before this one, if it was launched to begin before their end.
__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Adds one. What the CTA wrote before a barrier before it is seen by a CTA that sees the sum and has called acquire().
__device__ __forceinline__ int count_arrival(int* counter) {
  int before;
  asm volatile("atom.add.release.gpu.global.s32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
  return before;
}

// Words of global memory that another CTA may write or read meanwhile: all of them at once, and not ordered to others.
__device__ __forceinline__ float4 read_words(const float4* p) {
  float4 x;
  asm volatile(
      "{\n.reg .b128 w;\n.reg .b64 l, h;\nld.relaxed.gpu.global.b128 w, [%4];\nmov.b128 {l, h}, w;\n"
      "mov.b64 {%0, %1}, l;\nmov.b64 {%2, %3}, h;\n}"
      : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
      : "l"(p)
      : "memory");
  return x;
}

__device__ __forceinline__ float2 read_words(const float2* p) {
  float2 x;
  asm volatile("{\n.reg .b64 w;\nld.relaxed.gpu.global.b64 w, [%2];\nmov.b64 {%0, %1}, w;\n}"
               : "=f"(x.x), "=f"(x.y)
               : "l"(p)
               : "memory");
  return x;
}

__device__ __forceinline__ void write_words(float4* p, float4 x) {
  asm volatile(
      "{\n.reg .b128 w;\n.reg .b64 l, h;\nmov.b64 l, {%0, %1};\nmov.b64 h, {%2, %3};\nmov.b128 w, {l, h};\n"
      "st.relaxed.gpu.global.b128 [%4], w;\n}" ::"f"(x.x),
      "f"(x.y), "f"(x.z), "f"(x.w), "l"(p)
      : "memory");
}

__device__ __forceinline__ void write_words(float2* p, float2 x) {
  asm volatile("{\n.reg .b64 w;\nmov.b64 w, {%0, %1};\nst.relaxed.gpu.global.b64 [%2], w;\n}" ::"f"(x.x), "f"(x.y),
               "l"(p)
               : "memory");
}

__device__ __forceinline__ void acquire() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }

}  // namespace wkvquant
