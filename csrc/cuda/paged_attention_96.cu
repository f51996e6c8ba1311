#include "paged_attention.cuh"

namespace wkvquant {

cudaError_t launch_96(const WkvCudaAttention& a, const WkvCudaParams& p, cudaStream_t stream) {
  return launch_any<96>(a, p, stream);
}

}  // namespace wkvquant
