"""Kernel files import, and their references run, where Triton is not installed; arguments are refused by name."""

import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from pithtrain.kernels.lang import HAS_TRITON, kernels_serve, want

WITHOUT_TRITON = """
import importlib.util
import sys

find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "triton" else find_spec(name, *rest)

import torch
from pithtrain.kernels import lang
from pithtrain.kernels.cross_entropy import row_losses
from pithtrain.kernels.expert_mlp import reference_expert_mlp, triton_expert_mlp
from pithtrain.kernels.sort import reference_sort_pairs
from pithtrain.layers.router import Router

assert not lang.HAS_TRITON and "triton" not in sys.modules
x = torch.randn(6, 8)
routing = Router(8, 4, 2, renormalise=True)(x)
args = x, routing.expert_ids, routing.weights, torch.randn(4, 8, 8), torch.randn(4, 8, 4)
assert reference_expert_mlp(*args).shape == (6, 8)
assert reference_sort_pairs(routing.expert_ids, 4, 2).pair.shape == (12,)
assert row_losses(x, torch.arange(6), True).shape == (6,)
try:
    triton_expert_mlp(*args)
except ValueError as error:
    print(error)
"""


def test_without_triton():
    done = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "tokens is on cpu; kernels want CUDA" in done.stdout


@pytest.mark.parametrize(
    "tensor, message",
    [
        (torch.zeros(2, dtype=torch.int8), "down is torch.int8; want one of torch.float32"),
        (torch.zeros(3), r"down has shape \(3,\); want \(2,\)"),
        (torch.zeros(2, 1), r"down has shape \(2, 1\); want \(2,\)"),
        (torch.zeros(2, device="meta"), "down is on meta; want cpu"),
    ],
)
def test_want_names_what_is_wrong(tensor, message):
    with pytest.raises((TypeError, ValueError), match=message):
        want("down", tensor, (2,), (torch.float32,), torch.device("cpu"))


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
def test_kernels_serve_cuda_but_not_in_float64():
    with FakeTensorMode():
        here = {d: torch.empty(3, device="cuda", dtype=d) for d in (torch.float32, torch.bfloat16, torch.int64)}
        assert all(map(kernels_serve, here.values()))
        assert not kernels_serve(torch.empty(3, device="cuda", dtype=torch.float64))
    assert not kernels_serve(torch.empty(3))
