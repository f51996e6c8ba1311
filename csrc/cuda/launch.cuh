// What the launchers share.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace wkvquant {

// Lets a kernel have so many bytes of dynamic shared memory on the current device.
template <auto kKernel>
cudaError_t allow_shared(int64_t bytes) {
  static int64_t allowed[64] = {};
  int device = 0;
  if (cudaError_t e = cudaGetDevice(&device)) return e;
  if (bytes <= allowed[device % 64]) return cudaSuccess;
  const int most = static_cast<int>(bytes);
  if (cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most)) return cudaGetLastError();
  allowed[device % 64] = bytes;
  return cudaSuccess;
}

}  // namespace wkvquant
