#include <algorithm>

#include "launch.cuh"
#include "prefill.cuh"
#include "prefill_kernel.cuh"
#include "prefill_past.cuh"
#include "prefill_rows.cuh"

namespace wkvquant {
namespace {

template <int D>
__global__ void __launch_bounds__(PrefillShape<D>::kThreads, PrefillShape<D>::kCtasPerSm)
    prefill(const __grid_constant__ WkvCudaAttention a, const __grid_constant__ WkvCudaParams p) {
  extern __shared__ __align__(16) char memory[];
  Prefill<D>(a, p, memory).run();
}

template <int D>
cudaError_t launch(const WkvCudaAttention& a, const WkvCudaParams& p, cudaStream_t stream) {
  using S = PrefillShape<D>;
  const int64_t bytes = prefill_shared_bytes<D>(p);
  if (cudaError_t e = allow_shared<prefill<D>, true>(bytes)) return e;
  prefill<D><<<std::min(a.num_sms * S::kCtasPerSm, kMaxCtas), S::kThreads, bytes, stream>>>(a, p);
  return cudaGetLastError();
}

}  // namespace

bool prefill_takes(const WkvCudaAttention& a, const WkvCudaParams& p) {
  const int64_t bytes = prefill_shared_bytes(p);
  if (!a.prefill || a.key || a.dtype == kFloat32 || bytes < 0) return false;
  int device = 0, most = 0;
  return cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) == cudaSuccess && bytes <= most;
}

cudaError_t launch_prefill(const WkvCudaAttention& a, const WkvCudaParams& p, cudaStream_t stream) {
  switch (p.head_size) {
    case 64: return launch<64>(a, p, stream);
    case 96: return launch<96>(a, p, stream);
    case 128: return launch<128>(a, p, stream);
  }
  return cudaErrorInvalidValue;
}

int64_t prefill_shared_bytes(const WkvCudaParams& p) {
  switch (p.head_size) {
    case 64: return prefill_shared_bytes<64>(p);
    case 96: return prefill_shared_bytes<96>(p);
    case 128: return prefill_shared_bytes<128>(p);
  }
  return -1;
}

}  // namespace wkvquant
