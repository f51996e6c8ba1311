"""Chunks of a prefill on a GPU, with the attention that vLLM has there, against the specification."""

import importlib.util
from types import SimpleNamespace

import cases
import pytest
import torch
from test_attention_backend import common
from test_ops_cuda import to_gpu

from vllm_wkvquant import native_cuda, ops, reference
from vllm_wkvquant.plugin import attention, prefill

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")

LENGTHS = [(40, 1), (700, 5), (90, 3), (1300, 200), (0, 33), (64, 70), (300, 128)]


@pytest.fixture(params=["FlashAttention", "xformers"])
def attend(request, monkeypatch):
    """prefill.flash_attention with one of the two, wherever the other is."""
    if request.param == "xformers":
        if importlib.util.find_spec("xformers") is None:
            pytest.skip("xformers is not installed")
        monkeypatch.setattr(prefill, "get_flash_attn_version", lambda head_size: None)

    def find(head_size: int, dtype: torch.dtype):
        found = prefill.flash_attention(head_size, dtype)
        assert (found is prefill.xformers_attention) == (request.param == "xformers")
        return found

    return find


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("heads", "head_size", "group"), [(2, 64, 3), (2, 128, 4), (1, 128, 8)])
@pytest.mark.parametrize(("room", "window"), [(4096, 0), (512, 0), (4096, 100)])
def test_chunks(attend, monkeypatch, dtype, heads, head_size, group, room, window) -> None:
    """Decodes, drafts and chunks in one step; a long past takes passes that are merged."""
    monkeypatch.setattr(prefill, "WORKSPACE", room * 4 * heads * head_size)
    case = to_gpu(cases.make_case(LENGTHS, cases.make_params(heads, head_size), group=group, dtype=dtype))
    host = common(LENGTHS, [-1] * sum(n for _, n in LENGTHS), block_table_tensor=case.block_table)
    host.query_start_loc, host.seq_lens = case.query_start_loc, case.seq_lens
    flash = attend(head_size, dtype)
    chunks = prefill.split_chunks(host, prefill.SHORT, flash, prefill.room(200, heads, head_size), 0)
    assert any(not p.own for p in chunks.passes) == (room == 512)
    count = sum(n for _, n in LENGTHS)
    planner = native_cuda.Planner([case.params], heads * group, window)
    room_of_table = case.block_table.shape[1] * case.kv_cache.shape[2]
    metadata = attention.WKVQuantMetadata(
        query_start_loc=case.query_start_loc[: chunks.num_seqs + 1],
        seq_lens=case.seq_lens[: chunks.num_seqs],
        block_table=case.block_table[: chunks.num_seqs],
        slot_mapping=torch.full((count,), -1, dtype=torch.int64, device="cuda"),
        positions=torch.zeros(count, dtype=torch.int64, device="cuda"),
        chunks=chunks,
        plan=planner.plan(case.query_start_loc, case.seq_lens, chunks.num_seqs, chunks.first, room_of_table),
    )
    out = torch.full_like(case.query, torch.nan)
    impl = attention.WKVQuantImpl(heads * group, head_size, case.scale, heads, sliding_window=window)
    layer = SimpleNamespace(wkv_params=case.params)
    impl.forward(layer, case.query, case.key, case.value, case.kv_cache, metadata, out)
    expected = torch.empty_like(out, dtype=torch.float64)
    reference.paged_attention(
        case.query.double(), case.key, case.value, case.kv_cache, case.block_table, case.seq_lens,
        case.query_start_loc, case.params, case.scale, expected, window,
    )  # fmt: skip
    error = (out[:count].double() - expected[:count]).norm() / expected[:count].norm()
    assert error < (3e-3 if dtype == torch.float16 else 6e-3)
    assert out[count:].isnan().all()


@pytest.mark.parametrize("variant", [name for name in ops.CAPTURED if name in ops.TABLE["gather_kv"]])
def test_keys_with_a_large_shift(attend, monkeypatch, variant) -> None:
    """|shift| = 200: scores reach hundreds, and fp16 keys are no worse than the model's own."""
    monkeypatch.setattr(ops, "default_variant", lambda device_type, head_size: variant)
    params = cases.make_params(1, 128, shift=200.0, base=1e6)
    case = to_gpu(cases.make_case([(3000, 64)], params, dtype=torch.float16, query_gain=0.3))
    host = common([(3000, 64)], [-1] * 64, block_table_tensor=case.block_table)
    host.query_start_loc, host.seq_lens = case.query_start_loc, case.seq_lens
    chunks = prefill.split_chunks(host, prefill.SHORT, attend(128, torch.float16), 4096, 0)
    out = torch.empty_like(case.query)
    prefill.attend(chunks, case.query, case.key, case.value, case.kv_cache, case.params, case.scale, out, 0)
    keys, values = torch.empty(2, 3064, 1, 128, dtype=torch.float64, device="cuda")
    ends = torch.tensor([0, 3064], dtype=torch.int32, device="cuda")
    reference.gather_kv(
        case.key, case.value, case.kv_cache, case.block_table, case.seq_lens, case.query_start_loc, ends[:1], ends,
        3064, case.params, keys, values,
    )  # fmt: skip

    def attended(keys: torch.Tensor) -> torch.Tensor:
        scores = torch.einsum("qhd,kd->hqk", case.query[:64].double(), keys[:, 0]) * case.scale
        hidden = torch.ones(64, 3064, dtype=torch.bool, device="cuda").triu(3001)
        return torch.einsum("hqk,kd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), values[:, 0])

    exact = attended(keys)
    rounded = (attended(keys.half().double()) - exact).norm()
    assert (out[:64].double() - exact).norm() < 2 * rounded + 3e-3 * exact.norm()
