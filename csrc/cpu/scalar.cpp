// Plain C++: what a host without AVX2 runs.
#include "attention.h"
#include "cache_write.h"

const wkvquant::Kernels& wkvquant::scalar_kernels() {
  static const Kernels kernels{cache_write<Generic>, paged_attention<Generic>};
  return kernels;
}
