"""Reference solution of feature/block_attention for PithTrain; training.py stands behind it when handed in."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pithtrain.config import Qwen3MoeConfig
from pithtrain.layers.attention import Attention, OneRank, Sequences
from pithtrain.layers.rotary import rotary_table
from pithtrain.models.decoder import Decoder, initialise
from pithtrain.models.qwen3_moe import Qwen3MoeLayer, qwen3_moe

THETA, EPS = 10_000.0, 1e-6


class Blocks(OneRank):
    """A core whose queries see only blocks of keys that they choose (arXiv 2502.13189)."""

    def __init__(self, block: int, top_blocks: int):
        self.block, self.top_blocks = block, top_blocks

    @torch.no_grad()
    def seen(self, q: Tensor, k: Tensor) -> Tensor:
        """(B, heads, S, S): whether a query sees a key."""
        length, positions = q.shape[2], torch.arange(q.shape[2])
        own = positions // self.block
        blocks = int(own[-1]) + 1
        padded = F.pad(k, (0, 0, 0, blocks * self.block - length))
        means = padded.unflatten(2, (blocks, self.block)).mean(3).repeat_interleave(q.shape[1] // k.shape[1], 1)
        number = torch.arange(blocks)
        scores = (q @ means.transpose(-1, -2)).masked_fill(number > own[:, None], -torch.inf)
        scores = scores.masked_fill(number == own[:, None], torch.inf)
        best = scores.topk(min(self.top_blocks, blocks)).indices
        chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, best, True)
        return chosen[..., own] & (positions <= positions[:, None])

    def attend(self, q, k, v, scale, documents=None, window=None, sinks=None) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.seen(q, k), scale=scale, enable_gqa=True)


class BlockAttention(Attention):
    """The framework's attention with that core and no norms on queries and keys."""

    def __init__(self, hidden, heads, kv_heads, head_dim, block, top_blocks):
        super().__init__(hidden, heads, kv_heads, head_dim, EPS, Blocks(block, top_blocks))
        self.query_norm = self.key_norm = nn.Identity()

    def forward(self, x: Tensor, sequences: Sequences | None = None, cache: None = None) -> Tensor:
        if sequences is None:
            sequences = Sequences(*rotary_table(torch.arange(x.shape[1]), self.head_dim, THETA))
        return super().forward(x, sequences)


def build_layer(hidden, heads, kv_heads, head_dim, block, top_blocks) -> BlockAttention:
    return BlockAttention(hidden, heads, kv_heads, head_dim, block, top_blocks)


def make_model() -> Decoder:
    config = Qwen3MoeConfig(
        vocab_size=257, layers=2, hidden=64, heads=4, kv_heads=2, head_dim=16, experts=4, expert_hidden=32, top_k=2
    )
    model, layers = qwen3_moe(config), {}
    for number in range(config.layers):
        layers[str(number)] = layer = Qwen3MoeLayer(config, model.place)
        layer.attention = BlockAttention(config.hidden, config.heads, config.kv_heads, config.head_dim, 16, 3)
    model.layers = nn.ModuleDict(layers)
    initialise(model, seed=0)
    return model


def auxiliary(model: Decoder) -> float:
    return 0.0


def report(model: Decoder) -> dict:
    return {}


def adapt(model: Decoder) -> bool:
    return False
