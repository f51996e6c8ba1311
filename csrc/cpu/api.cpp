// Exported functions: choice of the ISA, scratch memory, and the layout for the test that compares it with Python's.
#include "api.h"

#include <cstdlib>
#include <cstring>

#include "layout.h"

namespace wkvquant {

Prepared* prepare(const WkvParams& p);
void release(Prepared* p);

namespace {

struct Isa {
  const char* name;
  bool (*supported)();
  const Kernels& (*kernels)();
};

// Best first.
const Isa kIsas[] = {
#if defined(__x86_64__)
    {"avx512",
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
              __builtin_cpu_supports("avx512vnni");
     },
     avx512_kernels},
    {"avx2",
     [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"); },
     avx2_kernels},
#endif
    {"scalar", [] { return true; }, scalar_kernels},
};

const Kernels* active_kernels = nullptr;

struct Arena {
  void* data = nullptr;
  size_t size = 0;
  ~Arena() { free(data); }
};

}  // namespace

void* scratch(int slot, size_t bytes) {
  static thread_local Arena arenas[2];
  Arena& arena = arenas[slot];
  if (arena.size < bytes) {
    free(arena.data);
    const size_t size = (bytes + bytes / 2 + 4095) / 4096 * 4096;
    arena.data = aligned_alloc(4096, size);
    arena.size = arena.data ? size : 0;
  }
  return arena.data;
}

}  // namespace wkvquant

using namespace wkvquant;

#define EXPORT extern "C" __attribute__((visibility("default")))

// Name of the i-th ISA of this build, best first, or null past the end; `*supported`: whether this CPU has it.
EXPORT const char* wkvquant_isa(int32_t i, int32_t* supported) {
  if (i < 0 || i >= static_cast<int>(sizeof kIsas / sizeof *kIsas)) return nullptr;
  *supported = kIsas[i].supported();
  return kIsas[i].name;
}

// Use the i-th ISA from now on. Not to be called while a kernel runs.
EXPORT void wkvquant_use_isa(int32_t i) { active_kernels = &kIsas[i].kernels(); }

EXPORT Prepared* wkvquant_prepare(const WkvParams* params) { return prepare(*params); }

EXPORT void wkvquant_release(Prepared* params) { release(params); }

EXPORT int32_t wkvquant_cache_write(const WkvCacheWrite* args, const Prepared* params) {
  return active_kernels->cache_write(CacheWriteArgs{*args, params});
}

EXPORT int32_t wkvquant_paged_attention(const WkvAttention* args, const Prepared* params) {
  return active_kernels->paged_attention(AttentionArgs{*args, params});
}

EXPORT int64_t wkvquant_sizeof(int32_t which) {
  const size_t sizes[] = {sizeof(WkvParams), sizeof(WkvCacheWrite), sizeof(WkvAttention)};
  return static_cast<int64_t>(sizes[which]);
}

// out[0..4]: layout version, v_codes, k_meta, v_meta, nbytes.
EXPORT void wkvquant_layout(int64_t head_size, int64_t block_size, int64_t* out) {
  const PageLayout page{head_size, block_size};
  const int64_t fields[] = {kLayoutVersion, page.v_codes(), page.k_meta(), page.v_meta(), page.nbytes()};
  memcpy(out, fields, sizeof fields);
}

EXPORT int64_t wkvquant_layout_k_word(int64_t head_size, int64_t block_size, int64_t slot, int64_t group) {
  return PageLayout{head_size, block_size}.k_word(slot, group);
}

EXPORT int64_t wkvquant_layout_v_half(int64_t head_size, int64_t block_size, int64_t slot, int64_t word) {
  return PageLayout{head_size, block_size}.v_half(slot, word);
}
