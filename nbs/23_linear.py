# %% [markdown]
# # Linear: fp32 weights, compute in any dtype
#
# > A matrix kept in float32 that multiplies in the dtype of its input.
#
# Training keeps *master weights* in float32, because an update of one part in a thousand is lost in
# bfloat16, and computes in bfloat16 where the hardware gains by it. PithTrain says so in the plainest way:
# activations carry the compute dtype, and a layer converts its weight to the dtype of what it is given.
# There is no autocast and no second copy of the model. Gradients pass back through the conversion and
# accumulate in float32.

# %%
#| default_exp layers.linear

# %%
#| export
import torch.nn.functional as F
from torch import Tensor, nn


# %%
#| export
class Linear(nn.Linear):
    """`nn.Linear` whose weight (out, in) and `bias`, if any, are converted to the dtype of the input."""

    def __init__(self, features_in: int, features_out: int, bias: bool = False):
        super().__init__(features_in, features_out, bias)
        if bias:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out), in the dtype of `x`."""
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


# %% [markdown]
# Why the master copy matters: a weight near 1 that receives a thousand updates of 0.001.

# %%
import torch

for dtype in (torch.float32, torch.bfloat16):
    weight = torch.ones((), dtype=dtype)
    for _ in range(1000):
        weight += 0.001
    print(f"{dtype!s:15} {weight.item():.3f}")

# %% [markdown]
# bfloat16 has steps of 1/128 there, so each update rounds away. And the gradient of a bfloat16 product
# arrives in float32:

# %%
layer = Linear(4, 3, bias=True)
layer(torch.randn(2, 4, dtype=torch.bfloat16)).sum().backward()
print(layer.weight.grad.dtype, layer.bias.grad.dtype)

# %% [markdown]
# Next: what is made of three of them, the [gated MLP](23a_mlp.py).
