#include "paged_attention.cuh"

namespace wkvquant {

cudaError_t launch_64(const WkvCudaAttention& a, const WkvCudaParams& p, cudaStream_t stream) {
  return launch_any<64>(a, p, stream);
}

}  // namespace wkvquant
