#include "paged_attention.cuh"

namespace wkvquant {

template cudaError_t launch_of_head_size<256>(const WkvCudaAttention&, const WkvCudaParams&, cudaStream_t);

}  // namespace wkvquant
