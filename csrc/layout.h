// Byte arithmetic of a KV page: the mirror of vllm_wkvquant/layout.py, which draws the layout and is held equal to this
// file by tests/test_layout.py.
#pragma once

#include <cstdint>

namespace wkvquant {

constexpr int kLayoutVersion = 1;
constexpr int kTile = 16;

// Unnamed: every ISA compiles its own copy, none may be merged at link time.
namespace {

// Bytes of one token and KV head: 4-bit codes of K and V, and fp16 (scale, minimum) of each.
constexpr int64_t token_bytes(int64_t head_size) { return 2 * (head_size / 2 + 4); }

// Byte offsets inside one (block, head) slice.
struct PageLayout {
  int64_t head_size, block_size;

  constexpr int64_t v_codes() const { return block_size * head_size / 2; }
  constexpr int64_t k_meta() const { return block_size * head_size; }
  constexpr int64_t v_meta() const { return k_meta() + 4 * block_size; }
  constexpr int64_t nbytes() const { return block_size * token_bytes(head_size); }
  // K words of 16 tokens, [D / 8][16]; V words of 8 token pairs, [8][D / 4]: both 8 * D bytes, one tile after the
  // other.
  constexpr int64_t tile_bytes() const { return kTile * head_size / 2; }
  constexpr int64_t k_word(int64_t slot, int64_t group) const {
    return ((slot / kTile * (head_size / 8) + group) * kTile + slot % kTile) * 4;
  }
  constexpr int64_t v_half(int64_t slot, int64_t word) const {
    return v_codes() + (slot / 2 * (head_size / 4) + word) * 4 + slot % 2 * 2;
  }
};

}  // namespace
}  // namespace wkvquant
