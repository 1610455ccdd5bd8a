"""The counting sort against PyTorch's stable sort, on the GPU or under Triton's interpreter."""

import pytest
import torch

from pithtrain.kernels import lang, sort

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(not lang.HAS_TRITON, reason="Triton is not installed")


def compare(ids, experts, tile_rows):
    got = sort.sort_pairs(ids, experts, tile_rows)
    true = sort.reference_sort_pairs(ids, experts, tile_rows)
    valid, tiles = int(true.offsets[-1]), len(true.tile_expert)
    assert torch.equal(got.offsets, true.offsets)
    assert torch.equal(got.first_tile, true.first_tile)
    assert torch.equal(got.slot, true.slot)
    assert torch.equal(got.pair[:valid], true.pair[:valid])
    assert torch.equal(got.tile_expert[:tiles], true.tile_expert)
    assert all(t.dtype == torch.int32 for t in got)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    "tokens, top_k, experts, tile_rows",
    [(1, 1, 1, 16), (1, 1, 3, 16), (7, 3, 5, 4), (128, 4, 4, 16), (513, 1, 2, 128), (700, 3, 17, 16), (300, 2, 200, 8)],
)
def test_random(tokens, top_k, experts, tile_rows, dtype):
    compare(torch.randint(0, experts, (tokens, top_k), device=DEVICE, dtype=dtype), experts, tile_rows)


def test_absent_ids_have_no_slot():
    compare(torch.randint(-1, 6, (300, 2), device=DEVICE), 6, 16)
    compare(torch.randint(-3, 12, (300, 2), device=DEVICE), 6, 16)


def test_empty_experts_and_one_expert():
    compare(torch.full((200, 2), 4, device=DEVICE), 9, 16)
    compare(torch.full((200, 2), -1, device=DEVICE), 9, 16)


def test_non_contiguous():
    compare(torch.randint(0, 5, (4, 100), device=DEVICE).T, 5, 16)


def test_wrong_dtype_is_named():
    with pytest.raises(TypeError, match=r"expert_ids is torch.float32"):
        sort.sort_pairs(torch.zeros(3, 2, device=DEVICE), 4, 16)
    with pytest.raises(ValueError, match=r"expert_ids has shape \(6,\); want \(any, any\)"):
        sort.sort_pairs(torch.zeros(6, dtype=torch.int64, device=DEVICE), 4, 16)
    with pytest.raises(ValueError, match=r"expert_ids is on meta; kernels want CUDA"):
        sort.sort_pairs(torch.zeros(3, 2, dtype=torch.int64, device="meta"), 4, 16)
    for experts, rows in ((0, 16), (-1, 16), (4, 0)):
        with pytest.raises(ValueError, match=f"num_experts is {experts} and tile_rows {rows}; want at least 1"):
            sort.sort_pairs(torch.zeros(3, 2, dtype=torch.int64, device=DEVICE), experts, rows)
