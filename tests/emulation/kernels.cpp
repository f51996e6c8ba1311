// The C interface of csrc/cuda over emulated kernels. generated.h: the sources, less what a CPU cannot compile.
#include "shim.h"

Fiber* cur;
int n_threads;
std::vector<Warp> warps;
int cta_count[16];
unsigned cta_gen[16];
int alive;
jmp_buf sched;
dim3 e_block, e_grid;

#include "generated.h"

namespace wkvquant {

constexpr int64_t kSharedBytes = 227 << 10;

template <int D>
int launch_any(const WkvCudaAttention& a, const WkvCudaParams& p) {
  return with_shape<D>(a.queries, a.num_heads / p.num_kv_heads, [&](auto shape) {
    using S = decltype(shape);
    if (shared_bytes<D, S::kTiles, S::kStrands>(p, a.teams) > kSharedBytes) return 1;
    std::vector<uint4> memory(kSharedBytes / sizeof(uint4) + 1);
    memset(memory.data(), 0xff, memory.size() * sizeof(uint4));
    const Launch launch(a, p, Shared::layout<S>(p, a.teams));
    run_grid(dim3(std::min(a.num_sms * S::kCtasPerSm, kMaxCtas), 1, 1), S::kThreads, [&] {
      Kernel<D, S::kTiles, S::kStrands>(a, p, launch, reinterpret_cast<char*>(memory.data())).run();
    });
    return 0;
  });
}

}  // namespace wkvquant

extern "C" {

int wkvquant_cuda_paged_attention(const WkvCudaAttention* a, const WkvCudaParams* p, void*) {
  return wkvquant::with_head_size(p->head_size, [&](auto d) { return wkvquant::launch_any<d>(*a, *p); });
}

int64_t wkvquant_cuda_plan_bytes() { return sizeof(wkvquant::Planned); }

int wkvquant_cuda_teams(const WkvCudaParams* p, int num_heads, int queries, int64_t) {
  return wkvquant::most_teams(*p, queries, num_heads / p->num_kv_heads, wkvquant::kSharedBytes);
}

int64_t wkvquant_cuda_shared_bytes(const WkvCudaParams* p, int tiles, int strands) {
  return wkvquant::with_head_size(p->head_size,
                                  [&](auto d) { return wkvquant::shared_bytes_of<d>(*p, tiles, strands); });
}

int64_t wkvquant_cuda_workspace() { return wkvquant::kWorkspaceBytes; }

int64_t wkvquant_cuda_sizeof(int which) {
  constexpr int64_t kSizes[] = {sizeof(WkvCudaParams), sizeof(WkvCudaCacheWrite), sizeof(WkvCudaPlan),
                                sizeof(WkvCudaAttention), sizeof(WkvCudaGather)};
  return kSizes[which];
}

int32_t wkvquant_cuda_max_seqs() { return wkvquant::kMaxSeqs; }

const char* wkvquant_cuda_error(int) { return "more shared memory than a multiprocessor has"; }

const char* wkvquant_cuda_archs() { return "80_90a"; }

}  // extern "C"
