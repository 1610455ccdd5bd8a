"""Pieces cover exactly what a query may see; their results and gradients against the matrix written out."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pithtrain.kernels import attention
from pithtrain.kernels.attention import AttendPieces, attend_piece, flash_fits, merge, pieces


def visible(rows, length, window, documents):
    """(rows, length, length) bool, from the definition."""
    position = torch.arange(length)
    distance = position[:, None] - position
    seen = ((distance >= 0) & (distance < (window or length))).expand(rows, -1, -1)
    if documents is None:
        return seen
    document = torch.bucketize(torch.arange(rows * length), documents, right=True).view(rows, length)
    return seen & (document[:, :, None] == document[:, None, :])


def seen_by(piece, rows, queries, keys, exact):
    """How often each query at hand sees each key at hand, by the meaning of `Piece`."""
    count = torch.zeros(rows, queries, keys, dtype=torch.int)
    rectangle = count[piece.rows, piece.queries, piece.keys]
    batch, s, n = rectangle.shape
    if piece.cuts is None:
        ahead = torch.arange(n) - (torch.arange(s)[:, None] + n - s)
        sees = ((piece.right < 0) | (ahead <= piece.right)) & ((piece.left < 0) | (-ahead <= piece.left))
        rectangle += sees
        assert sees.any(dim=1).all()
        if exact:  # FlashAttention takes a number above L, or -1 beside a limit, for L
            assert piece.right in (-1, 0) and (piece.left < 0 or piece.right == 0 or s <= n)
    else:
        assert s == n and piece.right == 0
        rectangle += visible(batch, s, piece.left + 1 if piece.left >= 0 else None, piece.cuts)
    return count


@st.composite
def geometries(draw):
    rows, length = draw(st.integers(1, 2)), draw(st.integers(1, 16))
    window = draw(st.none() | st.integers(1, length + 2))
    cuts = draw(st.none() | st.sets(st.integers(0, rows * length)))
    documents = None if cuts is None else torch.tensor(sorted(cuts | set(range(0, rows * length + 1, length))))

    def runs():
        edges = sorted({0, length} | draw(st.sets(st.integers(0, length), max_size=4)))
        return draw(st.permutations([range(a, b) for a, b in pairwise(edges)]))

    queries = runs()
    keys = queries if draw(st.booleans()) else runs()
    return rows, length, window, documents, queries, keys, draw(st.none() | st.integers(1, 20))


@settings(max_examples=300, deadline=None)
@given(geometries())
def test_pieces_cover_what_is_seen_once(geometry):
    rows, length, window, documents, queries, keys, tile = geometry
    found = pieces(queries, keys, rows, length, window, documents, tile)
    exact = tile is None and queries == keys
    count = torch.zeros(rows, length, length, dtype=torch.int)
    for piece in found:
        count += seen_by(piece, rows, length, length, exact)
    order = [torch.tensor([p for run in runs for p in run]) for runs in (queries, keys)]
    true = visible(rows, length, window, documents)[:, order[0][:, None], order[1]]
    assert torch.equal(count, true.int())


@settings(max_examples=300, deadline=None)
@given(geometries())
def test_merged_pieces_are_the_whole(geometry):
    rows, length, window, documents, queries, keys, tile = geometry
    torch.manual_seed(torch.initial_seed())  # the test's, for each example
    q, k, v = (torch.randn(rows, 2, length, 3, dtype=torch.float64) for _ in range(3))
    mine, theirs = (torch.tensor([p for run in runs for p in run]) for runs in (queries, keys))
    out, lse = torch.zeros_like(q), torch.full(q.shape[:3], -torch.inf, dtype=torch.float64)
    for piece in pieces(queries, keys, rows, length, window, documents, tile or 7):
        merge(out, lse, piece, *attend_piece(q[:, :, mine], k[:, :, theirs], v[:, :, theirs], 0.5, piece))
    true = reference(q, k, v, 0.5, visible(rows, length, window, documents), None)
    torch.testing.assert_close(out, true[:, :, mine])


def test_what_is_out_of_sight_costs_nothing():
    assert pieces([range(4)], [range(4, 8)], 1, 8) == []  # the future
    assert pieces([range(8, 12)], [range(0, 4)], 1, 12, window=5) == []
    assert len(pieces([range(8, 12)], [range(0, 4)], 1, 12, window=6)) == 1
    assert pieces([range(4, 8)], [range(4)], 1, 8, documents=torch.tensor([0, 4, 8])) == []
    (piece,) = pieces([range(1000)], [range(1000)], 2, 1000, documents=torch.tensor([0, 10, 1000, 1500, 2000]))
    assert piece.cuts.tolist() == [0, 10, 1000, 1500, 2000]


@pytest.mark.parametrize("documents", [[1, 8], [0, 9], [0, 7], []])
def test_wrong_boundaries_are_refused(documents):
    with pytest.raises(ValueError, match=r"documents: boundaries (go from . to .|are missing); want 0 to 2 x 4 tokens"):
        pieces([range(4)], [range(4)], 2, 4, documents=torch.tensor(documents))


@pytest.mark.parametrize("documents", [[0, 8], [0, 5, 8], [0, 4, 6, 5, 8]])
def test_boundaries_ascend_and_one_stands_before_each_row(documents):
    with pytest.raises(ValueError, match="documents: boundaries must ascend, and one must stand before each row of 4"):
        pieces([range(4)], [range(4)], 2, 4, documents=torch.tensor(documents))


def test_documents_in_one_piece_are_refused_where_they_would_be_ignored():
    q = torch.randn(1, 2, 8, 16)
    cut = pieces([range(8)], [range(8)], 1, 8, documents=torch.tensor([0, 3, 8]))
    with pytest.raises(ValueError, match="a piece of several documents is for FlashAttention, not torch"):
        AttendPieces.apply(q, q, q, None, 0.25, cut)


def test_a_window_without_a_key_is_refused():
    with pytest.raises(ValueError, match="window: is 0; want at least 1"):
        pieces([range(4)], [range(4)], 2, 4, window=0)


@pytest.mark.parametrize(
    "change, message",
    [
        ({0: lambda t: t.long()}, "q is torch.int64; want one of torch.float64"),
        ({1: lambda t: t.half()}, "k is torch.float16; want one of torch.float32"),
        ({1: lambda t: t[..., :3]}, r"k has shape \(1, 2, 4, 3\); want \(1, any, any, 8\)"),
        ({2: lambda t: t[:, :1]}, r"v has shape \(1, 1, 4, 8\); want \(1, 2, 4, any\)"),
        ({2: lambda t: t.to("meta")}, "v is on meta; want cpu"),
        ({0: lambda t: t[:, :3]}, "k has 2 heads, which do not divide the 3 of q"),
        ({3: lambda t: t[:2]}, r"sinks has shape \(2,\); want \(4,\)"),
    ],
)
def test_wrong_arguments_are_named_in_one_line(change, message):
    args = [torch.randn(1, heads, 4, 8) for heads in (4, 2, 2)] + [torch.randn(4)]
    for i, make in change.items():
        args[i] = make(args[i])
    with pytest.raises((TypeError, ValueError), match=message):
        AttendPieces.apply(*args, 0.5, pieces([range(4)], [range(4)], 1, 4))


def reference(q, k, v, scale, seen, sinks):
    group = q.shape[1] // k.shape[1]
    scores = (q @ k.repeat_interleave(group, dim=1).mT * scale).masked_fill(~seen.unsqueeze(1), -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], dim=-1)
    return scores.softmax(dim=-1)[..., : k.shape[2]] @ v.repeat_interleave(group, dim=1)


def error(a, b):
    assert a.isfinite().all()
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


CASES = [
    dict(window=window, documents=documents, sinks=sinks)
    for window in (None, 1, 9, 40)
    for documents in (None, torch.tensor([0, 17, 33, 34, 66]))
    for sinks in (False, True)
]


@pytest.mark.parametrize(
    "case", CASES, ids=lambda case: f"{case['window']}-{case['documents'] is not None}-{case['sinks']}"
)
@pytest.mark.parametrize(
    "device, dtype",
    [("cpu", torch.float32), ("cpu", torch.bfloat16), pytest.param("cuda", torch.bfloat16, marks=pytest.mark.gpu)],
)
@pytest.mark.parametrize("kv_heads, wide", [(6, 16), (2, 8), (1, 16)])
def test_values_and_gradients(case, device, dtype, kv_heads, wide):
    shapes = (2, 6, 33, 16), (2, kv_heads, 33, 16), (2, kv_heads, 33, wide), (6,)
    inputs = [torch.randn(shape, device=device).to(dtype).requires_grad_() for shape in shapes]
    if not case["sinks"]:
        inputs[3] = None
    tile = None if flash_fits(inputs[0], wide) else 10
    assert (tile is None) == (device == "cuda")
    cut = pieces([range(33)], [range(33)], 2, 33, case["window"], case["documents"], tile)
    upstream = torch.randn(2, 6, 33, wide, device=device).to(dtype)
    doubles = [x if x is None else x.detach().double().requires_grad_() for x in inputs]
    seen = visible(2, 33, case["window"], case["documents"]).to(device)
    true = reference(*doubles[:3], 0.25, seen, doubles[3])
    got = AttendPieces.apply(*inputs, 0.25, cut)
    assert got.dtype == dtype
    limit = 2e-6 if dtype == torch.float32 else 1e-2
    assert error(got, true) < limit
    leaves = [i for i in range(4) if inputs[i] is not None]
    got_grads = torch.autograd.grad(got, [inputs[i] for i in leaves], upstream)
    true_grads = torch.autograd.grad(true, [doubles[i] for i in leaves], upstream.double())
    for i, a, b in zip(leaves, got_grads, true_grads, strict=True):
        if i == 3 and dtype == torch.bfloat16:
            limit = 2e-2  # a sink's gradient is one sum of products of either sign, each rounded
        if case["window"] == 1 and not case["sinks"] and not b.norm() > 1e-9:
            assert a.abs().max() < 0.05  # one key: its share is 1 whatever the score
        else:
            assert error(a, b) < limit


@pytest.mark.gpu
@pytest.mark.parametrize("flash_4", [False, True])
@pytest.mark.parametrize(
    "window, documents",
    [(None, False), (100, False), (None, True), (100, True)],
    ids=["causal", "window", "docs", "both"],
)
@pytest.mark.parametrize(
    "heads, kv_heads, features, wide", [(8, 2, 128, 128), (4, 4, 192, 128), (8, 1, 64, 64), (4, 1, 256, 256)]
)
def test_gpu_sizes_of_models(flash_4, window, documents, heads, kv_heads, features, wide, monkeypatch):
    if flash_4 and attention.installed_flash_attention_4() is None:
        pytest.skip("FlashAttention-4 is not installed")
    if not flash_4:
        monkeypatch.setattr(attention, "installed_flash_attention_4", lambda: None)
    length = 1000
    shapes = (2, heads, length, features), (2, kv_heads, length, features), (2, kv_heads, length, wide)
    inputs = [torch.randn(shape, device="cuda", dtype=torch.bfloat16).requires_grad_() for shape in shapes]
    cuts = torch.tensor([0, 1, 17, 700, 1000, 1128, 2000]) if documents else None
    cut = pieces([range(length)], [range(length)], 2, length, window, cuts)
    doubles = [x.detach().double().requires_grad_() for x in inputs]
    true = reference(*doubles, 0.1, visible(2, length, window, cuts).to("cuda"), None)
    upstream = torch.randn(2, heads, length, wide, device="cuda", dtype=torch.bfloat16)
    got = AttendPieces.apply(*inputs, None, 0.1, cut)
    assert error(got, true) < 1e-2
    got_grads = torch.autograd.grad(got, inputs, upstream)
    for a, b in zip(got_grads, torch.autograd.grad(true, doubles, upstream.double()), strict=True):
        assert error(a, b) < 1e-2


@pytest.mark.parametrize(
    "window, documents, told",
    [
        (None, None, (True, None, 0, None, 8)),
        (4, None, (False, 3, 0, None, 8)),
        (None, [0, 3, 8, 16], (True, None, 0, [0, 3, 8, 16], 8)),
        (4, [0, 3, 8, 16], (False, 3, 0, [0, 3, 8, 16], 8)),
    ],
)
def test_what_flash_attention_4_is_told(window, documents, told):
    q = torch.zeros(2, 4, 8, 16)
    documents = None if documents is None else torch.tensor(documents)
    (piece,) = pieces([range(8)], [range(8)], 2, 8, window, documents)
    got = attention.flash_4_arguments(q, q, piece, 0.5)
    cuts = got["cu_seqlens_q"]
    names = ("causal", "window_size_left", "window_size_right")
    assert (*(got[n] for n in names), cuts if cuts is None else cuts.tolist(), got["max_seqlen_k"]) == told
    assert got["cu_seqlens_k"] is cuts and got["max_seqlen_q"] == 8 and got["softmax_scale"] == 0.5


def test_scores_of_any_size_stay_finite():
    q = torch.full((1, 1, 4, 2), 1e4, requires_grad=True)
    k = torch.randn(1, 1, 4, 2)
    k[..., 1:, :] *= -1e4
    out, lse = torch.zeros(1, 1, 4, 2), torch.full((1, 1, 4), -torch.inf)
    for run in (range(2), range(2, 4)):
        here = slice(run.start, run.stop)
        for piece in pieces([range(4)], [run], 1, 4, tile=8):
            merge(out, lse, piece, *attend_piece(q.detach(), k[:, :, here], k[:, :, here], 1.0, piece))
    assert out.isfinite().all() and lse.isfinite().all()
    got = AttendPieces.apply(q, k, k, torch.full((1,), 1e8), 1.0, pieces([range(4)], [range(4)], 1, 4, tile=2))
    got.sum().backward()
    assert got.isfinite().all() and q.grad.isfinite().all()
