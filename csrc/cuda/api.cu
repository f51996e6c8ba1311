// The C interface but for the cache write.
#include "paged_attention.cuh"

#define WKV_NAME_OF(x) #x
#define WKV_NAME(x) WKV_NAME_OF(x)  // of a macro, its value

extern "C" {

int wkvquant_cuda_paged_attention(const WkvCudaAttention* a, const WkvCudaParams* p, void* stream) {
  using namespace wkvquant;
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
  return kWorkspaceBytes;
}

int64_t wkvquant_cuda_plan_bytes() { return sizeof(wkvquant::Planned); }

int wkvquant_cuda_teams(const WkvCudaParams* p, int num_heads, int queries, int64_t shared_bytes) {
  return wkvquant::most_teams(*p, queries, num_heads / p->num_kv_heads, shared_bytes);
}

int64_t wkvquant_cuda_shared_bytes(const WkvCudaParams* p, int tiles, int strands) {
  using namespace wkvquant;
  switch (p->head_size) {
    case 64: return shared_bytes_of<64>(*p, tiles, strands);
    case 96: return shared_bytes_of<96>(*p, tiles, strands);
    case 128: return shared_bytes_of<128>(*p, tiles, strands);
    case 256: return shared_bytes_of<256>(*p, tiles, strands);
  }
  return -1;
}

int64_t wkvquant_cuda_sizeof(int which) {
  constexpr int64_t kSizes[] = {sizeof(WkvCudaParams), sizeof(WkvCudaCacheWrite), sizeof(WkvCudaPlan),
                                sizeof(WkvCudaAttention), sizeof(WkvCudaGather)};
  return kSizes[which];
}

int32_t wkvquant_cuda_max_seqs() { return wkvquant::kMaxSeqs; }

const char* wkvquant_cuda_error(int status) { return cudaGetErrorString(static_cast<cudaError_t>(status)); }

const char* wkvquant_cuda_archs() { return WKV_NAME(WKV_CUDA_ARCHS); }  // setup.py defines it

}  // extern "C"
