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
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard

from pithtrain.models.decoder import Decoder
from pithtrain.parallel.mesh import Mesh

# %% [markdown]
# ## Which module is gathered when
#
# A layer's stage 1 and its experts run at different moments, with travelling tokens between them, so they
# are gathered apart. The embedding, the last norm and the head belong to the decoder itself.
#
# The loss is already divided by the tokens of *all* ranks, so gradients are summed, never averaged.


# %%
#| export
def shard(part: Decoder, mesh: Mesh) -> None:
    """Shard the parameters of `part`, in place, over the ranks that hold the same ones."""
    dtype = None if part.place.dtype == torch.float32 else part.place.dtype
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    shards, expert_shards = (m if mesh.copies > 1 else m["shards"] for m in (mesh.shards, mesh.expert_shards))
    for layer in part.layers.values():
        if isinstance(layer.experts, nn.Module):
            fully_shard(layer.experts, mesh=expert_shards, mp_policy=policy)
        fully_shard(layer, mesh=shards, mp_policy=policy)
        register_fsdp_forward_method(layer, "attend")
    fully_shard(part, mesh=shards, mp_policy=policy)
    for module in part.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


# %% [markdown]
# ## The norm of all gradients
#
# The square of the global norm is a sum over every element of every gradient. Sharded, each element lives
# on exactly one rank (times the copies), so every rank adds up the squares of its own, and one sum over all
# ranks completes it, whatever the mixture of shardings.


# %%
#| export
@torch.no_grad()
def clip_gradients(parameters: Iterable[Tensor], limit: float, mesh: Mesh) -> Tensor:
    """The global gradient norm, an fp32 scalar; gradients are scaled in place to at most `limit`."""
    grads = [g.to_local() if isinstance(g, DTensor) else g for p in parameters if (g := p.grad) is not None]
    square = torch.stack(torch._foreach_norm(grads)).square().sum()
    if mesh.world_size > 1:
        square /= mesh.copies
        dist.all_reduce(square)
    norm = square.sqrt()
    torch._foreach_mul_(grads, torch.clamp(limit / (norm + 1e-6), max=1.0))
    return norm


# %%
#| export
def in_global_order(name: str, local: Tensor, mesh: Mesh) -> Tensor:
    """What this rank holds of the tensor called `name`, as a piece of the whole model's tensor of that name."""
    if mesh.expert_order is None or ".experts." not in name:
        return local
    own = local.to_local() if isinstance(local, DTensor) else local
    shape = torch.Size([local.shape[0] * mesh.axes.ep, *local.shape[1:]])
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(own, mesh.expert_order, [Shard(0), Shard(0)], run_check=False, shape=shape, stride=stride)
