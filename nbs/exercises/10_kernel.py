# %% [markdown]
# # Exercise: a kernel that normalises rows
#
# > Write RMSNorm as a Triton kernel, one row to a program, and prove it without a GPU.
#
# [RMSNorm](../24_norm.py) divides a row by the root of its mean square and scales each feature:
#
# $$y_i = g_i\, \frac{x_i}{\sqrt{\frac{1}{H} \sum_j x_j^2 + \varepsilon}}.$$
#
# In PyTorch, step by step, that reads and writes the rows several times. A kernel reads each once. On a machine
# without a GPU [Triton's interpreter](../10_triton.py) runs the very same kernel.
#
# ## The task
#
# Fill in `my_norm_kernel`. Program `tl.program_id(0)` owns one row of `width` features; `BLOCK` is a power of
# two, at least `width`, so some lanes have no feature: a `mask` keeps them from reading and writing. What must
# such a lane load, so that the sum is right? Compute in float32, and divide by `width`.

# %%
import torch

from pithtrain.kernels.lang import HAS_TRITON, tl, triton


@triton.jit
def my_norm_kernel(x_ptr, gain_ptr, y_ptr, width, eps, BLOCK: tl.constexpr):
    pass  # your turn


# %% [markdown]
# ## The check
#
# Widths that fill the block and widths that do not; NaN stands in the output beforehand, so what is not written
# shows.


# %%
def check(kernel):
    torch.manual_seed(0)
    for rows, width in ((3, 16), (5, 11), (1, 1), (4, 100)):
        x, gain, y = torch.randn(rows, width), torch.randn(width), torch.full((rows + 1, width), float("nan"))
        kernel[(rows,)](x, gain, y, width, 1e-6, BLOCK=triton.next_power_of_2(width))
        want = x * torch.rsqrt(x.square().mean(dim=1, keepdim=True) + 1e-6) * gain
        assert not y[:rows].isnan().any(), f"{rows} rows of {width}: not everything was written"
        assert y[rows].isnan().all(), f"{rows} rows of {width}: something was written behind the last row"
        error = float((y[:rows] - want).norm() / want.norm())
        assert error < 1e-5, f"{rows} rows of {width}: relative error {error:.1e}"
    print("Right.")


if HAS_TRITON:
    try:
        check(my_norm_kernel)
    except AssertionError as error:
        print("Not yet:", error)

# %% [markdown]
# ## A mistake worth making
#
# Dividing by the block and not by the row:


# %%
@triton.jit
def by_block_kernel(x_ptr, gain_ptr, y_ptr, width, eps, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    start = tl.program_id(0) * width
    x = tl.load(x_ptr + start + i, mask=i < width, other=0.0)
    scale = 1 / tl.sqrt(tl.sum(x * x) / BLOCK + eps)
    tl.store(y_ptr + start + i, x * scale * tl.load(gain_ptr + i, mask=i < width), mask=i < width)


if HAS_TRITON:
    try:
        check(by_block_kernel)
        raise SystemExit("the check let a mistake pass")
    except AssertionError as error:
        print(error)

# %% [markdown]
# It passes for widths that are powers of two, as most models' are.
#
# ## A solution


# %% tags=["hide-cell"]
@triton.jit
def solution_kernel(x_ptr, gain_ptr, y_ptr, width, eps, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    start = tl.program_id(0) * width
    x = tl.load(x_ptr + start + i, mask=i < width, other=0.0).to(tl.float32)
    scale = 1 / tl.sqrt(tl.sum(x * x) / width + eps)
    gain = tl.load(gain_ptr + i, mask=i < width, other=0.0)
    tl.store(y_ptr + start + i, x * scale * gain, mask=i < width)


if HAS_TRITON:
    check(solution_kernel)

# %% [markdown]
# ## To think about
#
# - How many bytes does the kernel move for T rows, and how many does the PyTorch line in the check?
# - The gradient of the gain sums over rows, which different programs own. Which two ways are there to add them
#   up, and which of them gives the same bits each time?
#
# Next: [dispatch](41_dispatch.py).
