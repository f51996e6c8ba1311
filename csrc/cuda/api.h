// The C interface of the CUDA kernels (called through ctypes, vllm_wkvquant/native_cuda.py mirrors the structs). No
// Torch or Python header: one build serves every version of both. Every pointer is a device pointer; nothing is read on
// the host.
#pragma once

#include <cuda_fp16.h>
#include <vector_types.h>

#include <cstdint>

#define WKV_API __attribute__((visibility("default")))

extern "C" {

enum WkvDtype : int32_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

// KV parameters of a layer in the form the kernels use (native_cuda.prepare makes them).
//
// The shift's part of a score is a sum over a basis of functions of the position inside a chunk of 256 tokens, times
// coefficients of the query at the centre of the chunk (csrc/cpu/prepare.cpp has the derivation). `slots` lists rotary
// pairs, 0 and no shift where a slot is padding: first 8 * fast_steps pairs whose cos and sin are tabulated, then 8 *
// slow_steps pairs that share one step of 16 Chebyshev polynomials, whose coefficients are one more product. Basis and
// coefficients of the first plain_steps, those of small shifts, are rounded to fp16; the others are sums of two. The
// step of the polynomials is a plain one only if all are.
struct WkvCudaParams {
  const float* query_scale;  // [num_kv_heads, head_size] k_smooth over the norm of the Hadamard rotation
  const float* key_scale;    // [num_kv_heads, head_size] 1 / k_smooth over that norm
  const float* k_shift;      // [num_kv_heads, head_size], rotary channels times rope_scaling
  const float* k_turned;     // [num_kv_heads, head_size] of rotary channels, what sin is times in K_t; 0 elsewhere
  const float* v_shift;      // [num_kv_heads, head_size]
  const float* k_first;      // [num_kv_heads, head_size] shifts of position 0, or null: as elsewhere
  const float* v_first;
  const float* k_extra;  // what they have more than k_shift and v_shift, or null
  const float* v_extra;
  const int64_t* rope_turns;  // [rotary_pairs], 2^64 a turn
  const uint32_t* basis;      // [4 groups of 32 positions from the chunk's centre][steps][2 m-tiles][high, low][32
                              // lanes][4] half2, mma operand A. If `tabled`: high parts alone, then those of
                              // chebyshev, then slot_turns
  const int32_t* slots;       // [8 * (fast_steps + slow_steps)]
  const float2* slot_shift;   // [num_kv_heads, slots] k_shift of the two channels of a pair
  const int64_t* slot_turns;  // the same
  const uint32_t* chebyshev;  // [slow_steps][high, low][32 lanes][4] half2, mma operand A: degree x (pair, cos or sin)
  int32_t num_kv_heads;
  int32_t head_size;
  int32_t rotary_pairs;  // 0: the shift does not rotate
  int32_t hadamard;      // keys are rotated
  int32_t fast_steps;
  int32_t slow_steps;
  int32_t plain_steps;
  int32_t tabled;  // all steps are plain and few (1 .. 4): their tables are read from shared memory
};

struct WkvCudaCacheWrite {
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

// Who does what in the attention of a step, and where its tokens are: the same in all layers of a shape.
struct WkvCudaPlan {
  const int32_t* seq_lens;         // [num_seqs]
  const int32_t* query_start_loc;  // [num_seqs + 1]
  int64_t* positions;              // [num_positions] of the tokens in their sequences, written
  void* plan;                      // wkvquant_cuda_plan_bytes() bytes, written
  int64_t num_positions;
  int64_t most_past;    // tokens that the block table has room for
  int32_t num_seqs;     // positions are of these
  int32_t num_planned;  // attention is called for the first of them, at most kMaxSeqs
  int32_t num_tokens;   // rows of query, key, value and out; sequences with queries beyond them are left out
  int32_t num_heads;
  int32_t num_kv_heads;
  int32_t head_size;
  int32_t queries;  // of a sequence, in the mean; any number is right, the kernels are fastest with this one
  int32_t teams;    // wkvquant_cuda_teams(), the least of all layers
  int32_t num_sms;
  int32_t sliding_window;  // 0: none
};

struct WkvCudaAttention {
  const void* query;           // dtype [T, num_heads, head_size]
  const void* key;             // dtype [T, num_kv_heads, head_size]
  const void* value;           // the same
  void* out;                   // dtype [T, num_heads, head_size]
  float* lse;                  // [T, num_heads] or null; -inf (and 0 in out) where a row sees no token
  const uint8_t* kv_cache;     // [num_blocks, num_kv_heads, layout bytes], 16-byte aligned
  const int32_t* block_table;  // [num_seqs, max_blocks]
  const void* plan;            // of the step's sequences
  void* workspace;             // wkvquant_cuda_workspace() bytes, zeroed once; one for each stream
  int64_t query_stride[2];     // elements between tokens, heads
  int64_t key_stride[2];
  int64_t value_stride[2];
  int64_t out_stride[2];
  int64_t lse_stride[2];
  int64_t block_table_stride;  // elements between sequences
  int64_t block_stride;        // bytes between blocks, a multiple of 16
  int64_t num_blocks;
  int32_t num_heads;
  int32_t block_size;
  int32_t dtype;
  int32_t sliding_window;  // this and the next three as in the plan
  int32_t queries;
  int32_t teams;
  int32_t num_sms;
  float scale;
  // The kernel before this one in the stream is the step's cache write, and nothing else that this one reads is of a
  // kernel that may still run: it may begin before the write has ended, and waits for that itself.
  int32_t after_write;
};

struct WkvCudaGather {
  const void* key;                 // dtype [num_tokens, num_kv_heads, head_size]
  const void* value;               // the same
  __half* keys;                    // [num_keys, num_kv_heads, head_size]
  __half* values;                  // the same
  const uint8_t* kv_cache;         // as in WkvCudaAttention
  const int32_t* block_table;      // [num_seqs, max_blocks]
  const int32_t* seq_lens;         // [num_seqs]
  const int32_t* query_start_loc;  // [num_seqs + 1]
  const int32_t* first;            // [num_seqs], multiples of kTile
  const int32_t* key_start_loc;    // [num_seqs + 1]
  int64_t key_stride[2];           // elements between tokens, heads
  int64_t value_stride[2];
  int64_t block_table_stride;  // elements between sequences
  int64_t block_stride;        // bytes between blocks, a multiple of 16
  int64_t num_blocks;
  int64_t num_tokens;
  int64_t num_keys;
  int32_t max_keys;  // of a sequence
  int32_t num_seqs;
  int32_t block_size;
  int32_t dtype;
};

// Each returns a cudaError_t.
WKV_API int wkvquant_cuda_cache_write(const WkvCudaCacheWrite*, const WkvCudaParams*, void* stream);
WKV_API int wkvquant_cuda_gather_kv(const WkvCudaGather*, const WkvCudaParams*, void* stream);
WKV_API int wkvquant_cuda_plan(const WkvCudaPlan*, void* stream);
WKV_API int wkvquant_cuda_paged_attention(const WkvCudaAttention*, const WkvCudaParams*, void* stream);
WKV_API int64_t wkvquant_cuda_workspace();
WKV_API int64_t wkvquant_cuda_plan_bytes();
// Teams of warps of a CTA that shared memory has room for, `shared_bytes` of which a CTA can have; 0: not one.
WKV_API int wkvquant_cuda_teams(const WkvCudaParams*, int num_heads, int queries, int64_t shared_bytes);
// Dynamic shared memory of a CTA of `tiles` row tiles of 8, 1 or 2, and `strands` strands of past tokens, 1, or 2
// where a tile has at most 4 rows; -1 where there is no such kernel.
WKV_API int64_t wkvquant_cuda_shared_bytes(const WkvCudaParams*, int tiles, int strands);
// Of a struct: 0 WkvCudaParams, then CacheWrite, Plan, Attention, Gather.
WKV_API int64_t wkvquant_cuda_sizeof(int which);
WKV_API int32_t wkvquant_cuda_max_seqs();
WKV_API const char* wkvquant_cuda_error(int status);
// Architectures that the build has code for, as in sm_<architecture>, with _ between them: "80_90a".
WKV_API const char* wkvquant_cuda_archs();

}  // extern "C"

namespace wkvquant {

constexpr int kMaxCtas = 512;
constexpr int kMaxSeqs = 4096;
constexpr int kMaxRows = 16;  // query rows of one pass over the past

}  // namespace wkvquant
