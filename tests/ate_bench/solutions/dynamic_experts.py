"""Reference solution of feature/dynamic_experts for PithTrain; training.py stands behind it when handed in."""

import torch
from torch import Tensor, nn

from pithtrain.config import Qwen3MoeConfig
from pithtrain.layers.experts import Experts
from pithtrain.layers.router import Routed
from pithtrain.models.decoder import Decoder, initialise
from pithtrain.models.qwen3_moe import Qwen3MoeLayer, qwen3_moe


class Gate(nn.Module):
    def __init__(self, hidden: int, experts: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(experts, hidden) * 0.02)
        self.threshold = nn.Parameter(torch.zeros(experts))


class DynamicExperts(nn.Module):
    """Experts that each token chooses by thresholds, in a number that follows (arXiv 2405.14297)."""

    def __init__(self, hidden: int, expert_hidden: int, experts: int):
        super().__init__()
        self.gate, self.experts = Gate(hidden, experts), Experts(hidden, experts, expert_hidden)
        for parameter in self.experts.parameters():
            nn.init.normal_(parameter, std=0.02)
        self.forget()

    def forget(self) -> None:
        self.used = torch.zeros(len(self.gate.threshold), dtype=torch.bool)
        self.lost, self.orphans, self.tokens = torch.zeros(self.gate.weight.shape[1]), 0, 0

    def route(self, tokens: Tensor) -> tuple[Routed, Tensor, Tensor]:
        w = self.gate.weight
        similar = nn.functional.normalize(tokens) @ nn.functional.normalize(w).t()
        soft = similar.sigmoid() - self.gate.threshold.sigmoid()
        chosen = soft > 0
        alone = ~chosen.any(1)
        if self.training:
            self.used |= chosen.any(0)
            self.lost += tokens[alone].detach().sum(0)
            self.orphans += int(alone.sum())
            self.tokens += len(tokens)
        else:
            chosen = chosen | (alone[:, None] & nn.functional.one_hot(soft.argmax(1), len(w)).bool())
        weights = (1 + soft - soft.detach()) / chosen.sum(1, keepdim=True).clamp_min(1)
        expert_ids = torch.arange(len(w)).expand_as(soft).where(chosen, -1)
        auxiliary = (w @ w.t() - torch.eye(len(w))).norm() + w.norm(dim=1).mean()
        return Routed(weights, expert_ids, chosen.float(), chosen.sum(0)), chosen.float(), auxiliary

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        routed, gates, auxiliary = self.route(tokens)
        return self.experts(tokens, routed.expert_ids, routed.weights), gates, auxiliary

    @torch.no_grad()
    def adapt(self) -> tuple[list[int], bool]:
        kept = self.used.nonzero().flatten().tolist() if self.tokens else list(range(len(self.used)))
        added = self.orphans > 0
        new = {
            "weight": nn.functional.normalize(self.lost, dim=0)[None],
            "threshold": torch.zeros(1),
            "gate_up": 0.02 * torch.randn_like(self.experts.gate_up[:1]),
            "down": 0.02 * torch.randn_like(self.experts.down[:1]),
        }
        for module in (self.gate, self.experts):
            for name, old in list(module.named_parameters()):
                setattr(module, name, nn.Parameter(torch.cat([old[kept], new[name][: int(added)]])))
        self.forget()
        return kept, added


def build_layer(hidden, expert_hidden, experts) -> DynamicExperts:
    return DynamicExperts(hidden, expert_hidden, experts)


class Layer(Qwen3MoeLayer):
    def __init__(self, config: Qwen3MoeConfig, place):
        super().__init__(config, place)
        del self.router, self.experts
        self.dynamic = DynamicExperts(config.hidden, config.expert_hidden, config.experts)

    def attend(self, hidden, sequences, cache=None):
        residual = hidden + self.attention(self.attention_norm(hidden), sequences, cache)
        tokens = self.expert_norm(residual.flatten(0, 1))
        routed, _, self.auxiliary = self.dynamic.route(tokens)
        return residual, tokens, routed

    def experts(self, tokens: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor:
        return self.dynamic.experts(tokens, expert_ids, weights)


def make_model() -> Decoder:
    config = Qwen3MoeConfig(
        vocab_size=257, layers=2, hidden=64, heads=4, kv_heads=2, head_dim=16, experts=4, expert_hidden=32, top_k=2
    )
    model = qwen3_moe(config)
    model.layers = nn.ModuleDict({str(number): Layer(config, model.place) for number in range(config.layers)})
    initialise(model, seed=0)
    return model


def auxiliary(model: Decoder) -> Tensor:
    return sum(layer.auxiliary for layer in model.layers.values())


def report(model: Decoder) -> dict:
    return {"experts": [len(layer.dynamic.gate.threshold) for layer in model.layers.values()]}


def adapt(model: Decoder) -> bool:
    for layer in model.layers.values():
        layer.dynamic.adapt()
    return True
