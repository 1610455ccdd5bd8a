"""Triton's compiler takes every kernel for a Hopper GPU, as it is launched, where no GPU is needed: none is run."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pithtrain.kernels import lang

pytestmark = pytest.mark.skipif(not lang.HAS_TRITON, reason="Triton is not installed")
KERNELS = Path(lang.__file__).parent
PROGRAM = """
from types import SimpleNamespace

import torch
import triton
from triton.backends.compiler import GPUTarget

target = GPUTarget("cuda", 90, 32)
triton.runtime.driver.set_active(SimpleNamespace(
    get_current_target=lambda: target, get_current_device=lambda: 0, get_current_stream=lambda device: 0,
))
torch.cuda.get_device_capability = lambda device=None: (9, 0)
torch.cuda.get_device_properties = lambda device=None: SimpleNamespace(multi_processor_count=132)
launch = triton.JITFunction.run

def compile_only(self, *arguments, **how):
    kernel = launch(self, *arguments, **{**how, "warmup": True})
    print(self.__name__, len(kernel.asm["cubin"]), kernel.metadata.shared)
    return kernel

triton.JITFunction.run = compile_only

from pithtrain.kernels import lang

lang.runs_triton = lambda tensor: True

from pithtrain.kernels import expert_mlp as mlp
from pithtrain.kernels.adamw import triton_adamw
from pithtrain.kernels.cross_entropy import triton_row_losses
from pithtrain.kernels.dispatch import triton_gather_sum, triton_plan_rows
from pithtrain.kernels.rotary import triton_rotate
from pithtrain.kernels.router import triton_route

T, H, I, E, K = 256, 2048, 768, 32, 8
new = lambda *shape, dtype=torch.bfloat16: torch.zeros(shape, dtype=dtype, requires_grad=dtype.is_floating_point)
half, full = torch.bfloat16, torch.float32
for dtype, master in ((half, half), (half, full), (full, full)):
    x = new(T, H, dtype=dtype)
    for sigmoid in (False, True):
        routing = triton_route(x, new(E, H, dtype=dtype), K, new(E, dtype=torch.float32), True, sigmoid)
        (routing.weights.sum() + sigmoid * routing.probs.sum()).backward()
    for many in (256, 512, 1024, 2048):
        triton_route(x, new(many, H, dtype=dtype), K, new(many, dtype=full)).weights.sum().backward()
    ids, weights = new(T, K, dtype=torch.int64), new(T, K, dtype=torch.float32)
    for bias in (None, new(E, 2 * I, dtype=dtype)):
        mlp.triton_expert_mlp(
            x, ids, weights, new(E, 2 * I, H, dtype=master), new(E, H, I, dtype=master), bias
        ).sum().backward()
    triton_row_losses(new(T, 151936, dtype=dtype), new(T, dtype=torch.int64), True)
    triton_gather_sum(x, None, new(T, 4, dtype=torch.int32))
    for neighbours in (False, True):
        table = new(T, 64, dtype=torch.float32)
        triton_rotate(new(1, T, 32, 128, dtype=dtype), table, table, neighbours).sum().backward()
    for scale in (None, new(dtype=torch.float32)):
        weight = new(H, I, dtype=torch.float32).detach()
        triton_adamw(weight, new(H, I, dtype=dtype), weight, weight, scale, 1, 0.1, 0.1, 0.9, 0.95, 1e-8)
triton_plan_rows(ids, E // 4, 4)
x, gate_up, down = new(T, 2880), new(32, 2 * 2880, 2880), new(32, 2880, 2880)  # wide experts: rows in order
order = mlp.sort_pairs(ids % 32, 32, mlp.blocks_for(x).rows)
hidden, _ = mlp.up_projection(mlp.dispatch(x, order), gate_up, order, in_order=True)
mlp.activation_gradient(mlp.dispatch(x, order), down, weights, hidden, order, in_order=True)
"""


def test_every_kernel_compiles_for_hopper(tmp_path):
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    compiled = [line.split() for line in done.stdout.splitlines()]
    kernels = {
        name for file in KERNELS.glob("*.py") for name in re.findall(r"^def (\w+_kernel)\(", file.read_text(), re.M)
    }
    assert {name for name, _, _ in compiled} == kernels
    assert all(int(size) > 0 and int(shared) <= 227 * 1024 for _, size, shared in compiled)
