// The C interface but for the cache write.
#include "paged_attention.cuh"

extern "C" {

int wkvquant_cuda_paged_attention(const WkvCudaAttention* a, const WkvCudaParams* p, void* stream) {
  using namespace wkvquant;
  if (a->num_seqs == 0 || a->num_tokens == 0) return cudaSuccess;
  const cudaStream_t s = static_cast<cudaStream_t>(stream);
  switch (p->head_size) {
    case 64: return launch_64(*a, *p, s);
    case 96: return launch_96(*a, *p, s);
    case 128: return launch_128(*a, *p, s);
    case 256: return launch_256(*a, *p, s);
  }
  return cudaErrorInvalidValue;
}

int64_t wkvquant_cuda_workspace() {
  using namespace wkvquant;
  return kCounterBytes + kMaxCtas * kCtaBytes;
}

int64_t wkvquant_cuda_shared_bytes(const WkvCudaParams* p, int tiles, int num_seqs) {
  using namespace wkvquant;
  switch (p->head_size) {
    case 64: return tiles == 1 ? shared_bytes<64, 1>(*p, num_seqs, 1) : shared_bytes<64, 2>(*p, num_seqs, 1);
    case 96: return tiles == 1 ? shared_bytes<96, 1>(*p, num_seqs, 1) : shared_bytes<96, 2>(*p, num_seqs, 1);
    case 128: return tiles == 1 ? shared_bytes<128, 1>(*p, num_seqs, 1) : shared_bytes<128, 2>(*p, num_seqs, 1);
    case 256: return tiles == 1 ? shared_bytes<256, 1>(*p, num_seqs, 1) : -1;
  }
  return -1;
}

int64_t wkvquant_cuda_sizeof(int which) {
  constexpr int64_t kSizes[] = {sizeof(WkvCudaParams), sizeof(WkvCudaCacheWrite), sizeof(WkvCudaAttention),
                                sizeof(WkvCudaGather)};
  return kSizes[which];
}

int32_t wkvquant_cuda_max_seqs() { return wkvquant::kMaxSeqs; }

const char* wkvquant_cuda_error(int status) { return cudaGetErrorString(static_cast<cudaError_t>(status)); }

}  // extern "C"
