"""Reference solution of feature/differential_attention for PithTrain; training.py stands behind it when handed in."""

import math

import torch
from torch import Tensor, nn

from pithtrain.config import Qwen3MoeConfig
from pithtrain.layers.attention import OneRank, Sequences
from pithtrain.layers.linear import Linear
from pithtrain.layers.norm import RMSNorm
from pithtrain.layers.rotary import rotary_table, rotate
from pithtrain.models.decoder import Decoder, initialise
from pithtrain.models.qwen3_moe import Qwen3MoeLayer, qwen3_moe

THETA, EPS = 10_000.0, 1e-5


class DifferentialAttention(nn.Module):
    """Causal attention by the difference of two maps (arXiv 2410.05258), in layer `number` counted from 1."""

    def __init__(self, hidden: int, heads: int, head_dim: int, number: int, core: OneRank = OneRank()):
        super().__init__()
        self.heads, self.head_dim, self.core = heads, head_dim, core
        self.start = 0.8 - 0.6 * math.exp(-0.3 * (number - 1))
        width = 2 * heads * head_dim
        self.query, self.key, self.value = Linear(hidden, width), Linear(hidden, width), Linear(hidden, width)
        self.output, self.norm = Linear(width, hidden), RMSNorm(2 * head_dim, EPS)
        for name in ("q1", "k1", "q2", "k2"):
            setattr(self, f"lambda_{name}", nn.Parameter(0.1 * torch.randn(head_dim)))

    def forward(self, x: Tensor, sequences: Sequences | None = None, cache: None = None) -> Tensor:
        batch, length, _ = x.shape
        if sequences is None:
            sequences = Sequences(*rotary_table(torch.arange(length), self.head_dim, THETA))
        cos, sin, documents = sequences
        q, k = (
            rotate(projection(x).view(batch, length, 2 * self.heads, self.head_dim), cos, sin).transpose(1, 2)
            for projection in (self.query, self.key)
        )
        v = self.value(x).view(batch, length, self.heads, 2 * self.head_dim).transpose(1, 2)
        first, second = (
            self.core.attend(q[:, half::2], k[:, half::2], v, self.head_dim**-0.5, documents) for half in (0, 1)
        )
        strength = torch.exp(self.lambda_q1 @ self.lambda_k1) - torch.exp(self.lambda_q2 @ self.lambda_k2) + self.start
        mixed = self.norm(first - strength * second) * (1 - self.start)
        return self.output(mixed.transpose(1, 2).flatten(2))


def build_layer(hidden, heads, head_dim, number) -> DifferentialAttention:
    return DifferentialAttention(hidden, heads, head_dim, number)


def make_model() -> Decoder:
    config = Qwen3MoeConfig(
        vocab_size=257, layers=2, hidden=64, heads=2, kv_heads=2, head_dim=16, experts=4, expert_hidden=32, top_k=2
    )
    model, layers = qwen3_moe(config), {}
    for number in range(config.layers):
        layers[str(number)] = layer = Qwen3MoeLayer(config, model.place)
        layer.attention = DifferentialAttention(config.hidden, config.heads, config.head_dim, number + 1)
    model.layers = nn.ModuleDict(layers)
    initialise(model, seed=0)
    return model


def auxiliary(model: Decoder) -> float:
    return 0.0


def report(model: Decoder) -> dict:
    return {}


def adapt(model: Decoder) -> bool:
    return False
