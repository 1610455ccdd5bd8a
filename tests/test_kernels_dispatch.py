"""Which token travels in which row, against plain loops; the sum of a token's rows, against float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pithtrain.kernels import dispatch, lang

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
with_triton = pytest.mark.skipif(not lang.HAS_TRITON, reason="Triton is not installed")
gpu = pytest.mark.gpu


def by_loops(ids, own, ranks):
    """The definition, a visit at a time: counts, slots, rows, local ids."""
    rows, local, counts = [], [], []
    slots = [[-1] * ranks for _ in ids]
    for rank in range(ranks):
        before = len(rows)
        for token, experts in enumerate(ids):
            if any(e // own == rank for e in experts):
                slots[token][rank] = len(rows)
                rows.append(token)
                local.append([e - rank * own if e // own == rank else -1 for e in experts])
        counts.append(len(rows) - before)
    return counts, slots, rows, local


def compare(ids, own, ranks, block=16):
    """Reference, kernels and loops agree; the plan that is returned is the kernels'."""
    true = dispatch.reference_plan_rows(ids, own, ranks)
    counts, slots, rows, local = by_loops(ids.tolist(), own, ranks)
    assert true.counts.tolist() == counts and true.slots.tolist() == slots
    assert true.rows.tolist() == rows and true.local_ids.tolist() == local
    assert [t.dtype for t in true] == [torch.int64, torch.int32, torch.int64, torch.int64]
    if not lang.HAS_TRITON:
        return true
    plan = dispatch.triton_plan_rows(ids, own, ranks, block)
    longest = ids.shape[0] * min(ids.shape[1], ranks)
    assert plan.rows.shape == (longest,) and plan.local_ids.shape == (longest, ids.shape[1])
    cut = plan._replace(rows=plan.rows[: len(rows)], local_ids=plan.local_ids[: len(rows)])
    for name, a, b in zip(plan._fields, cut, true, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b), name
    return cut


def choice(tokens, experts, top_k, seed=0):
    """Distinct experts for each token, at random."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(tokens, experts, generator=generator).topk(top_k).indices.to(DEVICE)


@pytest.mark.parametrize(
    "tokens, top_k, own, ranks",
    [
        (0, 2, 2, 4),
        (1, 1, 1, 1),
        (1, 3, 2, 3),
        (16, 2, 4, 2),
        (37, 8, 16, 8),
        (65, 5, 2, 3),
        (50, 6, 4, 5),
        (33, 4, 1, 70),
    ],
)
def test_sizes(tokens, top_k, own, ranks):
    plan = compare(choice(tokens, own * ranks, top_k), own, ranks)
    assert plan.counts.sum() == len(plan.rows) <= tokens * min(top_k, ranks)


def test_many_blocks_are_added_up_in_steps():
    compare(choice(150, 300, 3), own=1, ranks=300, block=2)  # 75 blocks of 512 columns: ten steps of 8


@pytest.mark.parametrize("expert", [0, 5, 11])
def test_all_tokens_to_one_expert(expert):
    plan = compare(torch.full((41, 1), expert, device=DEVICE), 4, 3)
    assert plan.counts.tolist() == [41 if rank == expert // 4 else 0 for rank in range(3)]


def test_a_token_travels_once_to_a_rank():
    plan = compare(choice(29, 12, 12), 4, 3)
    assert plan.counts.tolist() == [29, 29, 29] and not (plan.local_ids >= 4).any()
    assert ((plan.local_ids >= 0).sum(dim=1) == 4).all()


def test_ids_of_32_bits_and_strided():
    ids = choice(40, 12, 4)
    for same in (ids.int(), ids.t().contiguous().t()):
        compare(same, 4, 3)


@with_triton
def test_rows_beyond_2_to_the_31_elements_are_added(unwritten):
    values = torch.empty(2**16 + 4, 2**15, dtype=torch.float16, device=DEVICE)
    P = len(values)
    slots = torch.tensor([[P - 1, 0], [-1, P - 2]], dtype=torch.int32, device=DEVICE)
    values[[P - 1, 0, P - 2]] = rows = torch.randn(3, 2**15, device=DEVICE).half()
    out = dispatch.triton_gather_sum(values, torch.empty(0), slots)
    torch.testing.assert_close(out, torch.stack([rows[0].float() + rows[1].float(), rows[2].float()]).half())


@with_triton
def test_wrong_dtype_is_named():
    with pytest.raises(TypeError, match=r"expert_ids is torch.float32"):
        dispatch.triton_plan_rows(torch.zeros(3, 2, device=DEVICE), 4, 2)
    for own, ranks in ((0, 2), (4, 0)):
        with pytest.raises(ValueError, match=f"experts_per_rank is {own} and ranks {ranks}; want at least 1"):
            dispatch.triton_plan_rows(torch.zeros(3, 2, device=DEVICE, dtype=torch.int64), own, ranks)
    with pytest.raises(TypeError, match=r"values is torch.float64"):
        slots = torch.zeros(3, 2, dtype=torch.int32, device=DEVICE)
        dispatch.triton_gather_sum(torch.zeros(3, 2, device=DEVICE, dtype=torch.float64), slots[:, 0], slots)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_choice(data):
    ranks, own = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 5))
    experts = list(range(ranks * own))
    liked = data.draw(st.lists(st.sampled_from(experts), min_size=1, unique=True))  # few liked: many empty ranks
    top_k = data.draw(st.integers(1, len(liked)))
    token = st.lists(st.sampled_from(liked), min_size=top_k, max_size=top_k, unique=True)
    ids = torch.tensor(data.draw(st.lists(token, min_size=1, max_size=40)), device=DEVICE)
    blocks = [2, 8, 16] if lang.INTERPRETED else [16, 64]  # Triton's compiler fails at a sum over two rows of one
    plan = compare(ids, own, ranks, block=data.draw(st.sampled_from(blocks)))
    assert int((plan.local_ids >= 0).sum()) == ids.numel()  # every pair is served exactly once
    values = torch.randn(len(plan.rows), data.draw(st.integers(1, 70)), device=DEVICE)
    sums(values, plan)


def sums(values, plan, limit=1e-6):
    """Both sums of rows against float64, in the dtype of the values."""
    true = dispatch.reference_gather_sum(values.double(), plan.rows, plan.slots)
    expected = torch.zeros_like(true)
    for row, token in enumerate(plan.rows.tolist()):
        expected[token] += values[row].double()
    assert torch.equal(true, expected)
    runs = [dispatch.reference_gather_sum] + [dispatch.triton_gather_sum] * lang.HAS_TRITON
    for run in runs:
        got = run(values, plan.rows, plan.slots)
        assert got.dtype == values.dtype and got.shape == true.shape
        # Triton's interpreter does not round to bfloat16 but cuts off, which is twice as far
        cut = 2 if lang.INTERPRETED and run is dispatch.triton_gather_sum and values.dtype == torch.bfloat16 else 1
        scale = max(true.norm(), values.double().norm())  # rows that cancel leave less than what is rounded
        assert (got.double() - true).norm() <= cut * limit * scale, run.__name__


@pytest.mark.parametrize("width", [1, 7, 512, 1024, 1300])
@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
def test_sums_of_any_width(width, dtype, limit):
    plan = dispatch.reference_plan_rows(choice(23, 20, 7), 2, 10)
    sums(torch.randn(len(plan.rows), width, device=DEVICE).to(dtype), plan, limit)


def test_bfloat16_rows_are_added_in_fp32():
    """256 + 1 is 256 in bfloat16: six ones after it would be lost if they were added one by one."""
    ids = torch.arange(7, device=DEVICE).view(1, 7)
    plan = dispatch.reference_plan_rows(ids, 1, 7)
    values = torch.tensor([256.0] + [1.0] * 6, device=DEVICE, dtype=torch.bfloat16).view(7, 1)
    for run in [dispatch.reference_gather_sum] + [dispatch.triton_gather_sum] * lang.HAS_TRITON:
        assert run(values, plan.rows, plan.slots).item() == 262


def test_a_token_without_rows_gets_zero():
    slots = torch.tensor([[-1, -1], [0, -1]], dtype=torch.int32, device=DEVICE)
    rows, values = torch.tensor([1], device=DEVICE), torch.ones(1, 3, device=DEVICE)
    for run in [dispatch.reference_gather_sum] + [dispatch.triton_gather_sum] * lang.HAS_TRITON:
        assert run(values, rows, slots).tolist() == [[0, 0, 0], [1, 1, 1]]
        assert run(values[:0], rows[:0], slots[:0]).shape == (0, 3)
        assert run(values[:0], rows[:0], slots[:1]).tolist() == [[0, 0, 0]]


@gpu
def test_gpu_full_size_waits_for_nobody_and_repeats():
    ids = choice(16384, 128, 8)
    dispatch.plan_rows(ids, 16, 8)
    torch.cuda.set_sync_debug_mode("error")
    try:
        plan = dispatch.plan_rows(ids, 16, 8)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    true = dispatch.reference_plan_rows(ids, 16, 8)
    P = len(true.rows)
    plan = plan._replace(rows=plan.rows[:P], local_ids=plan.local_ids[:P])
    assert all(torch.equal(a, b) for a, b in zip(plan, true, strict=True))
    values = torch.randn(P, 2048, device="cuda", dtype=torch.bfloat16)
    once = dispatch.gather_sum(values, plan.rows, plan.slots)
    assert all(torch.equal(once, dispatch.gather_sum(values, plan.rows, plan.slots)) for _ in range(5))
    true = dispatch.reference_gather_sum(values.double(), plan.rows, plan.slots)
    assert (once.double() - true).norm() < 4e-3 * true.norm()


@gpu
@pytest.mark.parametrize("tokens, top_k, own, ranks", [(16384, 8, 2, 64), (5000, 6, 1, 256), (777, 4, 11, 3)])
def test_gpu_sizes(tokens, top_k, own, ranks):
    ids = choice(tokens, own * ranks, top_k)
    plan, true = dispatch.plan_rows(ids, own, ranks), dispatch.reference_plan_rows(ids, own, ranks)
    assert torch.equal(plan.counts, true.counts) and torch.equal(plan.slots, true.slots)
    assert torch.equal(plan.rows[: len(true.rows)], true.rows)
    assert torch.equal(plan.local_ids[: len(true.rows)], true.local_ids)
