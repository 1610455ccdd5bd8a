"""Reference solution of feature/zero_experts for PithTrain; training.py stands behind it when it is handed in."""

import torch
from torch import Tensor, nn

from pithtrain.config import Qwen3MoeConfig
from pithtrain.layers.experts import Experts
from pithtrain.layers.router import Routed
from pithtrain.models.decoder import Decoder, initialise
from pithtrain.models.qwen3_moe import Qwen3MoeLayer, qwen3_moe
from pithtrain.models.stages import Place

ETA = 0.75


class Matrix(nn.Module):
    def __init__(self, rows: int, columns: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(rows, columns))


class Constant(nn.Module):
    def __init__(self, number: int, hidden: int):
        super().__init__()
        self.mix = nn.Parameter(torch.zeros(number, 2, hidden))
        self.vector = nn.Parameter(torch.zeros(number, hidden))


class ZeroExpertsLayer(nn.Module):
    def __init__(self, hidden, expert_hidden, ffn, zero, copy, constant, top_k):
        super().__init__()
        self.ffn, self.zero, self.copy, self.top_k = ffn, zero, copy, top_k
        n = ffn + zero + copy + constant
        self.router, self.residual = Matrix(n, hidden), Matrix(n, n)
        self.experts, self.constant = Experts(hidden, ffn, expert_hidden), Constant(constant, hidden)

    def route(self, tokens: Tensor, previous: Tensor | None) -> tuple[Tensor, Routed, Tensor]:
        logits = tokens @ self.router.weight.t()
        if previous is not None:
            logits = logits + previous @ self.residual.weight.t()
        probs = logits.softmax(-1)
        weights, expert_ids = probs.topk(self.top_k)
        chosen = torch.zeros_like(probs).scatter(1, expert_ids, 1.0)
        eta = torch.full_like(probs[0], ETA)
        eta[: self.ffn] = 1.0
        balance = (eta * chosen.mean(0) * probs.mean(0)).sum()
        return logits, Routed(weights, expert_ids, probs, chosen.sum(0)), balance

    def mix(self, tokens: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor:
        output = self.experts(tokens, expert_ids.where(expert_ids < self.ffn, -1), weights)
        first = self.ffn + self.zero
        copied = (expert_ids >= first) & (expert_ids < first + self.copy)
        output = output + (weights * copied).sum(1, keepdim=True) * tokens
        for j in range(len(self.constant.vector)):
            weight = (weights * (expert_ids == first + self.copy + j)).sum(1, keepdim=True)
            a = (tokens @ self.constant.mix[j].t()).softmax(-1)
            output = output + weight * (a[:, :1] * tokens + a[:, 1:] * self.constant.vector[j])
        return output

    def forward(self, tokens: Tensor, previous: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        logits, routed, balance = self.route(tokens, previous)
        return self.mix(tokens, routed.expert_ids, routed.weights), logits, balance


def build_layer(hidden, expert_hidden, ffn, zero, copy, constant, top_k) -> ZeroExpertsLayer:
    return ZeroExpertsLayer(hidden, expert_hidden, ffn, zero, copy, constant, top_k)


class Layer(Qwen3MoeLayer):
    """A Qwen3-MoE layer with zero-computation experts; `before` is the layer whose logits it adds."""

    def __init__(self, config: Qwen3MoeConfig, place: Place, before: "Layer | None"):
        super().__init__(config, place)
        del self.router, self.experts
        self.mixed = ZeroExpertsLayer(config.hidden, config.expert_hidden, config.experts, 1, 1, 1, config.top_k)
        self.before = [before] if before else []  # a list: not a part of this module

    def attend(self, hidden, sequences, cache=None):
        residual = hidden + self.attention(self.attention_norm(hidden), sequences, cache)
        tokens = self.expert_norm(residual.flatten(0, 1))
        previous = self.before[0].logits if self.before else None
        self.logits, routed, self.balance = self.mixed.route(tokens, previous)
        return residual, tokens, routed

    def experts(self, tokens: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor:
        return self.mixed.mix(tokens, expert_ids, weights)


def make_model() -> Decoder:
    config = Qwen3MoeConfig(
        vocab_size=257, layers=2, hidden=64, heads=4, kv_heads=2, head_dim=16, experts=4, expert_hidden=32, top_k=2
    )
    model, layers = qwen3_moe(config), []
    for _ in range(config.layers):
        layers.append(Layer(config, model.place, layers[-1] if layers else None))
    model.layers = nn.ModuleDict({str(number): layer for number, layer in enumerate(layers)})
    initialise(model, seed=0)
    return model


def auxiliary(model: Decoder) -> Tensor:
    return sum(layer.balance for layer in model.layers.values())


def report(model: Decoder) -> dict:
    return {}


def adapt(model: Decoder) -> bool:
    return False
