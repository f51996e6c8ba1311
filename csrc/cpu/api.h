// The C interface of the CPU kernels (called through ctypes, vllm_wkvquant/native.py mirrors the structs) and what the
// kernels of one ISA offer to it. No Torch or Python header: one build serves every version of both.
#pragma once

#include <cstddef>
#include <cstdint>

extern "C" {

enum WkvDtype : int32_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };
enum WkvStatus : int32_t { kOk = 0, kBadSlot = 1, kBadSequence = 2, kBadBlock = 3, kNoMemory = 4, kBadGroup = 5 };

struct WkvParams {
  const float* k_smooth;      // [num_kv_heads, head_size]
  const float* k_shift;       // [num_kv_heads, head_size]
  const float* v_shift;       // [num_kv_heads, head_size]
  const float* k_first;       // [num_kv_heads, head_size], shift of the key at position 0; null: as elsewhere
  const float* v_first;       // [num_kv_heads, head_size]
  const int64_t* rope_turns;  // [rotary_pairs], 2^64 a turn; null: the shift of the keys does not rotate
  float rope_scaling;
  int32_t num_kv_heads;
  int32_t head_size;
  int32_t rotary_pairs;
  int32_t key_hadamard;
};

struct WkvCacheWrite {
  const void* key;              // dtype [num_tokens, num_kv_heads, head_size]
  const void* value;            // dtype [num_tokens, num_kv_heads, head_size]
  uint8_t* kv_cache;            // [num_blocks, num_kv_heads, layout bytes]
  const int64_t* slot_mapping;  // [num_tokens], negative: skip
  const int64_t* positions;     // [num_tokens]
  int64_t key_stride[2];        // elements between tokens, heads
  int64_t value_stride[2];
  int64_t block_stride;  // bytes between blocks
  int64_t num_blocks;
  int64_t num_tokens;
  int32_t block_size;
  int32_t dtype;
};

struct WkvAttention {
  const void* query;               // dtype [T, num_heads, head_size]
  const void* key;                 // dtype [T, num_kv_heads, head_size]
  const void* value;               // dtype [T, num_kv_heads, head_size]
  void* out;                       // dtype [T, num_heads, head_size]
  float* lse;                      // [T, num_heads] or null
  const uint8_t* kv_cache;         // [num_blocks, num_kv_heads, layout bytes]
  const int32_t* block_table;      // [num_seqs, max_blocks]
  const int32_t* seq_lens;         // [num_seqs]
  const int32_t* query_start_loc;  // [num_seqs + 1]
  int64_t query_stride[2];         // elements between tokens, heads
  int64_t key_stride[2];
  int64_t value_stride[2];
  int64_t out_stride[2];
  int64_t lse_stride[2];
  int64_t block_table_stride;  // elements between sequences
  int64_t block_stride;        // bytes between blocks
  int64_t num_blocks;
  int64_t num_tokens;  // rows of query, key, value and out
  int32_t max_blocks;
  int32_t num_seqs;
  int32_t num_heads;
  int32_t block_size;
  int32_t dtype;
  int32_t sliding_window;  // 0: none
  float scale;
};

}  // extern "C"

namespace wkvquant {

constexpr int kLanes = 16;
// Past tokens handled between two updates of the softmax state. Also the length over which the shift's basis is
// tabulated, so chunks start at multiples of it.
constexpr int kChunk = 128;
// Degree of the polynomial that stands for all slow rotary pairs over one chunk, plus one: one vector of coefficients.
constexpr int kChebyshev = 16;

// Parameters of a layer in the form the kernels use, made once per KVParams (prepare.cpp).
struct Prepared {
  int num_kv_heads, head_size;
  int hadamard;  // size of a block, 0: none
  int pairs;     // rotary pairs, 0: the shift does not rotate
  bool has_k_shift;
  float *query_scale, *key_scale;  // [H][D] k_smooth and 1 / k_smooth, each over sqrt(hadamard)
  float *k_shift, *v_shift;        // [H][D], rotary channels of k_shift times rope_scaling
  float *k_first, *v_first;        // [H][D] shifts of position 0; null: as elsewhere
  float *k_extra, *v_extra;        // [H][D] what they have more than k_shift and v_shift
  uint64_t* turns;                 // [pairs, padded to 16]

  // The shift of a chunk as a sum over a basis of functions of the position inside the chunk; see prepare.cpp.
  int active;            // rotary pairs whose shift is not zero in every head, fast ones first
  int active_padded;     // to 16, the rest zero
  int fast;              // of them, tabulated as they are
  int basis_rows;        // 2 * fast + (kChebyshev if any is slow)
  int32_t* pair;         // [active_padded]
  uint64_t* pair_turns;  // [active_padded]
  float* basis;          // [basis_rows][kChunk]
  float* chebyshev;      // [active - fast][kChebyshev]
};

struct CacheWriteArgs : WkvCacheWrite {
  const Prepared* params;
};
struct AttentionArgs : WkvAttention {
  const Prepared* params;
};

struct Kernels {
  int (*cache_write)(const CacheWriteArgs&);
  int (*paged_attention)(const AttentionArgs&);
};

const Kernels& scalar_kernels();
const Kernels& avx2_kernels();
const Kernels& avx512_kernels();

// At least `bytes` of this thread's memory, 64-byte aligned, kept between calls; null if there is none. `slot` 0
// belongs to a worker, 1 to the thread that plans.
void* scratch(int slot, size_t bytes);

}  // namespace wkvquant
