"""The page layout: Python against C++, round trips, isolation, and bytes worked out by hand."""

import ctypes

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_wkvquant import layout, native
from vllm_wkvquant.layout import HEAD_SIZES, PageLayout, token_bytes

BLOCK_SIZES = (16, 32, 48, 64, 128, 256)


@pytest.mark.parametrize("head_size", HEAD_SIZES)
def test_cpp_mirror(head_size: int) -> None:
    """Every offset of every slot is the same in csrc/layout.h."""
    lib = native.library()
    for block_size in BLOCK_SIZES:
        page = PageLayout(head_size, block_size)
        fields = (ctypes.c_int64 * 5)()
        lib.wkvquant_layout(head_size, block_size, fields)
        assert list(fields) == [layout.LAYOUT_VERSION, page.v_codes, page.k_meta, page.v_meta, page.nbytes]
        slots = torch.arange(block_size)
        k = [[lib.wkvquant_layout_k_word(head_size, block_size, s, g) for g in range(head_size // 8)] for s in slots]
        v = [[lib.wkvquant_layout_v_half(head_size, block_size, s, w) for w in range(head_size // 4)] for s in slots]
        assert page.k_word(slots).tolist() == k
        assert page.v_half(slots).tolist() == v


@pytest.mark.parametrize("head_size", HEAD_SIZES)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_offsets_tile_the_page(head_size: int, block_size: int) -> None:
    """Codes and metadata of all tokens cover every byte of the page exactly once."""
    page = PageLayout(head_size, block_size)
    slots = torch.arange(block_size)
    count = torch.zeros(page.nbytes, dtype=torch.int64)
    for byte in range(4):
        count.index_add_(0, (page.k_word(slots) + byte).flatten(), torch.ones(block_size * head_size // 8).long())
        for base in (page.k_meta, page.v_meta):
            count.index_add_(0, base + 4 * slots + byte, torch.ones(block_size).long())
    for byte in range(2):
        count.index_add_(0, (page.v_half(slots) + byte).flatten(), torch.ones(block_size * head_size // 4).long())
    assert bool((count == 1).all())
    assert page.nbytes == block_size * token_bytes(head_size)


def random_tokens(tokens: int, heads: int, head_size: int, seed: int) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (tokens, heads, head_size), generator=g, dtype=torch.uint8)
    return codes, torch.rand(tokens, heads, generator=g).half(), torch.randn(tokens, heads, generator=g).half()


@settings(max_examples=40, deadline=None)
@given(
    head_size=st.sampled_from(HEAD_SIZES),
    block_size=st.sampled_from(BLOCK_SIZES),
    heads=st.integers(1, 3),
    blocks=st.integers(1, 4),
    fill=st.sampled_from([0, 255]),
    seed=st.integers(0, 2**31),
)
def test_round_trip(head_size: int, block_size: int, heads: int, blocks: int, fill: int, seed: int) -> None:
    """`load` returns what `store` put anywhere, whatever the bytes held; all other tokens keep theirs."""
    g = torch.Generator().manual_seed(seed)
    cache = torch.full((blocks, heads, block_size, token_bytes(head_size)), fill, dtype=torch.uint8)
    everywhere = torch.arange(blocks * block_size)
    before_k, before_v = (
        random_tokens(len(everywhere), heads, head_size, seed + 1),
        random_tokens(len(everywhere), heads, head_size, seed + 2),
    )
    layout.store(cache, everywhere, before_k, before_v)
    count = int(torch.randint(0, len(everywhere) + 1, (1,), generator=g))
    slots = torch.randperm(len(everywhere), generator=g)[:count]
    k, v = random_tokens(count, heads, head_size, seed + 3), random_tokens(count, heads, head_size, seed + 4)
    layout.store(cache, slots, k, v)
    for new, before, got in zip((k, v), (before_k, before_v), layout.load(cache, everywhere, head_size), strict=True):
        for a, b, c in zip(new, before, got, strict=True):
            expected = b.clone()
            expected[slots] = a
            assert torch.equal(c, expected)


def test_neighbours_in_a_strided_cache() -> None:
    """Pages cut from a wider allocation (vLLM's blocks may hold other layers): bytes between blocks stay."""
    width = 2 * 32 * token_bytes(64)
    memory = torch.full((3, width + 100), 7, dtype=torch.uint8)
    cache = memory[:, :width].unflatten(1, (2, 32, token_bytes(64)))
    slots = torch.tensor([5, 40, 95])
    k, v = random_tokens(3, 2, 64, 0), random_tokens(3, 2, 64, 1)
    layout.store(cache, slots, k, v)
    assert bool((memory[:, width:] == 7).all())
    got = layout.load(cache, slots, 64)
    assert torch.equal(got[0][0], k[0])
    assert torch.equal(got[1][0], v[0])


def test_bytes_by_hand() -> None:
    """Head size 64, 32 tokens, token 17 (tile 1, lane 1, odd of pair 8) of block 1, head 1."""
    cache = torch.zeros(2, 2, 32, token_bytes(64), dtype=torch.uint8)
    k = torch.zeros(1, 2, 64, dtype=torch.uint8)
    v = torch.zeros(1, 2, 64, dtype=torch.uint8)
    k[0, 1, 8], k[0, 1, 12] = 3, 10  # group 1, byte 0: low and high nibble
    v[0, 1, 4:8] = torch.tensor([1, 2, 3, 4], dtype=torch.uint8)  # halfword 1: 0x4321
    scale, minimum = torch.tensor([[0.0, 1.0]]).half(), torch.tensor([[0.0, -2.0]]).half()
    layout.store(cache, torch.tensor([32 + 17]), (k, scale, minimum), (v, minimum, scale))
    page = cache[1, 1].flatten()
    expected = torch.zeros_like(page)
    expected[1 * 16 * 8 * 4 + 1 * 16 * 4 + 1 * 4] = 0xA3  # tile 1 of 8 groups, group 1, lane 1
    half = 32 * 32 + 8 * 16 * 4 + 1 * 4 + 2  # after K's 1024 bytes: pair 8 of 16 words, word 1, high half
    expected[half], expected[half + 1] = 0x21, 0x43
    expected[2048 + 4 * 17 + 1] = 0x3C  # K scale 1.0 = 0x3c00
    expected[2048 + 4 * 17 + 3] = 0xC0  # K minimum -2.0 = 0xc000
    expected[2048 + 128 + 4 * 17 + 1] = 0xC0
    expected[2048 + 128 + 4 * 17 + 3] = 0x3C
    assert page.tolist() == expected.tolist()
    assert not cache[0].any()
    assert not cache[1, 0].any()


def test_rejects() -> None:
    """Sizes and strides that the layout does not have."""
    with pytest.raises(ValueError, match="head size 72"):
        PageLayout(72, 16)
    with pytest.raises(ValueError, match="block size 24"):
        PageLayout(64, 24)
    with pytest.raises(ValueError, match="contiguous blocks"):
        layout.pages(torch.zeros(2, 32, 2, token_bytes(64), dtype=torch.uint8).transpose(1, 2))
