"""All byte arithmetic of a KV page, stated once (csrc/layout.h mirrors it; tests/test_layout.py holds them together).

vLLM sees a uint8 tensor [num_blocks, num_kv_heads, block_size, token_bytes] whose (block, head) slices are
contiguous. Inside one slice the bytes are ours. With D = head_size and tiles of 16 tokens:

    offset                what
    0                     K codes   [block_size / 16][D / 8][16 tokens] words
    block_size * D / 2    V codes   [block_size / 16][8 token pairs][D / 4] words
    block_size * D        K (scale, min)  [block_size] x 2 fp16
    + block_size * 4      V (scale, min)  [block_size] x 2 fp16

A word is 32 bits, little endian. K word g of a token: byte b holds dimension 8g + b in its low nibble and 8g + 4 + b
in its high one, so that `w & 0x0f0f0f0f` and `(w >> 4) & 0x0f0f0f0f` are four int8 operands each with tokens as
lanes. V word w of tokens (2i, 2i + 1): the low halfword is the even token's, the high one the odd token's, each
holding dimensions 4w .. 4w + 3 from its low nibble up, so that `(word >> 4k) & 0x000f000f` is one dimension of two
tokens. A token owns whole words of K and whole halfwords of V: appending never reads.
"""

from dataclasses import dataclass

import torch

LAYOUT_VERSION = 1
TILE = 16
HEAD_SIZES = (64, 80, 96, 128, 256)

Quantized = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # codes uint8 [T, H, D], scale and minimum fp16 [T, H]


def token_bytes(head_size: int) -> int:
    """Bytes of one token and KV head: 4-bit K and V codes, and fp16 scale and minimum of each."""
    return 2 * (head_size // 2 + 4)


@dataclass(frozen=True)
class PageLayout:
    """Byte offsets inside one (block, head) slice of `block_size` tokens."""

    head_size: int
    block_size: int

    def __post_init__(self) -> None:
        if self.head_size not in HEAD_SIZES:
            raise ValueError(f"head size {self.head_size} is not supported; supported: {list(HEAD_SIZES)}")
        if self.block_size <= 0 or self.block_size % TILE:
            raise ValueError(f"block size {self.block_size} is not a multiple of {TILE}")

    @property
    def v_codes(self) -> int:
        return self.block_size * self.head_size // 2

    @property
    def k_meta(self) -> int:
        return self.block_size * self.head_size

    @property
    def v_meta(self) -> int:
        return self.k_meta + 4 * self.block_size

    @property
    def nbytes(self) -> int:
        return self.block_size * token_bytes(self.head_size)

    def k_word(self, slot: torch.Tensor) -> torch.Tensor:
        """Byte offsets [..., D / 8] of the K words of the tokens at `slot` [...] (their index in the block)."""
        group = torch.arange(self.head_size // 8, device=slot.device)
        tile, lane = slot // TILE, slot % TILE
        return ((tile[..., None] * (self.head_size // 8) + group) * TILE + lane[..., None]) * 4

    def v_half(self, slot: torch.Tensor) -> torch.Tensor:
        """Byte offsets [..., D / 4] of the V halfwords of the tokens at `slot` [...]."""
        word = torch.arange(self.head_size // 4, device=slot.device)
        pair, half = slot // 2, slot % 2
        return self.v_codes + (pair[..., None] * (self.head_size // 4) + word) * 4 + half[..., None] * 2


def pages(kv_cache: torch.Tensor) -> torch.Tensor:
    """View [num_blocks, num_kv_heads, block_size * token_bytes] of vLLM's 4-d tensor.

    Raises ValueError where the bytes of one (block, head) are not contiguous.
    """
    nb, heads, block_size, tb = kv_cache.shape
    if kv_cache.dtype != torch.uint8 or kv_cache.stride()[1:] != (block_size * tb, tb, 1):
        raise ValueError(
            f"kv_cache must be uint8 [num_blocks, num_kv_heads, block_size, token_bytes] with contiguous blocks, got "
            f"{kv_cache.dtype} {tuple(kv_cache.shape)} with strides {kv_cache.stride()}"
        )
    return kv_cache.as_strided((nb, heads, block_size * tb), (kv_cache.stride(0), block_size * tb, 1))


def store(
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    k: Quantized,
    v: Quantized,
) -> None:
    """Put quantized tokens into the pages.

    kv_cache: uint8 [num_blocks, num_kv_heads, block_size, token_bytes]; slot_mapping: int64 [T], block * block_size +
    index, none negative; k, v: (codes uint8 [T, H, D] in 0..15, scale fp16 [T, H], minimum fp16 [T, H]).
    """
    page = pages(kv_cache)
    block_size = kv_cache.shape[2]
    head_size = k[0].shape[-1]
    layout = PageLayout(head_size, block_size)
    tokens, heads = k[0].shape[:2]
    block, slot = slot_mapping // block_size, slot_mapping % block_size
    head = torch.arange(heads, device=page.device)[None, :, None]

    def put(offset: torch.Tensor, data: torch.Tensor) -> None:
        """offset [T, n], data uint8 [T, H, n]"""
        page[block[:, None, None], head, offset[:, None, :]] = data

    k_codes = k[0].view(tokens, heads, head_size // 8, 8)
    k_bytes = k_codes[..., :4] | (k_codes[..., 4:] << 4)
    v_codes = v[0].view(tokens, heads, head_size // 4, 2, 2)
    v_bytes = v_codes[..., 0] | (v_codes[..., 1] << 4)
    byte = torch.arange(4, device=page.device)
    put((layout.k_word(slot)[..., None] + byte).flatten(1), k_bytes.flatten(2))
    put((layout.v_half(slot)[..., None] + byte[:2]).flatten(1), v_bytes.flatten(2))
    for base, (_, scale, minimum) in ((layout.k_meta, k), (layout.v_meta, v)):
        put(base + slot[:, None] * 4 + byte, torch.stack([scale, minimum], -1).view(torch.uint8))


def load(kv_cache: torch.Tensor, slots: torch.Tensor, head_size: int) -> tuple[Quantized, Quantized]:
    """Read tokens back: the inverse of `store` for slots [T]; returns (codes, scale, minimum) of K and of V."""
    page = pages(kv_cache)
    block_size = kv_cache.shape[2]
    layout = PageLayout(head_size, block_size)
    heads = kv_cache.shape[1]
    block, slot = slots // block_size, slots % block_size
    head = torch.arange(heads, device=page.device)[None, :, None]
    byte = torch.arange(4, device=page.device)

    def get(offset: torch.Tensor) -> torch.Tensor:
        return page[block[:, None, None], head, offset[:, None, :]]

    tokens = slots.shape[0]
    k_bytes = get((layout.k_word(slot)[..., None] + byte).flatten(1)).view(tokens, heads, head_size // 8, 4)
    v_bytes = get((layout.v_half(slot)[..., None] + byte[:2]).flatten(1))
    k_codes = torch.cat([k_bytes & 15, k_bytes >> 4], -1).flatten(2)
    v_codes = torch.stack([v_bytes & 15, v_bytes >> 4], -1).flatten(2)
    out = []
    for base, codes in ((layout.k_meta, k_codes), (layout.v_meta, v_codes)):
        meta = get(base + slot[:, None] * 4 + byte).contiguous().view(torch.float16)
        out.append((codes, meta[..., 0], meta[..., 1]))
    return out[0], out[1]
