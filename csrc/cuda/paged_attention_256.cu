#include "paged_attention.cuh"

namespace wkvquant {

cudaError_t launch_256(const WkvCudaAttention& a, const WkvCudaParams& p, cudaStream_t stream) {
  return launch_any<256>(a, p, stream);
}

}  // namespace wkvquant
