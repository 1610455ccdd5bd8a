# %% [markdown]
# # Sharding
#
# > Each rank keeps a slice of the weights; torch's FSDP2 gathers a layer when it runs and scatters its gradients.
#
# Weights, gradients and the optimiser's two averages in fp32 are 16 bytes a parameter: 488 GB for
# Qwen3-30B-A3B. Sharding (ZeRO, arXiv 1910.02054) divides all of it by the number of ranks that hold the same
# parameters. A layer's weights are gathered, in the compute's dtype, just before it runs and dropped after
# it; its gradients are summed in fp32 and each rank keeps its slice's.
#
# torch's FSDP2 does this work. What is ours is the layout: experts, which expert parallelism has divided
# already, are sharded over `dp x cp`, everything else over `dp x cp x ep`.

# %%
#| default_exp parallel.sharding

# %%
#| export
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard

from pithtrain.models.decoder import Decoder
from pithtrain.parallel.mesh import Mesh
from pithtrain.parallel.pipeline.overlap import PartStage

# %% [markdown]
# ## Which module is gathered when
#
# A layer's stage 1 and its experts run at different moments, with travelling tokens between them, so they
# are gathered apart. The embedding, the last norm and the head belong to the decoder itself.
#
# The loss is already divided by the tokens of *all* ranks, so gradients are summed, never averaged.


# %%
#| export
def shard(module: nn.Module, over: DeviceMesh, dtype: torch.dtype) -> None:
    """Shard what of `module` is not yet, in place: weights gathered in `dtype`, gradients added up in fp32."""
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    fully_shard(module, mesh=over, mp_policy=policy)
    module.set_gradient_divide_factor(1.0)
    module.set_force_sum_reduction_for_comms(True)


# %%
#| export
def shard_layer(layer: nn.Module, dtype: torch.dtype, mesh: Mesh) -> None:
    """Shard a layer's parameters, in place, over the ranks that hold the same ones."""
    if isinstance(layer.experts, nn.Module):
        shard(layer.experts, mesh.expert_shards, dtype)
    shard(layer, mesh.shards, dtype)
    register_fsdp_forward_method(layer, "attend")


# %%
#| export
def shard_decoder(part: Decoder, mesh: Mesh) -> None:
    """Shard what `part` has outside of its layers, which are sharded already."""
    shard(part, mesh.shards, part.place.dtype)


# %%
#| export
def sharded_modules(part: Decoder) -> list[FSDPModule]:
    """Those of the part's modules that are gathered apart: none where nothing is sharded."""
    return [module for module in part.modules() if isinstance(module, FSDPModule)]


# %%
#| export
def drop_gathered(part: Decoder) -> None:
    """Leave only this rank's shards, as after a backward."""
    for module in sharded_modules(part):
        module.reshard()


# %% [markdown]
# ## As a stage of a pipeline
#
# Left alone, FSDP2 gathers and drops a layer's weights around each of its passes, and adds gradients up
# after each backward. A pipeline's stage has many microbatches in flight, and its
# [schedule](53_lower.py) says itself when weights are gathered and dropped and when gradients are added up.


# %%
#| export
class ShardedStage(PartStage):
    """A sharded part of a decoder as a stage, gathered and reduced when the schedule says."""

    def __init__(self, part: Decoder, close: Callable[..., Tensor], beside: torch.cuda.Stream | None = None):
        super().__init__(part, close, beside)
        # What is outside of the layers runs without the part being called, which FSDP2 should know as their root.
        fully_shard.state(part)._lazy_init()
        if part.place.first:
            register_fsdp_forward_method(part, "begin")
        if part.place.last:
            register_fsdp_forward_method(part, "finish")
        part.set_reshard_after_forward(False)
        self.hold()

    def hold(self) -> None:
        """Between two reductions: leave weights gathered and gradients unreduced behind a backward."""
        self.part.set_reshard_after_backward(False)
        self.part.set_requires_gradient_sync(False)
        self.part.set_is_last_backward(False)

    def unshard(self) -> list[Any]:
        return [work for module in sharded_modules(self.part) if (work := module.unshard(async_op=True))]

    def reshard(self) -> None:
        drop_gathered(self.part)

    def reduce(self) -> None:
        self.part.set_requires_gradient_sync(True)
        self.part.set_is_last_backward(True)
        # FSDP2 has no public call for this; torch's own pipelines do the same.
        root = fully_shard.state(self.part)
        for state in root._state_ctx.all_states:
            for group in getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]:
                if group is not None:
                    group.post_backward()
        root._root_post_backward_final_callback()
        self.hold()


# %% [markdown]
# ## The norm of all gradients
#
# The square of the global norm is a sum over every element of every gradient. Each element lives on one rank, or, with
# hybrid sharding, on `Mesh.copies` ranks. So every rank adds up the squares of its own, divides by the copies, and one
# sum over all ranks completes it, however each tensor is sharded.
#
# Scaling the gradients in a pass of their own would read and write all of them once more, 8 bytes a parameter,
# clipped or not. [AdamW](18_adamw_kernel.py) divides them by its `grad_scale` while it reads them anyway.


# %%
#| export
def on_this_rank(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor that may be sharded, in the same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


# %%
#| export
@torch.no_grad()
def clip_gradients(optimizer: torch.optim.AdamW, limit: float, mesh: Mesh) -> Tensor:
    """The global gradient norm, an fp64 scalar; steps of `optimizer`, a fused one, clip to `limit` until the next call.

    A limit of 0 leaves the gradients alone."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    grads = [on_this_rank(p.grad) for p in parameters if p.grad is not None]
    square = torch.stack(torch._foreach_norm(grads, dtype=torch.float64)).square().sum()
    if mesh.world_size > 1:
        square /= mesh.copies
        dist.all_reduce(square)
    norm = square.sqrt()
    optimizer.grad_scale = torch.clamp((norm + 1e-6) / limit, min=1.0).float() if limit else None
    return norm


# %% [markdown]
# A gradient (3, 4) of norm 5, limited to 1, counts as (0.6, 0.8). AdamW's first moment, from zero, takes 1 - 0.9 of it:
# (0.06, 0.08). (The step itself would show nothing: Adam's first does not depend on the gradient's scale.)

# %%
from pithtrain.parallel.mesh import Axes

weights = torch.nn.Parameter(torch.zeros(2))
weights.grad = torch.tensor([3.0, 4.0])
optimizer = torch.optim.AdamW([weights], betas=(0.9, 0.95), fused=True)
print("norm", clip_gradients(optimizer, 1.0, Mesh(Axes(1, 1, 1, 1))).item())
optimizer.step()
print("first moment", optimizer.state[weights]["exp_avg"])
torch.testing.assert_close(optimizer.state[weights]["exp_avg"], torch.tensor([0.06, 0.08]))


# %% [markdown]
# ## A rank's piece of the whole
#
# With expert parallelism a rank holds `1 / ep` of a layer's experts, and of those its shard. A checkpoint stores each
# expert tensor whole, so the rank's shard is wrapped as a DTensor of the whole: split along dimension 0 over `ep`, and
# again over the ranks that shard the same experts (`Mesh.expert_order`).


# %%
#| export
def in_global_order(name: str, local: Tensor, mesh: Mesh) -> Tensor:
    """What this rank holds of the tensor called `name`, as a piece of the whole model's tensor of that name."""
    if mesh.expert_order is None or ".experts." not in name:
        return local
    shape = torch.Size([local.shape[0] * mesh.axes.ep, *local.shape[1:]])
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        on_this_rank(local), mesh.expert_order, [Shard(0), Shard(0)], run_check=False, shape=shape, stride=stride
    )


# %% [markdown]
# ## How much is left on a rank
#
# The arithmetic of the layout for Qwen3-30B-A3B, whose experts are 29 of its 30.5 billion parameters, 16
# bytes of state for each. Without expert parallelism everything is sharded alike; with it the experts are
# divided before they are sharded, and the sum on a rank is the same: what expert parallelism saves is
# traffic, since an expert's weights then stay where they are and only tokens travel.

# %%
experts, others = 29.0e9, 1.5e9
print("ranks (dp x ep)   GB a rank   GB of expert weights gathered for one forward, bf16")
for dp, ep in ((8, 1), (4, 2), (1, 8), (64, 1), (8, 8)):
    state = 16 * (experts / (dp * ep) + others / (dp * ep)) / 1e9
    gathered = 2 * experts / ep * (1 - 1 / dp) / 1e9
    print(f"{dp:>5} x {ep:<9}{state:>10.1f}{gathered:>16.1f}")

# %% [markdown]
# Checked in `tests/test_verify.py`: every layout against one process.
#
# Next: how a process finds its place in the job: [launch](44_launch.py).
