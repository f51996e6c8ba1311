// The C interface but for what cache_write.cu, gather_kv.cu and plan.cu have of it.
#include "paged_attention.cuh"

#define WKV_NAME_OF(x) #x
#define WKV_NAME(x) WKV_NAME_OF(x)  // of a macro, its value

extern "C" {

int wkvquant_cuda_paged_attention(const WkvCudaAttention* a, const WkvCudaParams* p, void* stream) {
  return wkvquant::with_head_size(p->head_size, [&](auto d) {
    return wkvquant::launch_of_head_size<d>(*a, *p, static_cast<cudaStream_t>(stream));
  });
}

int64_t wkvquant_cuda_workspace() { return wkvquant::kWorkspaceBytes; }

int64_t wkvquant_cuda_plan_bytes() { return sizeof(wkvquant::Planned); }

int wkvquant_cuda_teams(const WkvCudaParams* p, int num_heads, int queries, int64_t shared_bytes) {
  return wkvquant::most_teams(*p, queries, num_heads / p->num_kv_heads, shared_bytes);
}

int64_t wkvquant_cuda_shared_bytes(const WkvCudaParams* p, int tiles, int strands) {
  return wkvquant::with_head_size(p->head_size,
                                  [&](auto d) { return wkvquant::shared_bytes_of<d>(*p, tiles, strands); });
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
