# %% [markdown]
# # Triton, with and without a GPU
#
# > What every kernel file shares: Triton if it is there, its interpreter if there is no GPU, and plain errors.
#
# A GPU kernel is a small program run by thousands of *program instances*, each on a tile of the data.
# [Triton](https://triton-lang.org) lets us write it in Python: a function decorated with `triton.jit` in
# which `tl.load` brings a tile in, `tl.dot` multiplies tiles and `tl.store` writes a tile out.
#
# Three kinds of machine import these files:
#
# | machine | Triton | what runs |
# |---|---|---|
# | a GPU | compiles | the kernels |
# | Linux without one, `pithtrain[kernels]` | interprets | PyTorch; called by name, the very same kernels, slowly |
# | any other | absent | PyTorch |
#
# The middle row is why kernels can be proved right without a GPU. Nor does Triton's compiler need one:
# `tests/test_kernels_compile.py` has it take every kernel for a Hopper GPU, as it would be launched there. The
# interpreter has to be chosen before Triton is first imported, which is why every kernel file imports this one.

# %%
#| default_exp kernels.lang

# %%
#| export
import importlib.util
import os

import torch
from torch import Tensor

# %%
#| export
HAS_TRITON = importlib.util.find_spec("triton") is not None
if HAS_TRITON and not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# %% [markdown]
# Where Triton is absent, decorated functions must still be *definable*, so that a kernel file can be
# imported for its reference. `triton.jit` then returns its function untouched and `tl` offers the one name
# used in signatures.

# %%
#| export
if HAS_TRITON:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
else:

    class triton:
        """Stand-in for a Triton that is not installed."""

        jit = staticmethod(lambda function: function)

    class tl:
        """Stand-in for triton.language."""

        constexpr = None

    TensorDescriptor = None

INTERPRETED = HAS_TRITON and bool(triton.knobs.runtime.interpret)
if INTERPRETED:
    from triton.runtime import interpreter

    _patch_lang_tensor = interpreter._patch_lang_tensor

    def _patch_with_index(tensor, scope):
        _patch_lang_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    # up to Triton 3.6: it turns a loop bound into an int by int(array), which NumPy refuses from 2.4 on
    interpreter._patch_lang_tensor = _patch_with_index


# %% [markdown]
# The interpreter computes with NumPy, which has no bfloat16. It loads and stores such numbers, but multiplies their
# bits: kernels with matrix products refuse them there.


# %%
#| export
PRODUCTS_OF = (torch.float32, torch.float16) if INTERPRETED else (torch.float32, torch.bfloat16, torch.float16)
"""What kernels multiply as matrices."""


# %%
#| export
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""What the functions around the kernels take, whose PyTorch forms can do float64 too."""

# %% [markdown]
# `runs_triton` says whether kernels *can* run, `kernels_serve` whether layers use them. `want` is how a kernel refuses
# its arguments: by name, in one line, before anything is launched.


# %%
#| export
def runs_triton(tensor: Tensor) -> bool:
    """Whether kernels can take `tensor`: on CUDA compiled, on the CPU under the interpreter."""
    return HAS_TRITON and (INTERPRETED if tensor.device.type == "cpu" else tensor.is_cuda)


# %%
print(f"Triton here: {HAS_TRITON}, interpreted: {INTERPRETED}, takes a CPU tensor: {runs_triton(torch.ones(1))}")


# %%
#| export
def kernels_serve(tensor: Tensor) -> bool:
    """Whether layers hand `tensor` to a kernel: on CUDA, and not in float64, which PyTorch computes."""
    return tensor.is_cuda and runs_triton(tensor) and tensor.dtype != torch.float64


# %%
#| export
def want(name: str, tensor: Tensor, shape: tuple, dtypes: tuple, device: torch.device | None = None) -> None:
    """Raise a one-line TypeError or ValueError unless `tensor` has one of these dtypes, this shape and this device.

    A size of None may be any; without a device, any will do on which kernels run."""
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name} is {tensor.dtype}; want one of {', '.join(map(str, dtypes))}")
    if tensor.ndim != len(shape) or any(s not in (None, own) for s, own in zip(shape, tensor.shape, strict=True)):
        sizes = str(tuple("any" if size is None else size for size in shape)).replace("'", "")
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; want {sizes}")
    if device is None and not runs_triton(tensor):
        raise ValueError(f"{name} is on {tensor.device}; kernels want CUDA, or Triton's interpreter on the CPU")
    if device not in (None, tensor.device):
        raise ValueError(f"{name} is on {tensor.device}; want {device}, where the others are")


# %%
for wrong in (torch.zeros(3, 4, dtype=torch.int8), torch.zeros(4), torch.zeros(3, 4, device="meta")):
    try:
        want("gate_up", wrong, (None, 4), (torch.float32, torch.bfloat16))
    except (TypeError, ValueError) as error:
        print(f"{type(error).__name__}: {error}")

# %% [markdown]
# ## Half a backward
#
# A node whose backward is written by hand makes all its gradients, wanted or not: `ctx.needs_input_grad` is fixed in
# the forward. A [pipeline](56a_pieces.py) walks a graph twice, for the gradients of inputs and later for those of
# weights, and would pay for each product twice. So such a node asks.


# %%
#| export
def wanted(ctx: torch.autograd.function.FunctionCtx) -> list[bool]:
    """For each tensor input of a node in its backward, whether this walk of the graph asks for its gradient."""

    def visited(node: torch.autograd.graph.Node | None) -> bool:
        try:
            return node is not None and torch._C._will_engine_execute_node(node)
        except RuntimeError:  # raised only for a leaf that torch.autograd.grad was asked for: it is wanted
            return True

    return [visited(node) for node, _ in ctx.next_functions]


# %%
class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a, b)
        return a * b

    @staticmethod
    def backward(ctx, grad):
        a, b = ctx.saved_tensors
        print("needs_input_grad:", ctx.needs_input_grad, "wanted:", wanted(ctx))
        return grad * b, grad * a


a, b = torch.ones(1, requires_grad=True), torch.ones(1, requires_grad=True)
Product.apply(a, b).backward()
Product.apply(a, b).backward(inputs=[a])
torch.autograd.grad(Product.apply(a, b), [b])


# %% [markdown]
# ## A first kernel
#
# To read the kernels that follow, one example is enough. Each program instance owns `BLOCK` elements; the
# mask keeps the last one inside the array. On a GPU the instances run at once, here one after the other.


# %%
@triton.jit
def scale_kernel(x_ptr, out_ptr, factor, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + i, factor * tl.load(x_ptr + i, mask=i < n), mask=i < n)


x = torch.arange(10.0)
out = torch.full_like(x, float("nan"))
if runs_triton(x):
    scale_kernel[(3,)](x, out, 2.0, 10, BLOCK=4)
    print(out)
    assert torch.equal(out, 2 * x)

# %% [markdown]
# Yours to do: [a kernel that normalises rows](exercises/10_kernel.py). Next: the first real one, a
# [counting sort](11_sort.py) that brings the tokens of one expert together.
