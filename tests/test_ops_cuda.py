"""The CUDA kernels against the specification: every head size, group, length and option that they take."""

import ctypes
import math
from dataclasses import fields, replace

import cases
import pytest
import torch

from vllm_wkvquant import layout, native_cuda, ops, reference

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
    pytest.mark.skipif(not native_cuda.available(), reason=f"{native_cuda.LIBRARY.name} is not built"),
]

VARIANT = "cuda"  # test_ops_triton.py runs these tests with another, in this place and for native_cuda
TOLERANCE = {torch.float32: 2e-3, torch.float16: 3e-3, torch.bfloat16: 2e-2}


def to_gpu(case: cases.Case) -> cases.Case:
    moved = {f.name: getattr(case, f.name) for f in fields(case)}
    return cases.Case(
        **{k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in moved.items()}
        | {"params": case.params.to("cuda")}
    )


def run(implementation, case: cases.Case, **options) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) on the CPU."""
    out = torch.full_like(case.query, math.nan)
    lse = torch.full(case.query.shape[:2], 7.0, device=case.query.device)
    implementation(
        case.query, case.key, case.value, case.kv_cache, case.block_table, case.seq_lens, case.query_start_loc,
        case.params, case.scale, out, lse=lse, **options,
    )  # fmt: skip
    return out.cpu(), lse.cpu()


def check(case: cases.Case, planner: native_cuda.Planner | None = None, lse_error: float = 8e-3, **options) -> None:
    """Ours equals the specification, and leaves padded rows alone."""
    case = to_gpu(case)
    tokens = int(case.query_start_loc[-1])
    plan = {} if planner is None else {"plan": plan_of(planner, case)}
    out, lse = run(native_cuda.paged_attention, case, **options, **plan)
    expected, expected_lse = run(reference.paged_attention, replace(case, query=case.query.double()), **options)
    assert out[tokens:].isnan().all()
    assert (lse[tokens:] == 7).all()
    error = (out[:tokens].double() - expected[:tokens]).norm() / expected[:tokens].norm()
    assert error < TOLERANCE[case.query.dtype]
    rounded = torch.finfo(case.query.dtype).eps / 2 * expected[:tokens].abs()
    assert ((out[:tokens].double() - expected[:tokens]).abs() < 8 * TOLERANCE[case.query.dtype] + rounded).all()
    # Shifts of these magnitudes are rounded to fp16: 5.5e-3 at most in thousands of rows. Keys rounded to bf16, as a
    # bf16 cache has them, make 2.5e-2.
    assert (lse[:tokens] - expected_lse[:tokens]).abs().max() < lse_error


@pytest.mark.parametrize("head_size", native_cuda.HEAD_SIZES)
@pytest.mark.parametrize("group", [1, 3, 4, 7, 8, 16])
def test_heads(head_size, group):
    params = cases.make_params(2, head_size)
    check(cases.make_case([(200, 1), (0, 1), (517, 1)], params, group=group, dtype=torch.bfloat16))


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("block_size", [16, 32, 48, 64, 128])
def test_page_boundaries(dtype, block_size):
    lengths = [0, 1, 15, 16, 17, 31, 32, 33, 47, 48, 63, 64, 65, 127, 128, 129, 255, 256, 257, 1000, 2047]
    case = cases.make_case([(n, 1) for n in lengths], cases.make_params(2, 128), block_size=block_size, dtype=dtype)
    check(case)


@pytest.mark.parametrize("kind", ["rotating", "static", "none"])
@pytest.mark.parametrize("hadamard", [True, False])
@pytest.mark.parametrize("head_size", native_cuda.HEAD_SIZES)
def test_parameters(kind, hadamard, head_size):
    params = cases.make_params(2, head_size, kind=kind, hadamard=hadamard)
    check(cases.make_case([(700, 1), (64, 2)], params, dtype=torch.float16))


@pytest.mark.parametrize(
    ("rotary_dim", "base", "scaling"), [(32, 1e4, 1.0), (64, 1e6, 1.0), (128, 5e5, 1.35), (8, 1e4, 1.0)]
)
def test_rotary(rotary_dim, base, scaling):
    params = cases.make_params(2, 128, rotary_dim=rotary_dim, base=base, scaling=scaling)
    check(cases.make_case([(900, 1), (3, 1)], params, dtype=torch.float16))


@pytest.mark.parametrize("hadamard", [True, False])
@pytest.mark.parametrize("group", [4, 8, 16])
def test_outliers_of_a_query(group, hadamard):
    """A row's numbers share a scale: one that is far larger leaves the others exact enough."""
    params = cases.make_params(2, 128, kind="none", hadamard=hadamard)
    case = cases.make_case([(300, 1), (64, 2)], params, group=group)
    case.query[:, :, 5] *= 30
    check(case, lse_error=2e-2)  # fp16 rounds an outlier of 90 by up to 2^-5, which a key of 4 multiplies: 1.1e-2


@pytest.mark.parametrize("query_len", [1, 2, 3, 5, 8, 9, 33, 130])
@pytest.mark.parametrize("group", [1, 4, 7])
def test_query_len(query_len, group):
    lengths = [(300, query_len), (0, query_len), (129, 1), (64, max(1, query_len - 1))]
    check(cases.make_case(lengths, cases.make_params(2, 128), group=group, dtype=torch.float16))


@pytest.mark.parametrize("window", [1, 2, 30, 128, 129, 400])
@pytest.mark.parametrize("query_len", [1, 4, 20])
def test_sliding_window(window, query_len):
    lengths = [(n, query_len) for n in (0, 5, 127, 128, 300, 1111)]
    check(cases.make_case(lengths, cases.make_params(2, 64), dtype=torch.float16), sliding_window=window)


@pytest.mark.parametrize("head_size", native_cuda.HEAD_SIZES)
@pytest.mark.parametrize("group", [1, 4, 8])
def test_heads_with_a_sliding_window(head_size, group):
    params = cases.make_params(2, head_size)
    case = cases.make_case([(0, 3), (70, 1), (300, 2), (1111, 5)], params, group=group, dtype=torch.bfloat16)
    check(case, sliding_window=90)


def run_gather(implementation, case: cases.Case, first: list[int], last: list[int]) -> tuple[torch.Tensor, ...]:
    """(keys, values) fp16 of positions first[i] .. last[i] - 1 of each sequence, and two rows that are nobody's."""
    device = case.query.device
    counts = torch.tensor([0] + [b - a for a, b in zip(first, last, strict=True)])
    rows = int(counts.sum())
    found = [torch.full((rows + 2, *case.key.shape[1:]), 7.0, dtype=torch.float16, device=device) for _ in range(2)]
    starts = counts.cumsum(0).int().to(device)
    implementation(
        case.key, case.value, case.kv_cache, case.block_table, case.seq_lens, case.query_start_loc,
        torch.tensor(first, dtype=torch.int32, device=device), starts, int(counts.max()), case.params, *found,
    )  # fmt: skip
    assert all((x[rows:] == 7).all() for x in found)
    return tuple(x[:rows].cpu() for x in found)


def check_gather(case: cases.Case, first: list[int] | None = None, last: list[int] | None = None) -> None:
    """Every number is the specification's, rounded to fp16."""
    case = to_gpu(case)
    ends = case.seq_lens.tolist()
    pieces = first or [0] * len(ends), last or ends
    found, expected = (run_gather(f, case, *pieces) for f in (native_cuda.gather_kv, reference.gather_kv))
    exact = 2e-5 * (1 + max(case.params.k_shift.abs().max(), case.params.k_smooth.abs().max()).item())
    for ours, theirs in zip(found, expected, strict=True):
        assert theirs.isfinite().all()
        assert ((ours.double() - theirs.double()).abs() <= 1e-3 * theirs.double().abs() + exact).all()
        assert (ours != theirs).double().mean() < 0.02  # numbers halfway between two


GATHERED = [(300, 40), (0, 20), (17, 33), (1, 1), (0, 0), (64, 0), (700, 65)]


@pytest.mark.parametrize("head_size", native_cuda.HEAD_SIZES)
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_gather(head_size, dtype):
    check_gather(cases.make_case(GATHERED, cases.make_params(3, head_size), group=2, dtype=dtype))


@pytest.mark.parametrize("block_size", [16, 48, 64])
def test_gather_pieces(block_size):
    """From inside the past to inside it, to the step's own tokens and to its end, and nothing."""
    case = cases.make_case(GATHERED, cases.make_params(2, 128), dtype=torch.float16, block_size=block_size)
    check_gather(case, first=[16, 0, 16, 0, 0, 64, 656], last=[80, 20, 50, 1, 0, 64, 710])
    check_gather(case, first=[288, 0, 0, 0, 0, 0, 0], last=[340, 3, 17, 2, 0, 64, 1])


@pytest.mark.parametrize("kind", ["rotating", "static", "none"])
@pytest.mark.parametrize("hadamard", [True, False])
@pytest.mark.parametrize("head_size", native_cuda.HEAD_SIZES)
def test_parameters_of_a_gather(kind, hadamard, head_size):
    params = cases.make_params(9, head_size, kind=kind, hadamard=hadamard)
    check_gather(cases.make_case([(100, 4), (33, 20)], params, group=1, dtype=torch.float16))


@pytest.mark.parametrize(
    ("rotary_dim", "base", "scaling"), [(32, 1e4, 1.0), (64, 1e6, 1.0), (128, 5e5, 1.35), (12, 1e4, 1.0)]
)
def test_rotary_of_a_gather(rotary_dim, base, scaling):
    params = cases.make_params(2, 128, shift=200.0, rotary_dim=rotary_dim, base=base, scaling=scaling)
    check_gather(cases.make_case([(900, 3), (3, 50)], params, dtype=torch.float16))


def test_gather_far_from_the_start():
    case = cases.make_case([(131071, 20)], cases.make_params(1, 128, base=5e5), group=1, dtype=torch.bfloat16)
    check_gather(case, first=[130800], last=[131091])


def test_gather_of_large_numbers():
    """fp16 has none of 1e5."""
    case = cases.make_case([(20, 5)], cases.make_params(1, 64), dtype=torch.bfloat16)
    case.key[:5] = 1e5
    keys, _ = run_gather(native_cuda.gather_kv, to_gpu(case), [0], [25])
    assert (keys[20:] == 65504).all()


@pytest.mark.parametrize("past", [8191, 131071])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_long_with_large_shift(past, dtype):
    """|shift| = 200 on every channel, positions up to 128k; scores reach hundreds."""
    params = cases.make_params(1, 128, shift=200.0, base=1e6)
    case = cases.make_case([(past, 1)], params, block_size=64, query_gain=0.3, dtype=dtype)
    check(case)


def test_score_of_the_shift():
    """One key far above the rest of a page: its score is the log-sum-exp, exact to 1e-3 at a magnitude of 800."""
    params = cases.make_params(1, 128, shift=200.0)
    case = cases.make_case([(4000, 1)], params, group=8, query_gain=2.0)
    lse = run(native_cuda.paged_attention, to_gpu(case))[1]
    expected = run(reference.paged_attention, replace(case, query=case.query.double()))[1]
    assert expected[:1].abs().max() > 300
    assert (lse[:1] - expected[:1]).abs().max() < 4e-3


@pytest.mark.parametrize("largest", [7000, 32000, 60000])
def test_large_values(largest):
    """A weight times a scale that fp16 has no number for leaves the mean of the values between them."""
    params = cases.make_params(1, 128, kind="none")
    case = cases.make_case([(1280, 1)], params)
    positions = torch.arange(1280)
    values = largest * (2 * torch.rand(1280, 1, 128, generator=torch.Generator().manual_seed(0)) - 1)
    rising = (positions // 32 % 2)[:, None, None] * torch.ones(1, 128) / 128
    case.query.fill_(1 / case.scale)
    case.key.zero_()
    case.value.zero_()
    reference.cache_write(rising, values, case.kv_cache, case.past_slots, positions, params)
    out = run(native_cuda.paged_attention, to_gpu(case))[0][:1]
    assert out.abs().max() < largest  # that of NaN is not
    if largest == 7000:
        expected = run(reference.paged_attention, replace(case, query=case.query.double()))[0][:1]
        assert (out.double() - expected).norm() < 2e-3 * expected.norm()


@pytest.mark.parametrize("group", [1, 2, 4, 8])
@pytest.mark.parametrize("kind", ["rotating", "none"])
def test_long(group, kind):
    """Many chunks a warp, and a second sequence whose warps have few units."""
    params = cases.make_params(2, 64, kind=kind)
    check(cases.make_case([(20011, 1), (97, 1)], params, group=group, dtype=torch.float16))


@pytest.mark.parametrize("count", [1, 3, 6, 20, 66, 132, 200, 264])
def test_equal_sequences(count):
    """Whole teams take an item, or teams take whole items, where that leaves out few."""
    check(cases.make_case([(700, 1)] * count, cases.make_params(2, 64), dtype=torch.float16))


@pytest.mark.parametrize(("heads", "parts"), [(8, 2), (8, 8), (8, 10), (8, 11), (8, 33), (32, 8), (2, 132)])
@pytest.mark.parametrize("group", [4, 8])
def test_parts_of_an_item(heads, parts, group):
    """They are left to the item's last team, many by way of every eighth, and the next call finds none of them.

    A team has 4 units of 32 tokens, as long as there are as many teams.
    """
    for seed in range(2):
        params = cases.make_params(heads, 128, shift=2.0 + seed)
        check(cases.make_case([(128 * parts, 1)], params, group=group, dtype=torch.float16, seed=seed))
    for workspace in native_cuda._workspaces.values():  # the last third is of such parts
        assert not workspace.partial[-(workspace.partial.numel() // 3) :].any()


@pytest.mark.parametrize("heads", [1, 3, 8])
def test_many_sequences(heads):
    """Half a CTA takes an item, or several."""
    g = torch.Generator().manual_seed(3)
    lengths = [(int(n), 1) for n in torch.randint(0, 400, (150,), generator=g)]
    check(cases.make_case(lengths, cases.make_params(heads, 64), dtype=torch.bfloat16, block_size=16))


def test_requests_without_tokens():
    """Padding requests of a captured batch have no query and any length."""
    case = cases.make_case([(100, 1), (40, 1)], cases.make_params(2, 64), dtype=torch.float16)
    case.seq_lens = torch.cat([case.seq_lens, torch.tensor([0, 9], dtype=torch.int32)])
    case.query_start_loc = torch.cat([case.query_start_loc, case.query_start_loc[-1:].repeat(2)])
    case.block_table = torch.cat([case.block_table, torch.full_like(case.block_table, -1)])
    check(case)


def test_repeats_bit_for_bit():
    case = to_gpu(cases.make_case([(3000, 1), (777, 1)], cases.make_params(4, 128), dtype=torch.float16))
    first = run(native_cuda.paged_attention, case)
    for _ in range(20):
        again = run(native_cuda.paged_attention, case)
        tokens = int(case.query_start_loc[-1])
        assert torch.equal(first[0][:tokens], again[0][:tokens])


@pytest.mark.parametrize(("query_len", "dtype"), [(1, torch.float16), (1, torch.bfloat16), (3, torch.bfloat16)])
def test_graph_replay(query_len, dtype):
    """A captured step, replayed with other lengths, tables, positions and inputs, equals the eager call."""
    params = cases.make_params(2, 128)
    small, large = (
        to_gpu(cases.make_case([(n, query_len) for n in lengths], params, dtype=dtype, seed=seed))
        for seed, lengths in enumerate([(20, 0, 90), (1500, 700, 31)])
    )
    tokens = 3 * query_len
    width, blocks = large.block_table.shape[1], large.kv_cache.shape[0]
    table = torch.zeros(3, width, dtype=torch.int32, device="cuda")
    cache = torch.zeros(blocks, *large.kv_cache.shape[1:], dtype=torch.uint8, device="cuda")
    names = ("query", "key", "value", "seq_lens", "query_start_loc")
    static = replace(
        small, **{n: getattr(small, n).clone() for n in names}, block_table=table, kv_cache=cache, params=large.params
    )
    out, lse = torch.empty_like(static.query), torch.empty(static.query.shape[:2], device="cuda")
    positions, slots = torch.zeros(2, tokens, dtype=torch.int64, device="cuda")

    def step() -> None:
        ops.paged_attention(
            static.query, static.key, static.value, cache, table, static.seq_lens, static.query_start_loc,
            static.params, static.scale, out, lse=lse, variant=VARIANT,
        )  # fmt: skip
        key, value = static.key[:tokens], static.value[:tokens]
        ops.cache_write(key, value, cache, slots, positions, static.params, variant=VARIANT)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            step()
    for case in (small, large, small):
        for name in names:
            getattr(static, name).copy_(getattr(case, name))
        table.zero_()
        table[:, : case.block_table.shape[1]] = case.block_table
        cache[: case.kv_cache.shape[0]] = case.kv_cache
        own = case.seq_lens[:, None] - query_len + torch.arange(query_len, device="cuda")
        positions.copy_(own.flatten())
        block_size = cache.shape[2]
        slots.copy_((table.long().gather(1, own // block_size) * block_size + own % block_size).flatten())
        before = cache.clone()
        out.fill_(math.nan)
        graph.replay()
        torch.cuda.synchronize()
        eager = replace(case, kv_cache=before, block_table=table, params=static.params)
        eager_out, eager_lse = run(native_cuda.paged_attention, eager)
        assert torch.equal(out[:tokens].cpu(), eager_out[:tokens])
        assert torch.equal(lse[:tokens].cpu(), eager_lse[:tokens])
        native_cuda.cache_write(case.key[:tokens], case.value[:tokens], before, slots, positions, static.params)
        assert torch.equal(before, cache)


def plan_of(planner: native_cuda.Planner, case: cases.Case, planned: int | None = None) -> native_cuda.Plan:
    """A plan of the first sequences, for a call with the tables of all."""
    planned = case.seq_lens.shape[0] if planned is None else planned
    return planner.plan(
        case.query_start_loc, case.seq_lens, planned, int(case.query_start_loc[planned]),
        case.block_table.shape[1] * case.kv_cache.shape[2],
    )  # fmt: skip


@pytest.mark.parametrize("query_len", [1, 3, 9])
def test_one_plan_serves_all_layers(query_len):
    """Also those whose tables of the shift leave room for fewer teams, and after another step."""
    first, second = (cases.make_params(2, 128, kind=kind) for kind in ("none", "rotating"))
    lengths = [(600, query_len), (0, query_len), (33, query_len), (0, 0), (257, max(1, query_len - 1))]
    layers = [cases.make_case(lengths, x, group=4, dtype=torch.float16) for x in (first, second)]
    planner = native_cuda.Planner([x.params.to("cuda") for x in layers], 8)
    check(cases.make_case([(90, 2), (5, 1)], first, group=4, dtype=torch.float16), planner)
    for case in layers:
        check(case, planner)
    case = to_gpu(layers[1])
    of_all = run(native_cuda.paged_attention, case)[0]
    out, _ = run(native_cuda.paged_attention, case, plan=plan_of(planner, case, 2))
    assert (out[: 2 * query_len] - of_all[: 2 * query_len]).abs().max() < 3e-3
    assert out[2 * query_len :].isnan().all()  # a plan of the first sequences leaves the others' rows alone


@pytest.mark.parametrize("seqs", [1, 40, 1100])
def test_positions(seqs):
    """As the specification has them, of more sequences and tokens than a CTA has threads, padding included."""
    generator = torch.Generator().manual_seed(seqs)
    counts = torch.randint(0, 5, (seqs,), generator=generator)
    counts[0] = 3
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]).int()
    seq_lens = (torch.randint(0, 9000, (seqs,), generator=generator) + counts).int()
    expected = torch.empty(int(starts[-1]) + 7, dtype=torch.int64)
    reference.token_positions(starts, seq_lens, torch.arange(len(expected)), expected)
    planner = native_cuda.Planner([cases.make_params(1, 64).to("cuda")], 1)
    found = torch.full_like(expected, -1).cuda()
    planner.plan(starts.cuda(), seq_lens.cuda(), seqs, int(starts[-1]), 1 << 20, found)
    assert torch.equal(found.cpu(), expected)


def test_more_sequences_than_threads():
    """More than the threads of the CTA that plans them, most without a past."""
    lengths = [((7 * i) % 61 if i % 5 == 0 else 0, i % 3) for i in range(1300)]
    check(cases.make_case(lengths, cases.make_params(1, 64), group=2, dtype=torch.float16))


def test_a_plan_that_does_not_fit_is_refused():
    case = to_gpu(cases.make_case([(40, 1), (9, 1)], cases.make_params(2, 64), group=2, dtype=torch.float16))
    planner = native_cuda.Planner([case.params], 4)
    plan = plan_of(planner, case)
    with pytest.raises(ValueError, match=r"layer that has .* 4, 16\)"):
        run(native_cuda.paged_attention, case, plan=plan, sliding_window=16)
    with pytest.raises(ValueError, match="does not fit a layer"):
        run(native_cuda.paged_attention, case, plan=replace(plan, num_heads=2))
    with pytest.raises(ValueError, match="2 sequences, 2 rows"):
        run(native_cuda.paged_attention, replace(case, query=case.query[:2]), plan=replace(plan, num_tokens=3))
    fewer = {n: getattr(case, n)[:k] for n, k in (("seq_lens", 1), ("query_start_loc", 2), ("block_table", 1))}
    with pytest.raises(ValueError, match="does not fit 1 sequences"):
        run(native_cuda.paged_attention, replace(case, **fewer), plan=plan)
    with pytest.raises(ValueError, match="block table of"):
        run(native_cuda.paged_attention, replace(case, block_table=case.block_table[:, :1]), plan=plan)
    with pytest.raises(ValueError, match="3 of 2 sequences"):
        planner.plan(case.query_start_loc, case.seq_lens, 3, 3, 64)
    with pytest.raises(ValueError, match="same heads"):
        native_cuda.Planner([case.params, cases.make_params(1, 64).to("cuda")], 4)
    with pytest.raises(ValueError, match="3 query heads"):
        native_cuda.Planner([case.params], 3)


def test_work_that_cannot_be_counted_is_refused():
    """What is just less is planned as it is."""
    planner = native_cuda.Planner([cases.make_params(8, 128).to("cuda")], 64)
    tokens, items = 16384, 8 * 16384 * 8 // 16
    units = (1 << 31) // items - 1 - native_cuda.ITEM_WEIGHT

    def plan(past: int) -> None:
        starts, seq_lens = (torch.tensor(x, dtype=torch.int32).cuda() for x in ([0, tokens], [past + tokens]))
        planner.plan(starts, seq_lens, 1, tokens, past)

    planner.check_steps(1, tokens, 32 * units)
    plan(32 * units)
    assert planner.tensor[:4].view(torch.int32).item() == units * items
    with pytest.raises(ValueError, match=r"16384 tokens .* lower --max-num-seqs, --max-num-batched-tokens"):
        plan(32 * units + 1)
    with pytest.raises(ValueError, match=r"16384 tokens .* lower --max-num-seqs, --max-num-batched-tokens"):
        planner.check_steps(1, tokens, 32 * units + 1)


@pytest.mark.parametrize("window", [0, 1, 34, 66])
@pytest.mark.parametrize(("head_size", "group"), [(64, 1), (128, 3), (128, 8), (256, 7)])
def test_work_is_bounded(window, head_size, group):
    """No plan's line, teams * each + more, is longer than what is thought to be the most."""
    planner = native_cuda.Planner([cases.make_params(2, head_size).to("cuda")], 2 * group, window)
    for lengths in ([(97, 1)] * 40, [(95, 3), (0, 9), (64, 0), (97, 1)], [(2000, 700)], [(0, 2)], [(3000, 1)] * 3):
        pasts, counts = (torch.tensor(x) for x in zip(*lengths, strict=True))
        starts = torch.cat([torch.zeros(1), counts.cumsum(0)]).int()
        call = len(lengths), int(starts[-1]), int(pasts.max())
        plan = planner.plan(starts.cuda(), (pasts + counts).int().cuda(), *call)
        _, _, teams, _, each, more = planner.tensor[:24].view(torch.int32).tolist()
        assert 0 < teams * each + more <= planner._most_work(*call, plan.queries)


def test_attention_that_overlaps_the_write_reads_what_it_wrote():
    """A past that the write before the attention stores, a write of many tokens in a graph of many such steps."""
    case = to_gpu(
        cases.make_case([(4000, 1), (3000, 1)], cases.make_params(2, 128), dtype=torch.float16, block_size=64)
    )
    tokens = case.past_slots.shape[0]
    key, value = torch.randn(2, tokens, 2, 128, device="cuda").half()
    keys = key, -key
    positions = torch.cat([torch.arange(4000), torch.arange(3000)]).cuda()
    cache = torch.empty_like(case.kv_cache)
    outs = torch.empty(30, *case.query.shape, dtype=torch.float16, device="cuda")

    def step(out: torch.Tensor, key: torch.Tensor, after_write: bool) -> None:
        cache.fill_(255)
        ops.cache_write(key, value, cache, case.past_slots, positions, case.params, variant=VARIANT)
        ops.paged_attention(
            case.query, case.key, case.value, cache, case.block_table, case.seq_lens, case.query_start_loc,
            case.params, case.scale, out, variant=VARIANT, after_write=after_write,
        )  # fmt: skip

    expected = torch.empty_like(outs[:2])
    for i in range(2):
        step(expected[i], keys[i], after_write=False)
    native_cuda.reserve(case.params, 2)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i, out in enumerate(outs):
            step(out, keys[i % 2], after_write=True)
    for _ in range(5):
        outs.fill_(math.nan)
        graph.replay()
        rows = int(case.query_start_loc[-1])
        assert torch.equal(outs[0::2, :rows], expected[None, 0, :rows].expand(15, -1, -1, -1))
        assert torch.equal(outs[1::2, :rows], expected[None, 1, :rows].expand(15, -1, -1, -1))
    assert not torch.equal(expected[0, :rows], expected[1, :rows])


def test_graphs_of_a_stream_that_never_ran():
    """vLLM warms up on one stream and captures on another; the order of replays is not that of captures."""
    params = cases.make_params(2, 128).to("cuda")
    ops.reserve(params, max_seqs=8)
    captured = []
    for lengths in ([(1500, 1), (700, 1)], [(900, 1), (0, 1)]):
        case = replace(to_gpu(cases.make_case(lengths, params.to("cpu"), dtype=torch.float16)), params=params)
        out = torch.full_like(case.query, math.nan)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            native_cuda.paged_attention(
                case.query, case.key, case.value, case.kv_cache, case.block_table, case.seq_lens, case.query_start_loc,
                case.params, case.scale, out,
            )  # fmt: skip
        captured.append((graph, case, out))
    for graph, case, out in [captured[i] for i in (1, 0, 1)]:
        out.fill_(math.nan)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out[:2].cpu(), run(native_cuda.paged_attention, case)[0][:2])


def test_renewed_tables():
    """Other numbers where a graph finds the first ones."""
    case = to_gpu(cases.make_case([(90, 2), (5, 1)], cases.make_params(2, 64), dtype=torch.float16))
    run(native_cuda.paged_attention, case)
    tables = native_cuda.prepare(case.params)
    ops.renew(case.params, cases.make_params(2, 64, seed=1))
    assert native_cuda.prepare(case.params) is tables
    out, _ = run(native_cuda.paged_attention, case)
    expected, _ = run(reference.paged_attention, replace(case, query=case.query.double()))
    assert (out[:3] - expected[:3]).norm() / expected[:3].norm() < TOLERANCE[torch.float16]


def test_tables_of_another_shape_are_refused():
    params = cases.make_params(2, 64).to("cuda")
    native_cuda.prepare(params)
    smooth = params.k_smooth.clone()
    with pytest.raises(ValueError, match="other rotary pairs"):
        ops.renew(params, replace(params, k_smooth=2 * smooth, k_shift=torch.zeros_like(params.k_shift)))
    assert torch.equal(params.k_smooth, smooth)


def test_capture_without_a_reserved_workspace_is_refused(monkeypatch):
    case = to_gpu(cases.make_case([(20, 1)], cases.make_params(1, 64)))
    native_cuda.prepare(case.params)
    monkeypatch.setattr(native_cuda, "_spares", {})
    monkeypatch.setattr(native_cuda, "_workspaces", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="reserve"):
        run(native_cuda.paged_attention, case)


@pytest.mark.parametrize("head_size", native_cuda.HEAD_SIZES)
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("hadamard", [True, False])
def test_cache_write(head_size, dtype, hadamard):
    """Codes differ from the specification's by rounding of ties at most, scales by a unit in the last place."""
    heads, tokens, block_size = 3, 333, 32
    params = cases.make_params(heads, head_size, shift=20.0, hadamard=hadamard)
    g = torch.Generator().manual_seed(5)
    positions = torch.randint(0, 131072, (tokens,), generator=g)
    fused = torch.randn(tokens + 2, 2 * heads * head_size + 8, generator=g)
    key = fused[:, : heads * head_size].unflatten(-1, (heads, head_size))
    key[:tokens] += reference.key_shift_at(positions, params)
    fused = fused.to(dtype)
    key = fused[:, : heads * head_size].unflatten(-1, (heads, head_size))
    value = fused[:, heads * head_size : 2 * heads * head_size].unflatten(-1, (heads, head_size))
    slots = torch.randperm(16 * block_size, generator=g)[:tokens]
    slots[::7] = -1
    shape = (16, heads, block_size, layout.token_bytes(head_size))
    expected = torch.full(shape, 170, dtype=torch.uint8)
    seen = expected.cuda()
    reference.cache_write(key, value, expected, slots, positions, params)
    fused_gpu = fused.cuda()
    gpu_key = fused_gpu[:, : heads * head_size].unflatten(-1, (heads, head_size))
    gpu_value = fused_gpu[:, heads * head_size : 2 * heads * head_size].unflatten(-1, (heads, head_size))
    native_cuda.cache_write(gpu_key, gpu_value, seen, slots.cuda(), positions.cuda(), params.to("cuda"))
    seen = seen.cpu()
    kept = slots[slots >= 0]
    untouched = torch.ones(16 * block_size, dtype=torch.bool)
    untouched[kept] = False
    for ours, theirs in zip(
        layout.load(seen, untouched.nonzero()[:, 0], head_size),
        layout.load(expected, untouched.nonzero()[:, 0], head_size),
        strict=True,
    ):
        assert all(
            torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
            for a, b in zip(ours, theirs, strict=True)
        )
    for ours, theirs in zip(layout.load(seen, kept, head_size), layout.load(expected, kept, head_size), strict=True):
        different = (ours[0].int() - theirs[0].int()).abs()
        assert different.max() <= 1
        assert different.float().mean() < 5e-3
        for a, b in zip(ours[1:], theirs[1:], strict=True):
            assert (a.double() - b.double()).abs().max() <= 2e-3 * b.double().abs().max()


def test_refusals():
    params = cases.make_params(2, 80)
    case = to_gpu(cases.make_case([(20, 1)], params))
    with pytest.raises(ValueError, match="head size 80"):
        run(native_cuda.paged_attention, case)
    case = to_gpu(cases.make_case([(20, 1)], cases.make_params(2, 64)))
    with pytest.raises(ValueError, match="kv_cache must be"):
        run(native_cuda.paged_attention, replace(case, kv_cache=case.kv_cache.cpu()))


def test_rows_far_apart_are_refused():
    case = to_gpu(cases.make_case([(20, 1)], cases.make_params(2, 64)))
    for name in ("query", "key", "value", "block_table"):
        one = getattr(case, name)[:1]
        far = one.as_strided(one.shape, (1 << 30, *one.stride()[1:]))
        with pytest.raises(ValueError, match=rf"^{name} must .* less than 2\^30 apart"):
            run(native_cuda.paged_attention, replace(case, **{name: far}))
    check(case)


def test_structs_and_default():
    lib = native_cuda.library()
    for i, struct in enumerate(native_cuda.STRUCTS):
        assert lib.wkvquant_cuda_sizeof(i) == ctypes.sizeof(struct)
    assert ops.default_variant("cuda", 128) == "cuda"
    assert ops.default_variant("cuda", 80) == ("reference" if ops.native_triton is None else "triton")
