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

template <int D, int NT>
int launch(const WkvCudaAttention& a, const WkvCudaParams& p) {
  using S = Shape<D, NT>;
  const int teams = most_teams<D, NT>(p, a.num_seqs, kSharedBytes / S::kCtasPerSm - 1024);
  if (shared_bytes<D, NT>(p, a.num_seqs, teams) > kSharedBytes) return 1;
  std::vector<uint4> memory(kSharedBytes / sizeof(uint4) + 1);
  memset(memory.data(), 0xff, memory.size() * sizeof(uint4));
  run_grid(dim3(std::min(a.num_sms * S::kCtasPerSm, kMaxCtas), 1, 1), S::kThreads,
           [&] { Kernel<D, NT>(a, p, teams, reinterpret_cast<char*>(memory.data())).run(); });
  return 0;
}

template <int D>
int launch_any(const WkvCudaAttention& a, const WkvCudaParams& p) {
  const int64_t group = a.num_heads / p.num_kv_heads;
  if constexpr (D <= 128)
    if (group * ((a.num_tokens + a.num_seqs - 1) / a.num_seqs) > 8) return launch<D, 2>(a, p);
  return launch<D, 1>(a, p);
}

}  // namespace wkvquant

extern "C" {

int wkvquant_cuda_paged_attention(const WkvCudaAttention* a, const WkvCudaParams* p, void*) {
  using namespace wkvquant;
  switch (p->head_size) {
    case 64: return launch_any<64>(*a, *p);
    case 96: return launch_any<96>(*a, *p);
    case 128: return launch_any<128>(*a, *p);
    case 256: return launch_any<256>(*a, *p);
  }
  return 1;
}

int64_t wkvquant_cuda_shared_bytes(const WkvCudaParams* p, int, int num_seqs) {
  using namespace wkvquant;
  switch (p->head_size) {
    case 64: return shared_bytes<64, 1>(*p, num_seqs, 1);
    case 96: return shared_bytes<96, 1>(*p, num_seqs, 1);
    case 128: return shared_bytes<128, 1>(*p, num_seqs, 1);
    case 256: return shared_bytes<256, 1>(*p, num_seqs, 1);
  }
  return -1;
}

int64_t wkvquant_cuda_workspace() {
  using namespace wkvquant;
  return kCounterBytes + kMaxCtas * kCtaBytes;
}

int64_t wkvquant_cuda_sizeof(int which) {
  constexpr int64_t kSizes[] = {sizeof(WkvCudaParams), sizeof(WkvCudaCacheWrite), sizeof(WkvCudaAttention),
                                sizeof(WkvCudaGather)};
  return kSizes[which];
}

int32_t wkvquant_cuda_max_seqs() { return wkvquant::kMaxSeqs; }

const char* wkvquant_cuda_error(int) { return "more shared memory than a multiprocessor has"; }

}  // extern "C"
