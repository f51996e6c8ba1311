// Past tokens from the page and the step's own tokens as they came -> output.
//
//     item      (sequence, KV head, row tile); row = query token x query head of the group, up to 8 * NT / Strands rows
//               a tile
//     unit      32 past tokens of an item; eight in a row, a chunk, share the coefficients of the shift
//     team      a CTA, or a half of one where there are more items than CTAs: an equal run of the list of all units of
//               all items; an item that straddles teams is combined by whichever of them finishes last, through the
//               workspace
//     warp      an equal run of the team's units of an item, with a softmax state of its own
//     strand    a half of that run, where a tile has at most 4 rows
//
// Several teams share an SM, so that the start and the end of one's items overlap with the others' products.
//
// The grid is fixed and the list is derived from seq_lens on the device, by plan.cu, once for all layers of a step: a
// captured graph may be replayed with other lengths. Nothing at or after the past's length, and nothing before a
// window, can reach the output.
//
// Products are mma.sync m16n8k16 with tokens (scores) or dimensions (output) as M and rows as N. Codes enter as fp16
// subnormals, the bits of a nibble as they stand (code * 2^-24) or four higher (code * 2^-20); the factor 16 between
// the two is folded into the query and the output. The loads of codes match the operands of the products, so they go to
// registers and never through shared memory. The assembler lets all of them signal one scoreboard, so that a wait for
// any waits for all: they are asked for together, with work for the meantime.
//
// A product has 8 columns, of which 4 rows or fewer fill half. So the other columns are another strand's: keys of one
// unit of both are awaited together, each in products of its own, and of their scores a lane keeps those of its
// columns' strand. What follows is once for both units: the shift's products, since both are as far in their chunks and
// so have the same basis, and the softmax, with a state for each column. Values are products of their own again, with
// weights of 0 in the other's columns, and the end of an item adds columns up as it adds up warps. With 5 rows and more
// a warp walks its units one by one: keys of the next and values of this one are on their way together.
//
//     K   thread (g, t) = (lane / 4, lane % 4) has tokens 4g .. 4g + 3, words t, t + 4, ..; the first product of a
//         unit has tokens 4g and 4g + 1 as its rows g and g + 8, the second one 4g + 2 and 4g + 3
//     V   thread (g, t) has token pairs 4t .. 4t + 3, D / 32 words by g; the first product takes pairs 4t and 4t + 2
//
// The shift's part of the score is a third product: basis of the position times coefficients of the query. Both are
// sums of two fp16 (three products), exact to about 2^-22 of the largest coefficient, where shifts are large; where
// not, the basis is rounded to fp16, and the tables of few steps are read from shared memory.
//
// Scores are in units of log 2. The subtracted maximum is lowered by kBoost, so that small weights stay above fp16's
// smallest; it cancels.
#pragma once

#include <algorithm>

#include "attention_finish.cuh"
#include "attention_load.cuh"
#include "attention_past.cuh"
#include "attention_rows.cuh"
#include "launch.cuh"

namespace wkvquant {

template <int D, int NT, int Strands>
__global__ void __launch_bounds__(Shape<D, NT, Strands>::kThreads, Shape<D, NT, Strands>::kCtasPerSm)
    paged_attention(const __grid_constant__ WkvCudaAttention a, const __grid_constant__ WkvCudaParams p,
                    const __grid_constant__ Launch of_launch) {
  extern __shared__ __align__(16) char memory[];
  Kernel<D, NT, Strands>(a, p, of_launch, memory).run();
}

template <int D, int NT, int Strands>
cudaError_t launch(const WkvCudaAttention& a, const WkvCudaParams& p, cudaStream_t stream) {
  int device = 0, major = 0;
  if (cudaError_t e = cudaGetDevice(&device)) return e;
  if (cudaError_t e = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device)) return e;
  const Shared::Layout layout = Shared::layout<Shape<D, NT, Strands>>(p, a.teams);
  if (cudaError_t e = allow_shared<paged_attention<D, NT, Strands>>(layout.bytes)) return e;
  cudaLaunchAttribute overlap = {};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = std::min(a.num_sms * Shape<D, NT, Strands>::kCtasPerSm, kMaxCtas);
  config.blockDim = Shape<D, NT, Strands>::kThreads;
  config.dynamicSmemBytes = layout.bytes;
  config.stream = stream;
  config.attrs = &overlap;
  config.numAttrs = a.after_write && major >= 9;
  return cudaLaunchKernelEx(&config, paged_attention<D, NT, Strands>, a, p, Launch(a, p, layout));
}

template <int D>
cudaError_t launch_of_head_size(const WkvCudaAttention& a, const WkvCudaParams& p, cudaStream_t stream) {
  return with_shape<D>(a.queries, a.num_heads / p.num_kv_heads, [&](auto shape) {
    return launch<D, decltype(shape)::kTiles, decltype(shape)::kStrands>(a, p, stream);
  });
}

// each in a file of its own, which takes a minute to compile
extern template cudaError_t launch_of_head_size<64>(const WkvCudaAttention&, const WkvCudaParams&, cudaStream_t);
extern template cudaError_t launch_of_head_size<96>(const WkvCudaAttention&, const WkvCudaParams&, cudaStream_t);
extern template cudaError_t launch_of_head_size<128>(const WkvCudaAttention&, const WkvCudaParams&, cudaStream_t);
extern template cudaError_t launch_of_head_size<256>(const WkvCudaAttention&, const WkvCudaParams&, cudaStream_t);

}  // namespace wkvquant
