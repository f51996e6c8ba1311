"""Every variant of the two ops, on every instruction set of this machine, against the fp64 reference."""

import logging
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from cases import Case, make_case, make_params, run_attention
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_wkvquant import layout, native, ops, reference
from vllm_wkvquant.layout import HEAD_SIZES
from vllm_wkvquant.prepared import PreparedTables
from vllm_wkvquant.reference import KVParams

pytestmark = pytest.mark.skipif(not native.available(), reason="the compiled library is not built")

# Kernels round q' to 16 bits and p * scale to 15: of values around 1, that leaves errors of 3e-4 in practice.
OUT_BOUND, LSE_BOUND = 1e-3, 3e-4


def implementations(op: str) -> Iterator[tuple[str, Callable[..., None]]]:
    """(name, function) of every variant for the CPU but the specification, `cpp` once per instruction set."""
    for variant, function in ops.TABLE[op].items():
        if variant == "cpp":
            for isa in native.isas():
                with using(isa):
                    yield f"cpp/{isa}", function
        elif variant not in ("reference", *ops.CAPTURED):
            yield variant, function


@contextmanager
def using(isa: str) -> Iterator[None]:
    native.use_isa(isa)
    try:
        yield
    finally:
        native.use_isa(None)


def check(case: Case, out_bound: float = OUT_BOUND, lse_bound: float = LSE_BOUND, **options: int) -> None:
    """All variants: close to the fp64 reference, rounding of the output dtype aside; padded rows untouched."""
    tokens = int(case.query_start_loc[-1])
    wide = replace_query(case, case.query.double())
    expected, expected_lse = run_attention(reference.paged_attention, wide, **options)
    rounding = (expected[:tokens].to(case.query.dtype).double() - expected[:tokens]).abs().max() if tokens else 0
    for name, function in implementations("paged_attention"):
        out, lse = run_attention(function, case, **options)
        assert bool(out[tokens:].isnan().all()), name
        assert bool((lse[tokens:] == 7).all()), name
        if tokens:
            error = (out[:tokens].double() - expected[:tokens]).abs().max().item()
            assert error <= 2 * rounding + out_bound, (name, error)
            error = (lse[:tokens] - expected_lse[:tokens]).abs().max().item()
            assert error <= lse_bound, (name, error)


def replace_query(case: Case, query: torch.Tensor) -> Case:
    return replace(case, query=query)


# --- paged_attention ---


@pytest.mark.parametrize("head_size", HEAD_SIZES)
@pytest.mark.parametrize("group", [1, 3, 4, 7, 8, 16])
def test_decode_lengths(head_size: int, group: int) -> None:
    """One token a sequence; pasts around tiles, blocks and chunks; an empty sequence and one without past."""
    lengths = [(past, 1) for past in (0, 1, 15, 16, 17, 31, 32, 33, 127, 128, 129, 300)]
    lengths[3:3] = [(0, 0), (40, 0)]
    check(make_case(lengths, make_params(2, head_size), group=group, block_size=32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("block_size", [16, 48, 64, 128])
def test_dtypes_and_blocks(dtype: torch.dtype, block_size: int) -> None:
    """Decode, speculation and prefill in one batch."""
    params = make_params(2, 128)
    lengths = [(block_size - 1, 1), (block_size, 1), (200, 5), (0, 70), (block_size + 1, 33)]
    check(make_case(lengths, params, group=4, block_size=block_size, dtype=dtype))


def test_rounding_is_compensated() -> None:
    """Errors of the rounded operands meet centred quantities only: ten times less than without (5e-6 measured)."""
    case = make_case([(700, 1), (300, 2)], make_params(2, 128, kind="none"))
    expected, _ = run_attention(reference.paged_attention, replace_query(case, case.query.double()))
    for name, function in implementations("paged_attention"):
        out, _ = run_attention(function, case)
        assert (out[:3] - expected[:3]).square().mean().sqrt() < 2e-5, name


@pytest.mark.parametrize("query_len", range(2, 9))
def test_speculation(query_len: int) -> None:
    """Several query tokens a sequence, causal among themselves."""
    check(make_case([(250, query_len), (0, query_len), (17, query_len)], make_params(2, 64), group=4))


@pytest.mark.parametrize(("past", "query_len"), [(0, 1), (0, 16), (0, 17), (0, 200), (5, 64), (300, 65), (129, 130)])
@pytest.mark.parametrize("group", [1, 4, 7])
def test_prefill(past: int, query_len: int, group: int) -> None:
    """Whole prompts and later chunks of them, over several row blocks and key blocks."""
    check(make_case([(past, query_len)], make_params(1, 96), group=group))


@pytest.mark.parametrize("window", [1, 2, 16, 50, 128, 129, 1000])
def test_sliding_window(window: int) -> None:
    """Windows that end inside current tokens, inside a tile, inside a chunk, and beyond the sequence."""
    lengths = [(0, 3), (300, 1), (300, 6), (140, 40), (0, 150), (700, 1)]
    check(make_case(lengths, make_params(2, 64), group=2), sliding_window=window)


@pytest.mark.parametrize("group", [63, 64])
def test_many_query_heads_of_a_key_head(group: int) -> None:
    check(make_case([(70, 2), (0, 3)], make_params(1, 64), group=group))
    with pytest.raises(ValueError, match="64 query heads"):
        run_attention(native.paged_attention, make_case([(70, 2)], make_params(1, 64), group=group + 2))


@pytest.mark.parametrize("number", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_numbers_that_are_none_show(name: str, number: float) -> None:
    """A step's infinity or NaN makes the rows that see it NaN, as in the specification."""
    case = make_case([(50, 2), (30, 1)], make_params(1, 64))
    getattr(case, name)[0, 0, 3] = number
    expected = run_attention(reference.paged_attention, case)[0][:3].isfinite().all(-1)
    assert not expected.all()
    for variant, function in implementations("paged_attention"):
        assert torch.equal(run_attention(function, case)[0][:3].isfinite().all(-1), expected), variant


@pytest.mark.parametrize("kind", ["static", "none"])
@pytest.mark.parametrize("hadamard", [True, False])
@pytest.mark.parametrize("head_size", HEAD_SIZES)
def test_other_shifts(kind: str, hadamard: bool, head_size: int) -> None:
    """A shift that does not turn, or is none; keys with and without rotation."""
    params = make_params(2, head_size, kind=kind, hadamard=hadamard)
    check(make_case([(200, 1), (30, 4), (0, 20)], params, group=2))


@pytest.mark.parametrize("head_size", HEAD_SIZES)
@pytest.mark.parametrize("base", [1e4, 5e5])
def test_partial_rotary_and_scaling(head_size: int, base: float) -> None:
    """Half of the channels turn, with a factor on cos and sin (YaRN)."""
    params = make_params(2, head_size, rotary_dim=head_size // 2, base=base, scaling=1.3)
    check(make_case([(400, 1), (30, 4)], params, group=2))


def test_pairs_without_shift() -> None:
    """Pairs whose shift is zero in all heads leave the basis; one head's zero does not."""
    params = make_params(2, 128)
    params.k_shift[:, 3:40] = params.k_shift[:, 67:104] = 0
    params.k_shift[0, :3] = 0
    check(make_case([(400, 1), (30, 4)], params, group=2))


@pytest.mark.parametrize("base", [1e4, 1e6])
def test_large_shift(base: float) -> None:
    """Shifts of 200 make scores of several hundred: fp32 leaves 1e-3 of them."""
    params = make_params(2, 128, shift=200.0, base=base)
    check(make_case([(2000, 1), (515, 3)], params, group=4), out_bound=5e-3, lse_bound=2e-3)


def test_far_positions() -> None:
    """128k tokens of one head under a large shift: angles are as exact there as at position 0."""
    params = make_params(1, 128, shift=200.0, base=5e5)
    check(make_case([(131071, 1)], params, group=1, block_size=128), out_bound=5e-3, lse_bound=2e-3)


@settings(max_examples=25, deadline=None)
@given(
    head_size=st.sampled_from(HEAD_SIZES),
    heads=st.integers(1, 3),
    group=st.sampled_from([1, 2, 4, 5]),
    block_size=st.sampled_from([16, 32, 64]),
    lengths=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 40)), min_size=1, max_size=4),
    window=st.sampled_from([0, 0, 20, 200]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    seed=st.integers(0, 1000),
)
def test_ragged(
    head_size: int,
    heads: int,
    group: int,
    block_size: int,
    lengths: list[tuple[int, int]],
    window: int,
    dtype: torch.dtype,
    seed: int,
) -> None:
    """Anything."""
    params = make_params(heads, head_size, seed=seed)
    case = make_case(lengths, params, group=group, block_size=block_size, dtype=dtype, seed=seed)
    check(case, sliding_window=window)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_splits(threads: int) -> None:
    """One KV head and a long past: several items share a row and merge; more threads than cores too."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        params = make_params(1, 64)
        check(make_case([(6000, 2), (3, 1), (2049, 1)], params, group=2, block_size=64))
        check(make_case([(6000, 2)], params, group=2, block_size=64), sliding_window=3000)
    finally:
        torch.set_num_threads(before)


def test_current_tokens_do_not_come_from_the_page() -> None:
    """Bytes of the step's own slots change nothing, wherever they lie in a tile."""
    case = make_case([(37, 1), (16, 3), (0, 20)], make_params(2, 64))
    used = torch.zeros(case.kv_cache.shape[0] * 32, dtype=torch.bool)
    used[case.past_slots] = True
    spare = (~used).nonzero().flatten()
    for _, function in implementations("paged_attention"):
        first = run_attention(function, case)
        for seed in range(2):
            g = torch.Generator().manual_seed(seed)
            shape = (len(spare), 2)
            codes = torch.randint(0, 16, (*shape, 64), generator=g, dtype=torch.uint8)
            weird = torch.full(shape, math.nan if seed else -math.inf).half()
            layout.store(case.kv_cache, spare, (codes, weird, weird), (codes, weird, weird))
            again = run_attention(function, case)
            assert torch.equal(first[0][:24], again[0][:24])
            assert torch.equal(first[1][:24], again[1][:24])


def test_strided_arguments() -> None:
    """out, lse and block_table that are views, a cache with gaps between blocks."""
    case = make_case([(100, 1), (50, 3)], make_params(2, 64), group=2)
    expected, expected_lse = run_attention(reference.paged_attention, case)
    gaps = torch.full((len(case.kv_cache), 999 + case.kv_cache[0].numel()), 255, dtype=torch.uint8)
    gaps[:, : case.kv_cache[0].numel()] = case.kv_cache.flatten(1)
    cache = gaps[:, : case.kv_cache[0].numel()].unflatten(1, case.kv_cache.shape[1:])
    table = torch.cat([case.block_table, torch.full_like(case.block_table, -5)], 1)[:, : case.block_table.shape[1]]
    for name, function in implementations("paged_attention"):
        out = torch.full((len(case.query), 4, 3, 64), math.nan)[:, :, 1]
        lse = torch.zeros(4, len(case.query)).T
        function(
            *(case.query, case.key, case.value, cache, table, case.seq_lens, case.query_start_loc, case.params),
            *(case.scale, out, 0, lse),
        )
        assert (out[:4] - expected[:4]).abs().max() < OUT_BOUND, name
        assert (lse[:4] - expected_lse[:4]).abs().max() < LSE_BOUND, name
        assert bool(out[4:].isnan().all()), name


def test_no_sequences() -> None:
    """A batch of nothing is no error."""
    case = make_case([(0, 0)], make_params(1, 64))
    check(case)


# --- cache_write ---


def write_inputs(
    params: KVParams, positions: torch.Tensor, dtype: torch.dtype, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Roped keys and values, views into a fused tensor with two rows too many."""
    heads, head_size = params.k_smooth.shape
    g = torch.Generator().manual_seed(seed)
    tokens = len(positions)
    k = torch.randn(tokens, heads, head_size, generator=g) * params.k_smooth + reference.key_shift_at(positions, params)
    v = torch.randn(tokens, heads, head_size, generator=g) + params.v_shift
    fused = torch.full((tokens + 2, 3 * heads * head_size), math.nan, dtype=dtype)
    fused[:tokens, heads * head_size :] = torch.cat([k.flatten(1), v.flatten(1)], 1).to(dtype)
    _, key, value = fused.split(heads * head_size, 1)
    return key.unflatten(1, (heads, head_size)), value.unflatten(1, (heads, head_size))


@pytest.mark.parametrize("head_size", HEAD_SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["rotating", "partial", "static", "none"])
@pytest.mark.parametrize("order", ["runs", "shuffled"])
def test_cache_write(head_size: int, dtype: torch.dtype, kind: str, order: str) -> None:
    """Codes of the reference but for ties, scales and minima but for one fp16 step, and no other byte touched."""
    params = make_params(
        3, head_size, kind="rotating" if kind == "partial" else kind, rotary_dim=32 if kind == "partial" else None
    )
    tokens, blocks, block_size = 150, 6, 32
    g = torch.Generator().manual_seed(1)
    slots = torch.arange(tokens) + 7 if order == "runs" else torch.randperm(blocks * block_size, generator=g)[:tokens]
    slots[torch.tensor([0, 40, 41, 99])] = -1
    positions = torch.randint(0, 131072, (tokens,), generator=g)
    key, value = write_inputs(params, positions, dtype)
    before = torch.randint(0, 256, (blocks, 3, block_size, layout.token_bytes(head_size)), generator=g).byte()
    expected = before.clone()
    reference.cache_write(key, value, expected, slots, positions, params)
    everywhere = torch.arange(blocks * block_size)
    untouched = everywhere[~torch.isin(everywhere, slots)]
    kept = slots[slots >= 0]
    for name, function in implementations("cache_write"):
        cache = before.clone()
        function(key, value, cache, slots, positions, params)
        for got, want in zip(layout.load(cache, kept, head_size), layout.load(expected, kept, head_size), strict=True):
            difference = (got[0].int() - want[0].int()).abs()
            assert difference.max() <= 1, name
            assert (difference > 0).float().mean() <= 1e-3, name
            for a, b in zip(got[1:], want[1:], strict=True):
                step = torch.nextafter(b.abs(), torch.full_like(b, math.inf)) - b.abs()
                assert bool(((a.float() - b.float()).abs() <= step.float()).all()), name
        for got, want in zip(
            layout.load(cache, untouched, head_size), layout.load(before, untouched, head_size), strict=True
        ):
            for a, b in zip(got, want, strict=True):
                assert torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)), name


def test_cache_write_extremes() -> None:
    """Constant rows, rows beyond fp16, subnormal ranges and one token."""
    params = make_params(1, 64, kind="none", hadamard=False)
    params = replace(params, k_smooth=torch.ones(1, 64))
    rows = torch.stack(
        [
            torch.full((64,), 0.3),
            torch.linspace(-1e6, 1e6, 64),
            torch.linspace(0, 1e-7, 64),
            torch.linspace(1e5, 2e5, 64),
            torch.zeros(64),
        ]
    )[:, None]
    for tokens in (1, 5):
        slots, positions = torch.arange(tokens), torch.arange(tokens)
        expected = torch.zeros(1, 1, 16, layout.token_bytes(64), dtype=torch.uint8)
        reference.cache_write(rows[:tokens], -rows[:tokens], expected, slots, positions, params)
        for name, function in implementations("cache_write"):
            cache = torch.zeros_like(expected)
            function(rows[:tokens], -rows[:tokens], cache, slots, positions, params)
            assert torch.equal(cache, expected), name


def test_write_then_read() -> None:
    """What is written is what attention reads, by the kernels alone, against attention over `fake_quantize`."""
    params = make_params(2, 128)
    past = 200
    case = make_case([(past, 1)], params, group=2, block_size=32)
    positions = torch.arange(past)
    key, value = write_inputs(params, positions, torch.float32)
    k, v = reference.fake_quantize(key[:past], value[:past], positions, params)
    k, v = torch.cat([k, case.key[:1]]), torch.cat([v, case.value[:1]])
    scores = torch.einsum("hgd,khd->hgk", case.query[0].view(2, 2, 128), k) * case.scale
    expected = torch.einsum("hgk,khd->hgd", scores.softmax(-1), v).flatten(0, 1)
    for name, _ in implementations("paged_attention"):
        native.cache_write(key, value, case.kv_cache, case.past_slots, positions, params)
        out, _ = run_attention(native.paged_attention, case)
        assert (out[0] - expected).abs().max() < 2e-3, name


# --- arguments ---


def test_struct_sizes() -> None:
    """The ctypes mirrors have the size of the C structs."""
    import ctypes

    for i, struct in enumerate(native.STRUCTS):
        assert native.library().wkvquant_sizeof(i) == ctypes.sizeof(struct)


BAD_ATTENTION = {
    "query dtype": {"query": lambda c: c.query.double()},
    "query shape": {"query": lambda c: c.query[..., :32]},
    "key dtype": {"key": lambda c: c.key.half()},
    "key heads": {"key": lambda c: c.key[:, :1]},
    "value layout": {"value": lambda c: c.value.transpose(1, 2).contiguous().transpose(1, 2)[..., ::1].mT.mT[..., ::2]},
    "cache dtype": {"kv_cache": lambda c: c.kv_cache.char()},
    "cache bytes": {"kv_cache": lambda c: c.kv_cache[..., :-1]},
    "cache order": {"kv_cache": lambda c: c.kv_cache.transpose(1, 2).contiguous().transpose(1, 2)},
    "table dtype": {"block_table": lambda c: c.block_table.long()},
    "table rows": {"block_table": lambda c: c.block_table[:1]},
    "table block": {"block_table": lambda c: c.block_table + 1000},
    "table negative": {"block_table": lambda c: c.block_table - 1000},
    "table width": {"block_table": lambda c: c.block_table[:, :1]},
    "seq_lens dtype": {"seq_lens": lambda c: c.seq_lens.long()},
    "seq_lens short": {"seq_lens": lambda c: c.seq_lens - 1000},
    "starts short": {"query_start_loc": lambda c: c.query_start_loc[:-1]},
    "starts beyond": {"query_start_loc": lambda c: c.query_start_loc + 1000},
    "starts order": {"query_start_loc": lambda c: c.query_start_loc.flip(0).contiguous()},
}


@pytest.mark.parametrize("what", BAD_ATTENTION)
def test_bad_attention_arguments(what: str) -> None:
    """Each is a ValueError before anything is computed."""
    case = make_case([(100, 1), (50, 3)], make_params(2, 64), group=2)
    bad = replace(case, **{name: change(case) for name, change in BAD_ATTENTION[what].items()})
    with pytest.raises(ValueError, match=r"\w"):
        run_attention(native.paged_attention, bad)


def test_bad_write_arguments() -> None:
    """Each is a ValueError, and the cache stays as it was."""
    params = make_params(2, 64)
    positions = torch.arange(4)
    key, value = write_inputs(params, positions, torch.float32)
    cache = torch.zeros(2, 2, 16, layout.token_bytes(64), dtype=torch.uint8)
    good = {"key": key, "value": value, "kv_cache": cache, "slot_mapping": positions, "positions": positions}
    for change in (
        {"key": key[:3]},
        {"key": key.double()},
        {"value": value.half()},
        {"slot_mapping": positions.int()},
        {"slot_mapping": positions + 30},
        {"positions": positions[:3]},
        {"kv_cache": cache[:, :, :8]},
        {"params": replace(params, k_shift=params.k_shift[:, :32])},
        {"params": replace(params, k_smooth=params.k_smooth.double())},
        {"params": replace(params, rope_turns=params.rope_turns.int())},
    ):
        with pytest.raises(ValueError, match=r"\w"):
            native.cache_write(**{"params": params, **good, **change})
    assert not cache.any()


def test_tables_follow_their_params() -> None:
    """Prepared tables die with their KVParams; a new object at an old address gets its own."""
    native._prepared.clear()
    for seed in range(20):
        params = make_params(1, 64, seed=seed)
        check(make_case([(20, 1)], params, group=1))
    del params
    import gc

    gc.collect()
    assert not native._prepared


def test_tables_that_cannot_be_made_again_stay() -> None:
    """What is handed out has not been released; what it takes the place of has."""
    released: list[int] = []
    make = Mock(side_effect=[1, MemoryError, 2])
    params, tables = make_params(1, 64), PreparedTables(make, released.append)
    assert tables.of(params) == 1
    with pytest.raises(MemoryError):
        tables.make_again(params)
    assert (tables.of(params), released) == (1, [])
    tables.make_again(params)
    assert (tables.of(params), released) == (2, [1])


# --- choice of the variant ---


def run_python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **env}, capture_output=True, text=True, check=False
    )


def test_forced_isa() -> None:
    """WKVQUANT_CPU_ISA is obeyed; a name that nobody knows is an error that lists the known ones."""
    code = "from vllm_wkvquant import native; print(native.isa())"
    for isa in native.isas():
        assert run_python(code, WKVQUANT_CPU_ISA=isa).stdout.strip() == isa
    assert "unknown" in run_python(code, WKVQUANT_CPU_ISA="mmx").stderr
    with pytest.raises(ValueError, match="scalar"):
        native.use_isa("mmx")


def test_one_openmp_and_late_loading() -> None:
    """Importing the package loads nothing; the loaded library shares torch's OpenMP runtime."""
    code = """
import sys, vllm_wkvquant
assert "torch" not in sys.modules and "vllm" not in sys.modules
from vllm_wkvquant import native, ops
maps = lambda: open("/proc/self/maps").read()
assert native.LIBRARY.name not in maps()
native.library()
assert native.LIBRARY.name in maps()
print(len({line.split()[-1] for line in maps().splitlines() if "libgomp" in line or "libiomp" in line}))
"""
    result = run_python(code)
    assert result.stdout.strip() == "1", result.stderr


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({}, None),
        ({"LIBRARY": Path("nothing.so")}, "nothing.so is not built; run `pip install"),
        (
            {"LIBRARY": Path(__file__)},
            "invalid ELF header): rebuild it with `pip install",
        ),
        ({"STRUCTS": (native.Params, native.PagedAttention)}, "was built from another version: rebuild it with `pip"),
        (
            {"FUNCTIONS": native.FUNCTIONS | {"wkvquant_more": (None, [])}},
            "wkvquant_more): rebuild it with `pip install",
        ),
    ],
)
def test_default_variant(
    changed: dict, message: str | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """cpp where it is built from these sources; else the reference with one warning that says what to do."""
    monkeypatch.setattr(logging.getLogger("vllm.wkvquant"), "propagate", True)
    for name, value in changed.items():
        monkeypatch.setattr(native, name, value)
    for cached in (native.library, ops.default_variant):
        cached.cache_clear()
    with caplog.at_level(logging.WARNING, "vllm.wkvquant"):
        chosen = {ops.default_variant("cpu", 64) for _ in range(2)}
    for cached in (native.library, ops.default_variant):
        cached.cache_clear()
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    if message is None:
        assert (chosen, warnings) == ({"cpp"}, [])
    else:
        assert chosen == {"reference"}
        assert len(warnings) == 1
        assert message in warnings[0]


def run_setup(tmp_path: Path, *arguments: str, **env: str) -> str:
    """Standard error of a setup.py that must fail."""
    command = [sys.executable, "setup.py", *arguments]
    root = native.LIBRARY.parent.parent
    result = subprocess.run(
        command, env={**os.environ, **env}, cwd=root, capture_output=True, text=True, check=False, timeout=60
    )
    assert result.returncode != 0
    return result.stderr


def script(path: Path, output: str) -> str:
    path.write_text(f"#!/bin/sh\necho {output}\n")
    path.chmod(0o755)
    return str(path)


def test_setup_fails_loudly(tmp_path: Path) -> None:
    """A build that cannot do what it is asked for says so."""
    build = ("build_ext", "--build-temp", str(tmp_path / "temp"), "--build-lib", str(tmp_path / "lib"))
    assert "neither 0 nor 1" in run_setup(tmp_path, *build, WKVQUANT_CUDA="yes")
    assert "nvcc is not on PATH" in run_setup(tmp_path, *build, WKVQUANT_CUDA="1", PATH="/nowhere")
    missing = {"WKVQUANT_CUDA": "0", "CXX": "no-such-compiler"}
    assert "'no-such-compiler' not found" in run_setup(tmp_path, *build, **missing)
    old = {"WKVQUANT_CUDA": "0", "CXX": script(tmp_path / "old-g++", "9.4.0")}
    assert "9.4.0 is too old; g++ >= 11" in run_setup(tmp_path, *build, **old)
