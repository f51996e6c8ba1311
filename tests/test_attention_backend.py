"""The attention backend alone, without an engine: pages, metadata, long chunks, the impl."""

from types import SimpleNamespace

import cases
import pytest
import torch
from test_plugin import FakeModel, kv_config
from vllm.platforms.interface import DeviceCapability
from vllm.v1 import kv_cache_interface
from vllm.v1.attention.backend import AttentionType, MultipleOf
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.attention.selector import AttentionSelectorConfig
from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

import vllm_wkvquant
from vllm_wkvquant import layout, ops, plugin, reference
from vllm_wkvquant.plugin import attention, prefill

# --- backend


def test_page_is_what_the_layout_says() -> None:
    backend = attention.WKVQuantBackend
    for head_size in layout.HEAD_SIZES:
        shape = backend.get_kv_cache_shape(5, 32, 2, head_size, "auto")
        assert shape == (5, 2, 32, layout.token_bytes(head_size))
        assert layout.pages(torch.zeros(shape, dtype=torch.uint8)).shape[2] == 32 * layout.token_bytes(head_size)
    order = backend.get_kv_cache_stride_order()
    assert order == (0, 1, 2, 3)
    # layers in one allocation: any block stride will do, as long as a block's inside is contiguous
    layered = backend.get_kv_cache_stride_order(include_num_layers_dimension=True)
    physical = torch.zeros([(7, *shape)[i] for i in layered], dtype=torch.uint8)
    logical = physical.permute([layered.index(i) for i in range(5)])
    assert logical.shape == (7, *shape)
    layout.pages(logical[3])
    if hasattr(kv_cache_interface, "KVCacheLayout"):  # since vLLM 0.29
        assert all(kv_layout.is_block_contiguous for kv_layout in backend.supported_kv_cache_layouts())
    assert [(type(x), x.base) for x in backend.get_supported_kernel_block_sizes()] == [(MultipleOf, 16)]


def test_backend_is_not_chosen_by_hand() -> None:
    """vLLM asks like this on a GPU with `--attention-backend CUSTOM`, whatever the model."""
    plugin.register()
    config = AttentionSelectorConfig(128, torch.bfloat16, "auto", 32)
    reasons = AttentionBackendEnum.CUSTOM.get_class().validate_configuration(
        device_capability=DeviceCapability(9, 0), **config._asdict()
    )
    assert reasons == ["it is chosen by a wkvquant checkpoint; leave out --attention-backend"]


@pytest.mark.parametrize("lengths", [[(0, 5)], [(3, 1), (0, 7), (100, 4)], [(17, 1)] * 4, [(5, 2), (9, 0), (0, 3)]])
def test_positions_are_indices_in_the_sequence(lengths: list) -> None:
    count = sum(n for _, n in lengths)
    starts = torch.tensor([0] + [n for _, n in lengths]).cumsum(0).int()
    seq_lens = torch.tensor([past + n for past, n in lengths], dtype=torch.int32)
    padded = count + 3
    out = torch.full((padded,), -99)
    reference.token_positions(starts, seq_lens, torch.arange(padded), out)
    expected = [past + i for past, n in lengths for i in range(n)]
    assert out[:count].tolist() == expected
    assert (out >= 0).all()


def builder(max_tokens: int = 16) -> attention.WKVQuantMetadataBuilder:
    spec = SimpleNamespace(head_size=64, block_size=32)
    vllm_config = SimpleNamespace(scheduler_config=SimpleNamespace(max_num_batched_tokens=max_tokens))
    return attention.WKVQuantMetadataBuilder(spec, ["a"], vllm_config, torch.device("cpu"))


def common(lengths: list, slots: list[int], **changes) -> SimpleNamespace:
    fields = {
        "num_actual_tokens": len(slots),
        "num_reqs": len(lengths),
        "max_query_len": max(n for _, n in lengths),
        "query_start_loc": torch.tensor([0] + [n for _, n in lengths]).cumsum(0).int(),
        "query_start_loc_cpu": torch.tensor([0] + [n for _, n in lengths]).cumsum(0).int(),
        "seq_lens": torch.tensor([past + n for past, n in lengths], dtype=torch.int32),
        "seq_lens_cpu_upper_bound": torch.tensor([past + n for past, n in lengths], dtype=torch.int32),
        "block_table_tensor": torch.arange(8, dtype=torch.int32).view(1, 8).repeat(len(lengths), 1),
        "slot_mapping": torch.tensor(slots),
        "causal": True,
    }
    return SimpleNamespace(**(fields | changes))


def test_positions_keep_their_address() -> None:
    """A graph captured over one step's metadata must see the next step's positions."""
    b = builder()
    first = b.build(0, common([(3, 1), (7, 1)], [3, 7]))
    address = first.positions.data_ptr()
    assert first.positions.tolist() == [3, 7]
    second = b.build(0, common([(4, 1), (8, 1)], [4, 8]))
    assert second.positions.data_ptr() == address
    assert first.positions.tolist() == [4, 8]
    assert b.build(0, common([(0, 40)], list(range(40)))).positions.tolist() == list(range(40))


def test_decode_is_captured_where_kernels_of_a_gpu_are(monkeypatch) -> None:
    """UNIFORM_BATCH with them, after every layer's needs were reserved; NEVER with the reference. CUDA's plan steps,
    with the window of the layers, which their spec may lack."""
    params = [layer_with_params().wkv_params for _ in range(2)]
    reserved, planned, checked = [], [], []

    made = []

    class Planner:
        def check_steps(self, *limits):
            checked.append(limits)

        def plan(self, query_start_loc, seq_lens, num_planned, num_tokens, most_past, positions):
            reference.token_positions(query_start_loc, seq_lens, torch.arange(len(positions)), positions)
            planned.append((num_planned, num_tokens, most_past))
            return len(planned)

    def planner(layers, num_heads, window):
        made.append(([id(x) for x in layers], num_heads, window))
        return Planner() if ops.default_variant("cpu", 64) == "cuda" else None

    vllm_config = SimpleNamespace(
        model_config=FakeModel(dtype=torch.bfloat16),
        scheduler_config=SimpleNamespace(max_num_batched_tokens=16, max_num_seqs=5),
        speculative_config=None,
        compilation_config=SimpleNamespace(
            max_cudagraph_capture_size=24,
            static_forward_context={
                name: SimpleNamespace(wkv_params=p, num_heads=6, impl=SimpleNamespace(sliding_window=128))
                for name, p in zip("ab", params, strict=True)
            },
        ),
    )
    spec = SimpleNamespace(head_size=64, block_size=32)
    monkeypatch.setattr(ops, "reserve", lambda p, max_seqs: reserved.append((p, max_seqs)))
    monkeypatch.setattr(ops, "planner", planner)
    for variant, support, first in (
        ("reference", "NEVER", 16),
        ("cuda", "UNIFORM_BATCH", 24),
        ("triton", "UNIFORM_BATCH", 24),
    ):
        monkeypatch.setattr(ops, "default_variant", lambda device_type, head_size, variant=variant: variant)
        b = attention.WKVQuantMetadataBuilder(spec, ["a", "b"], vllm_config, torch.device("cpu"))
        assert b.get_cudagraph_support(vllm_config, spec).name == support
        address = b.build(0, common([(0, first)], list(range(first)))).positions.data_ptr()
        # a larger batch leaves the captured positions where they are
        assert b.build(0, common([(0, 40)], list(range(40)))).positions.data_ptr() != address
        step = b.build(0, common([(0, first)], list(range(first))))
        assert step.positions.data_ptr() == address
        assert step.positions.tolist() == list(range(first))
        assert step.plan == (3 if variant == "cuda" else None)
    assert [(id(p), n) for p, n in reserved] == 2 * [(id(p), 5) for p in params]
    assert planned == [(1, 24, 8 * 32), (1, 40, 8 * 32), (1, 24, 8 * 32)]
    assert checked == [(5, 24, 512)]
    ids = [id(x) for x in params]
    assert made == 2 * [(ids, 6, 128)]
    # heads or windows that differ from layer to layer have no plan in common
    monkeypatch.setattr(ops, "default_variant", lambda device_type, head_size: "cuda")
    layer = vllm_config.compilation_config.static_forward_context["b"]
    for heads, window in ((2, 128), (6, 0)):
        layer.num_heads, layer.impl.sliding_window = heads, window
        checked.clear()
        made.clear()
        b = attention.WKVQuantMetadataBuilder(spec, ["a", "b"], vllm_config, torch.device("cpu"))
        step = b.build(0, common([(3, 1)], [3]))
        assert step.plan is None
        assert step.positions.tolist() == [3]
        assert made == [(ids[:1], 6, 128), (ids[1:], heads, window)]
        assert checked == 2 * [(5, 24, 512)]


def test_non_causal_attention_is_refused() -> None:
    for causal in (False, torch.ones(1, dtype=torch.bool)):
        with pytest.raises(NotImplementedError, match="non-causal attention"):
            builder().build(0, common([(0, 1)], [0], causal=causal))


def test_unsupported_block_size_is_refused_by_name() -> None:
    spec = SimpleNamespace(head_size=64, block_size=24)
    vllm_config = SimpleNamespace(scheduler_config=SimpleNamespace(max_num_batched_tokens=16))
    with pytest.raises(ValueError, match="block size 24 is not a multiple of 16"):
        attention.WKVQuantMetadataBuilder(spec, ["a"], vllm_config, torch.device("cpu"))


# --- long chunks on a GPU


def flash_stand_in(
    q, k, v, out, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal, window_size, return_softmax_lse=False, **options
):
    """What the plugin needs of flash_attn_varlen_func: attention of packed sequences, and its log-sum-exp.

    Its mask is aligned to the last query and key. Tiles have rows beyond a sequence, which must be numbers.
    """
    assert v.isfinite().all()
    assert q.dtype == k.dtype == v.dtype == out.dtype
    counts, lengths = cu_seqlens_q.diff(), cu_seqlens_k.diff()
    assert options["max_seqlen_q"] >= counts.max()
    assert lengths.max() <= options["max_seqlen_k"] <= len(k)
    lse = torch.full((q.shape[1], q.shape[0]), torch.nan)
    for first, n, begin, m in zip(
        cu_seqlens_q.tolist(), counts.tolist(), cu_seqlens_k.tolist(), lengths.tolist(), strict=False
    ):
        rows = slice(first, first + n)
        keys, values = (x[begin : begin + m].double().repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q[rows].double(), keys) * softmax_scale
        i, j = torch.arange(n)[:, None] + m - n, torch.arange(m)
        if causal:
            left = m if window_size is None else window_size[0]
            scores = scores.masked_fill((j > i) | (j < i - left), -torch.inf)
        else:
            assert window_size is None
        out[rows] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), values).to(out.dtype)
        lse[:, rows] = scores.logsumexp(-1)
    return (out, lse) if return_softmax_lse else out


@pytest.fixture
def gpu_builder(monkeypatch):
    """The builder as with the CUDA kernels, but with a stand-in for FlashAttention and the ops of the CPU."""

    def make(
        draft_tokens: int | None = None,
        room: int = 4096,
        windows: tuple = (0,),
        draft_model: str | None = None,
        max_seqs: int = 5,
    ) -> attention.WKVQuantMetadataBuilder:
        """windows: of the layers, each with its own params; 0 is none. draft_model: how it is quantized."""
        layers = {f"layer{i}": window for i, window in enumerate(windows)}
        monkeypatch.setattr(attention, "_captures", lambda device_type, head_size: True)
        monkeypatch.setattr(torch.Tensor, "new_empty", lambda self, *shape: self.new_full(shape, torch.nan))
        monkeypatch.setattr(prefill, "flash_attention", lambda head_size, dtype: flash_stand_in)
        monkeypatch.setattr(prefill, "WORKSPACE", room * 2 * 2 * 2 * 64)
        speculative = SimpleNamespace(
            num_speculative_tokens=draft_tokens,
            parallel_drafting=False,
            uses_draft_model=lambda: draft_model is not None,
            draft_model_config=SimpleNamespace(quantization=draft_model),
        )
        vllm_config = SimpleNamespace(
            model_config=FakeModel(dtype=torch.bfloat16),
            scheduler_config=SimpleNamespace(max_num_batched_tokens=64, max_num_seqs=max_seqs),
            parallel_config=SimpleNamespace(decode_context_parallel_size=1),
            speculative_config=speculative if draft_tokens else None,
            compilation_config=SimpleNamespace(
                max_cudagraph_capture_size=8,
                static_forward_context={
                    name: SimpleNamespace(
                        wkv_params=cases.make_params(2, 64), num_heads=8, impl=SimpleNamespace(sliding_window=w)
                    )
                    for name, w in layers.items()
                },
            ),
        )
        sizes = {"block_size": 32, "num_kv_heads": 2, "head_size": 64, "dtype": torch.uint8}
        spec = SlidingWindowSpec(**sizes, sliding_window=windows[0]) if all(windows) else FullAttentionSpec(**sizes)
        return attention.WKVQuantMetadataBuilder(spec, list(layers), vllm_config, torch.device("cpu"))

    return make


def chunked_case(lengths: list, dtype: torch.dtype = torch.float32) -> tuple[cases.Case, SimpleNamespace]:
    """Random inputs of sequences (past, new), and vLLM's metadata of them."""
    case = cases.make_case(lengths, cases.make_params(2, 64), dtype=dtype)
    return case, common(lengths, [-1] * sum(n for _, n in lengths), block_table_tensor=case.block_table)


@pytest.mark.parametrize(
    "lengths",
    [
        [(40, 1), (77, 1), (90, 3), (64, 17), (100, 40), (0, 33)],
        [(90, 5), (90, 5), (3, 1), (64, 16), (64, 20)],  # the second runner puts uniform decodes first
        [(50, 60), (0, 20), (0, 2), (70, 0)],  # short ones after long ones, and padding
        [(0, 40)],
        [(0, 40), (33, 40)],
        [(40, 1), (20, 16)],
    ],
)
@pytest.mark.parametrize("window", [0, 1, 10, 50])
@pytest.mark.parametrize("all_layers", [True, False])
@pytest.mark.parametrize("room", [128, 4096])
def test_long_chunks_are_the_op(gpu_builder, lengths: list, window: int, all_layers: bool, room: int) -> None:
    """Decodes through one op, chunks through FlashAttention over gathered keys: together what one op gives for all.

    all_layers: the window is that of the cache; pages before it may be gone.
    """
    case, common_metadata = chunked_case(lengths, torch.bfloat16)
    expected, _ = cases.run_attention(ops.paged_attention, case, sliding_window=window, variant="reference")
    if window and all_layers:
        null = int(torch.isin(torch.arange(len(case.kv_cache)), case.block_table, invert=True).nonzero()[0])
        case.kv_cache[null] = 0  # as vLLM's, which nothing writes
        for row, (past, _) in zip(case.block_table, lengths, strict=True):
            row[: max(0, past - window + 1) // 32] = null
    metadata = gpu_builder(room=room, windows=(window,) if all_layers else (window, 0)).build(0, common_metadata)
    assert (metadata.chunks is not None) == any(n > 16 for _, n in lengths)
    out = torch.full(case.query.shape, 7.0, dtype=torch.bfloat16)
    impl = attention.WKVQuantImpl(8, 64, case.scale, 2, sliding_window=window)
    layer = SimpleNamespace(wkv_params=case.params)
    impl.forward(layer, case.query, case.key, case.value, case.kv_cache, metadata, out)
    count = sum(n for _, n in lengths)
    torch.testing.assert_close(out[:count], expected[:count], atol=2e-2, rtol=2e-2)
    assert (out[count:] == 7).all()


@pytest.mark.parametrize(
    ("lengths", "passes"),
    [
        ([(100, 40)], [(0, 1, [0], True)]),
        ([(100, 40), (30, 20)], [(0, 1, [0], True), (1, 2, [0], True)]),
        ([(30, 20), (40, 30), (60, 64)], [(0, 2, [0, 0], True), (2, 3, [0], True)]),
        ([(200, 64)], [(0, 1, [0], False), (0, 1, [112], True)]),
        (
            [(10, 20), (500, 60), (40, 20)],
            [
                (0, 1, [0], True),
                (1, 2, [0], False),
                (1, 2, [160], False),
                (1, 2, [320], False),
                (1, 2, [400], True),
                (2, 3, [0], True),
            ],
        ),
    ],
)
def test_passes(gpu_builder, lengths: list, passes: list) -> None:
    """As many sequences together as there is room for; one that needs several passes has them for itself."""
    case, common_metadata = chunked_case(lengths, torch.float16)
    chunks = gpu_builder(room=160).build(0, common_metadata).chunks
    assert [(p.seqs.start, p.seqs.stop, p.first.tolist(), p.own) for p in chunks.passes] == passes
    for p in chunks.passes:
        counts = p.key_start_loc.diff()
        assert p.num_keys - p.missing <= p.key_start_loc[-1] <= p.num_keys <= 160
        assert counts.max() <= p.max_keys
        if p.own:
            assert torch.equal(p.first + counts, case.seq_lens[p.seqs])


def test_lengths_that_count_rejected_drafts(gpu_builder) -> None:
    """A short query that follows a long one may have a shorter past than the host knows of."""
    lengths = [(150, 40), (130, 6)]
    case, common_metadata = chunked_case(lengths, torch.float16)
    common_metadata.seq_lens_cpu_upper_bound = common_metadata.seq_lens_cpu_upper_bound + torch.tensor([0, 5])
    for window in (0, 40):
        metadata = gpu_builder(room=128, windows=(window,)).build(0, common_metadata)
        out = torch.zeros_like(case.query)
        impl = attention.WKVQuantImpl(8, 64, case.scale, 2, sliding_window=window)
        layer = SimpleNamespace(wkv_params=case.params)
        impl.forward(layer, case.query, case.key, case.value, case.kv_cache, metadata, out)
        expected, _ = cases.run_attention(ops.paged_attention, case, sliding_window=window, variant="reference")
        torch.testing.assert_close(out[:46], expected[:46], atol=5e-3, rtol=5e-3)


def test_prefill_of_a_draft_model(gpu_builder) -> None:
    """vLLM adds a token to each sequence on the device, and leaves the host's lengths as they were."""
    lengths = [(90, 3), (100, 41), (1, 20), (0, 33)]
    case, common_metadata = chunked_case(lengths, torch.float16)
    assert gpu_builder(draft_tokens=3, draft_model="fp8").build(0, common_metadata).chunks is not None
    common_metadata.seq_lens_cpu_upper_bound = common_metadata.seq_lens_cpu_upper_bound - 1
    metadata = gpu_builder(draft_tokens=3, draft_model="wkvquant").build(0, common_metadata)
    out = torch.zeros_like(case.query)
    impl, layer = attention.WKVQuantImpl(8, 64, case.scale, 2), SimpleNamespace(wkv_params=case.params)
    impl.forward(layer, case.query, case.key, case.value, case.kv_cache, metadata, out)
    expected, _ = cases.run_attention(ops.paged_attention, case, variant="reference")
    torch.testing.assert_close(out[:97], expected[:97], atol=5e-3, rtol=5e-3)


@pytest.mark.parametrize("window", [0, 1, 20])
def test_xformers_is_called_like_flash_attention(monkeypatch, window: int) -> None:
    """Its own masks, attended in plain torch: it has no kernel for a CPU."""
    fmha = pytest.importorskip("xformers.ops.fmha")

    def attend(query, key, value, mask, scale):
        """query, key, value [1, T, groups, heads, D] -> the same, and the log-sum-exp [1, groups, heads, T]."""
        scores = torch.einsum("btghd,bkghd->bghtk", query.double(), key.double()) * scale
        scores += mask.materialize(scores.shape[-2:])
        out = torch.einsum("bghtk,bkghd->btghd", scores.softmax(-1), value.double())
        return out.to(query.dtype), scores.logsumexp(-1)

    monkeypatch.setattr(fmha, "memory_efficient_attention_partial", attend)
    g = torch.Generator().manual_seed(0)
    counts, lengths = torch.tensor([0, 3, 20, 30]), torch.tensor([0, 3, 70, 101])
    q = torch.randn(30, 6, 16, generator=g)
    k, v = (torch.randn(128, 2, 16, generator=g) for _ in range(2))
    for causal in (True, False) if window == 0 else (True,):
        found = []
        for call in (prefill.xformers_attention, flash_stand_in):
            out = torch.empty_like(q)
            _, lse = call(
                q=q, k=k, v=v, out=out, cu_seqlens_q=counts, cu_seqlens_k=lengths, max_seqlen_q=17, max_seqlen_k=67,
                softmax_scale=0.3, causal=causal, window_size=[window - 1, 0] if window else None,
                return_softmax_lse=True,
            )  # fmt: skip
            found.append((out, lse.float()))
        for ours, theirs in zip(*found, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_chunks_without_past_skip_the_pages(gpu_builder, monkeypatch) -> None:
    monkeypatch.setattr(ops, "gather_kv", None)
    case, common_metadata = chunked_case([(12, 1), (0, 20), (0, 30)])
    metadata = gpu_builder().build(0, common_metadata)
    assert not metadata.chunks.passes
    out = torch.empty_like(case.query)
    impl, layer = attention.WKVQuantImpl(8, 64, case.scale, 2), SimpleNamespace(wkv_params=case.params)
    impl.forward(layer, case.query, case.key, case.value, case.kv_cache, metadata, out)
    expected, _ = cases.run_attention(ops.paged_attention, case, variant="reference")
    torch.testing.assert_close(out[:51], expected[:51], atol=1e-3, rtol=1e-3)


def test_profiling_sees_the_memory_of_chunks() -> None:
    """Workspace, queries, output and results of two passes: that much is allocated, and more is not needed later."""
    sizes = []
    output = torch.zeros(300, 8, 64, dtype=torch.bfloat16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefill, "WORKSPACE", 1 << 20)
        new_empty = torch.Tensor.new_empty
        patch.setattr(torch.Tensor, "new_empty", lambda *a, **k: sizes.append(new_empty(*a, **k)) or sizes[-1])
        prefill.profile(output, 2)
        assert prefill.room(300, 2, 64) == 2048
        assert prefill.room(30000, 2, 64) >= 30000
    assert sum(x.nbytes for x in sizes) == (1 << 20) + 4 * output.nbytes


def test_steps_are_split_without_the_device() -> None:
    """Tensors of the meta device have no values: whoever asks for one fails."""
    lengths = [(3, 1), (5, 1), (9, 20), (0, 30)]
    _, common_metadata = chunked_case(lengths)
    for name in ("query_start_loc", "seq_lens", "block_table_tensor"):
        setattr(common_metadata, name, getattr(common_metadata, name).to("meta"))
    chunks = prefill.split_chunks(common_metadata, 16, flash_stand_in, 4096, 0)
    assert (chunks.first, chunks.num_tokens, chunks.num_seqs, chunks.max_query_len) == (2, 50, 2, 30)
    assert chunks.seq_lens.shape == (2,)
    assert chunks.query_start_loc.shape == (3,)
    (only,) = chunks.passes
    assert (only.seqs, only.rows, only.max_keys) == (slice(0, 2), slice(0, 50), 30)
    common_metadata.seq_lens_cpu_upper_bound = None  # lengths are not known: `ops.paged_attention` takes any
    assert prefill.split_chunks(common_metadata, 16, flash_stand_in, 4096, 0) is None


def test_decodes_and_drafts_are_no_chunks(gpu_builder) -> None:
    """vLLM puts short queries first, those with drafts among them however many they are, and captures them whole."""
    assert builder().reorder_batch_threshold is None
    assert gpu_builder().reorder_batch_threshold == 16
    assert gpu_builder(draft_tokens=3).reorder_batch_threshold == 16
    b = gpu_builder(draft_tokens=20)
    assert b.reorder_batch_threshold == 21
    _, common_metadata = chunked_case([(30, 21), (8, 21)])
    assert b.build(0, common_metadata).chunks is None


@pytest.mark.parametrize(("max_seqs", "planned"), [(2, 32), (5, 64)])
def test_most_work_is_checked_at_the_start(gpu_builder, monkeypatch, max_seqs: int, planned: int) -> None:
    """Of short queries: long ones are chunks. Where a step were refused, the engine would end."""
    checked = []
    planner = SimpleNamespace(check_steps=lambda *limits: checked.append(limits))
    monkeypatch.setattr(ops, "planner", lambda *args: planner)
    gpu_builder(max_seqs=max_seqs)
    assert checked == [(max_seqs, planned, 512)]


def test_no_flash_attention_on_a_cpu() -> None:
    assert prefill.flash_attention(64, torch.bfloat16) is None


# --- impl


@pytest.fixture
def impl(monkeypatch) -> attention.WKVQuantImpl:
    return attention.WKVQuantImpl(8, 64, 0.125, 4, sliding_window=-1)


def layer_with_params() -> SimpleNamespace:
    g = torch.Generator().manual_seed(1)
    tensors = {"k_smooth": torch.rand(4, 64, generator=g) + 0.5}
    tensors |= {p: torch.randn(4, 64, generator=g) for p in ("k_shift", "v_shift")}
    return SimpleNamespace(wkv_params=vllm_wkvquant.reference.KVParams.build(kv_config(), **tensors))


def run_step(impl, layer, cache, lengths, slots, seed, rows=None):
    """One forward of `lengths` (past, new); `rows` > tokens pads as a graph would."""
    g = torch.Generator().manual_seed(seed)
    rows = rows or sum(n for _, n in lengths)
    qkv = torch.randn(rows, 16 * 64, generator=g).bfloat16()
    q, k, v = (x.unflatten(-1, (-1, 64)) for x in qkv.split([512, 256, 256], -1))
    out = torch.full((rows, 8, 64), 7.0, dtype=torch.bfloat16)
    metadata = builder(64).build(0, common(lengths, slots))
    impl.forward(layer, q, k, v, cache, metadata, out)
    return out, (q, k, v)


def new_cache(fill: int = 255) -> torch.Tensor:
    return torch.full((8, 4, 32, layout.token_bytes(64)), fill, dtype=torch.uint8)


def test_forward_is_the_two_ops(impl) -> None:
    """Prefill, then decode: the reference ops, fed by hand, give the same pages and outputs."""
    layer, cache, by_hand = layer_with_params(), new_cache(), new_cache()
    for step, (past, n) in enumerate([(0, 20), (20, 1), (21, 4)]):
        slots = list(range(past, past + n))
        out, (q, k, v) = run_step(impl, layer, cache, [(past, n)], slots, step)
        expected = torch.empty_like(out)
        table, lens = torch.arange(8, dtype=torch.int32)[None], torch.tensor([past + n], dtype=torch.int32)
        starts = torch.tensor([0, n], dtype=torch.int32)
        args = (layer.wkv_params, 0.125, expected)
        ops.paged_attention(q, k, v, by_hand, table, lens, starts, *args, variant="reference")
        position = torch.tensor(slots)
        ops.cache_write(k, v, by_hand, position, position, layer.wkv_params, variant="reference")
        torch.testing.assert_close(out, expected, atol=2e-2, rtol=2e-2)
        keys = [layout.load(c, position, 64)[0][0].int() for c in (cache, by_hand)]
        # a code may sit on a rounding boundary
        assert (keys[0] - keys[1]).abs().max() <= 1


def test_stored_bytes_of_a_current_token_do_not_matter(impl) -> None:
    layer, cache = layer_with_params(), new_cache()
    run_step(impl, layer, cache, [(0, 20)], list(range(20)), 0)
    outs = []
    for garbage in (0, 255, 90):
        copy = cache.clone()
        copy[0, :, 20:] = garbage  # slots of the tokens to come share tiles and words with nothing of the past
        page = layout.PageLayout(64, 32)
        view = layout.pages(copy)
        original = layout.pages(cache)
        past = torch.arange(20)
        keep = torch.cat(
            [
                (page.k_word(past)[..., None] + torch.arange(4)).flatten(),
                (page.v_half(past)[..., None] + torch.arange(2)).flatten(),
                (page.k_meta + past[:, None] * 4 + torch.arange(4)).flatten(),
                (page.v_meta + past[:, None] * 4 + torch.arange(4)).flatten(),
            ]
        )
        view.fill_(garbage)
        view[:, :, keep] = original[:, :, keep]
        out, _ = run_step(impl, layer, copy, [(20, 3)], [20, 21, 22], 5)
        outs.append(out)
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])
    # and a byte of a past token does
    copy = cache.clone()
    layout.pages(copy)[0, :, 0] ^= 0x0F
    out, _ = run_step(impl, layer, copy, [(20, 3)], [20, 21, 22], 5)
    assert not torch.equal(outs[0], out)


def test_prefix_of_the_same_step_is_seen(impl) -> None:
    """vLLM lets a sequence hit blocks that another one of the same step computes: they are written before any read."""
    layer, cache = layer_with_params(), new_cache()
    slots = [*range(32), 64]  # the second sequence has the first one's block, and one token in a block of its own
    out, (q, k, v) = run_step(impl, layer, cache, [(0, 32), (32, 1)], slots, 0)
    expected, table = torch.empty_like(out), torch.tensor([[0, 2]], dtype=torch.int32)
    lens, starts = torch.tensor([33], dtype=torch.int32), torch.tensor([0, 1], dtype=torch.int32)
    ops.paged_attention(q[32:], k[32:], v[32:], cache, table, lens, starts, layer.wkv_params, 0.125, expected)
    torch.testing.assert_close(out[32], expected[0])


def test_padding_is_left_alone(impl) -> None:
    layer, cache = layer_with_params(), new_cache()
    out, _ = run_step(impl, layer, cache, [(0, 3)], [0, 1, 2, -1, -1], 0, rows=6)
    assert (out[3:] == 7).all()
    assert not (out[:3] == 7).all()
    alone = new_cache()
    run_step(impl, layer, alone, [(0, 3)], [0, 1, 2], 0, rows=6)
    assert torch.equal(cache, alone)


def test_sliding_window_counts_the_query(impl) -> None:
    """As in vLLM's backends, a window of W sees positions t - W + 1 .. t: with W = 1, a token sees itself alone."""
    windowed = attention.WKVQuantImpl(8, 64, 0.125, 4, sliding_window=1)
    layer, cache = layer_with_params(), new_cache()
    run_step(windowed, layer, cache, [(0, 20)], list(range(20)), 0)
    out, (_, _, v) = run_step(windowed, layer, cache, [(20, 2)], [20, 21], 1)
    torch.testing.assert_close(out, v.repeat_interleave(2, 1))
    assert impl.sliding_window == 0


def test_profiling_run_has_no_pages(impl, monkeypatch) -> None:
    """What a GPU's kernels allocate for good is allocated in it, before vLLM gives the rest to pages."""
    out, layer, reserved = torch.full((4, 8, 64), 7.0), layer_with_params(), []
    monkeypatch.setattr(ops, "reserve", reserved.append)
    assert not impl.forward(layer, out, out, out, torch.tensor([]), None, out).any()
    assert not reserved
    monkeypatch.setattr(ops, "default_variant", lambda device_type, head_size: "cuda")
    impl.forward(layer, out, out, out, torch.tensor([]), None, out)
    assert reserved == [layer.wkv_params]


def test_fused_output_quantization_is_refused(impl) -> None:
    with pytest.raises(NotImplementedError, match="fused output quantization"):
        impl.forward(None, None, None, None, None, None, torch.empty(1), output_scale=torch.ones(1))


def test_encoder_attention_and_head_sizes_are_refused() -> None:
    with pytest.raises(NotImplementedError, match="encoder_only attention is not supported"):
        attention.WKVQuantImpl(8, 64, 0.125, 4, attn_type=AttentionType.ENCODER_ONLY)
    with pytest.raises(ValueError, match=r"head size 72 is not supported; supported: \[64, 80, 96, 128, 256\]"):
        attention.WKVQuantImpl(8, 72, 0.125, 4)
