// Past tokens from the page -> output and log-sum-exp, for long queries: the step's own tokens are not attended.
//
//     item      (KV head, sequence, tile of 128 rows); row = query token x query head of the group
//     stage     64 past tokens of an item, copied as the page holds them into shared memory, one stage ahead
//     unit      32 of them; eight in a row, a chunk, share the coefficients of the shift
//     CTA       items, with a stride of the grid; two CTAs share an SM
//     warp      32 rows of the tile, against every unit: there is nothing to combine
//
// Products are mma.sync m16n8k16 with rows as M and tokens (scores) or dimensions (output) as N; codes enter as fp16
// subnormals and the page's words match the operands, as in paged_attention.cuh, whose tables this kernel shares:
//
//     K   thread (g, t) = (lane / 4, lane % 4) has tokens 4g .. 4g + 3, words t, t + 4, ..; token 4g + x is column g of
//         n-tile x, so that columns 2t and 2t + 1 of the four n-tiles are tokens 8t .. 8t + 7
//     V   thread (g, t) has token pairs 4t .. 4t + 3, the weights of which it has already, D / 32 words by g
//
// A row's scores are in units of a power of two, so that codes and shift add up in one accumulator.
//
// The shift's part of a score is a third product, basis of the position times coefficients of the query, with low parts
// where they matter. The coefficients of a chunk are a product, too: of the query's rotary pairs, exact in fp16, and a
// matrix that the CTA makes of k_shift turned to the chunk's centre.
#pragma once

#include <driver_types.h>

#include "api.h"

namespace wkvquant {

// Whether the kernel is wanted and there for these arguments, and fits the device.
bool prefill_takes(const WkvCudaAttention&, const WkvCudaParams&);
cudaError_t launch_prefill(const WkvCudaAttention&, const WkvCudaParams&, cudaStream_t);
int64_t prefill_shared_bytes(const WkvCudaParams&);  // of a CTA; -1 for a head size that there is no kernel of

}  // namespace wkvquant
