"""DeepSeek against transformers' V2 and V3, in every corner of the config; decoding and packed documents."""

import random
from pathlib import Path

import families
import pytest
import torch
import torch.nn.functional as F

from pithtrain.config import DeepseekConfig, UserError, config_from_tables, load_config
from pithtrain.layers.rotary import yarn_magnitude
from pithtrain.models.decoder import initialise
from pithtrain.models.deepseek import deepseek
from pithtrain.models.stages import Place

BASE = DeepseekConfig(
    vocab_size=300, layers=3, hidden=32, heads=4, experts=8, top_k=3, expert_hidden=24, tie_embeddings=False,
    head_dim=8, rope_dim=4, value_dim=8, latent_rank=16, dense_hidden=40,
)  # fmt: skip


def shape(**changes):
    return DeepseekConfig(**{**BASE.__dict__, **changes})


V2 = {"groups": 4, "top_groups": 2, "query_rank": 12, "routed_scale": 16.0, "shared_experts": 2}
V3 = {**V2, "scoring": "sigmoid", "renormalise": True, "routed_scale": 2.5, "shared_experts": 1}
# An original length of 64 makes a ramp over the two pairs of the tests' heads.
YARN = {"yarn_factor": 40.0, "yarn_length": 64}
SHAPES = {
    "V2-Lite": (shape(**YARN, yarn_mscale=0.707, yarn_mscale_all_dim=0.707), 2, 16),
    "V2": (shape(**V2, **YARN, yarn_mscale=0.707, yarn_mscale_all_dim=0.707), 2, 16),
    "V3": (shape(**V3, **YARN, yarn_mscale_all_dim=1.0), 2, 16),
    "no yarn": (shape(**V2), 3, 37),
    "V3, no yarn": (shape(**V3), 3, 37),
    "V2, magnitude on rotated features alone": (shape(**V2, **YARN), 2, 19),
    "V3, magnitudes that differ": (shape(**V3, **YARN, yarn_mscale=0.5, yarn_mscale_all_dim=1.5), 2, 19),
    "other betas": (shape(**YARN, yarn_beta_fast=4.0, yarn_beta_slow=0.5, rope_dim=12, rope_theta=100.0), 2, 90),
    "no shared experts": (shape(shared_experts=0), 2, 16),
    "V3, no shared experts": (shape(**{**V3, "shared_experts": 0}), 2, 16),
    "no dense layers": (shape(dense_layers=0), 2, 16),
    "V3, two dense layers": (shape(**V3, dense_layers=2), 2, 16),
    "only dense layers": (shape(dense_layers=3), 2, 16),
    "V3, not renormalised": (shape(**{**V3, "renormalise": False}), 2, 16),
    "V3, one group": (shape(**{**V3, "groups": 1, "top_groups": 1, "query_rank": 0}), 2, 16),
    "top_k 1": (shape(top_k=1), 2, 16),
    "all experts": (shape(top_k=8), 2, 16),
    "one token": (shape(**V3), 1, 1),
    "tied": (shape(**V2, tie_embeddings=True), 2, 16),
    "eps 1e-2": (shape(**V3, norm_eps=1e-2), 2, 16),
    "wide values": (shape(heads=2, head_dim=6, rope_dim=8, value_dim=20, latent_rank=10), 2, 16),
    "deep, many experts": (shape(**{**V3, "groups": 8, "top_groups": 3}, layers=5, experts=32, dense_layers=3), 2, 23),
}


def drawn(seed):
    """A shape by chance, V2 and V3 in turns."""
    pick = random.Random(seed)
    groups, size = pick.choice((1, 2, 4)), pick.choice((2, 4))
    top_groups = pick.randint(1, groups)
    v3 = bool(seed % 2)
    c = shape(layers=pick.randint(2, 4), hidden=pick.choice((16, 24, 40)), heads=pick.choice((1, 2, 4)),
              head_dim=pick.choice((4, 6, 12)), rope_dim=pick.choice((2, 4, 8)), value_dim=pick.choice((4, 7, 12)),
              latent_rank=pick.choice((8, 20)), query_rank=pick.choice((0, 10)), dense_layers=pick.randint(0, 2),
              dense_hidden=pick.choice((16, 40)), experts=groups * size, groups=groups, top_groups=top_groups,
              top_k=pick.randint(1, top_groups * size), shared_experts=pick.randint(0, 2),
              scoring="sigmoid" if v3 else "softmax", renormalise=v3 and pick.random() < 0.5,
              routed_scale=pick.choice((1.0, 2.5)), rope_theta=pick.choice((100.0, 1e4)),
              **(pick.choice(({}, YARN)) | {"yarn_mscale": 0.707, "yarn_mscale_all_dim": pick.choice((0.707, 1.0))}),
              tie_embeddings=pick.random() < 0.5, norm_eps=pick.choice((1e-6, 1e-5)))  # fmt: skip
    return c, pick.randint(1, 3), pick.randint(2, 50)


SHAPES |= {f"drawn {seed}": drawn(seed) for seed in range(10)}
RENAMED = {
    "attention_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "attention.query_latent": "self_attn.q_a_proj",
    "attention.query_norm": "self_attn.q_a_layernorm",
    "attention.query": "self_attn.q_b_proj",
    "attention.latent": "self_attn.kv_a_proj_with_mqa",
    "attention.latent_norm": "self_attn.kv_a_layernorm",
    "attention.expand": "self_attn.kv_b_proj",
    "attention.output": "self_attn.o_proj",
    "router": "mlp.gate",
}
TOP = {
    "embedding.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}


def theirs_of(c, name, tensors):
    """Our parameter `name`, made from `tensors` by the names of transformers; stacked where we stack."""
    if name in TOP:
        return tensors[TOP[name]]
    _, layer, rest = name.split(".", 2)
    prefix = f"model.layers.{layer}."
    if rest.startswith("experts."):
        return tensors[f"{prefix}mlp.{rest}_proj"]
    if rest.startswith("mlp."):
        inside = "mlp." if int(layer) < c.dense_layers else "mlp.shared_experts."
        parts = ("gate", "up") if "gate_up" in rest else ("down",)
        return torch.cat([tensors[f"{prefix}{inside}{part}_proj.weight"] for part in parts])
    module, _, leaf = rest.rpartition(".")
    if module == "attention.query" and not c.query_rank:
        return tensors[f"{prefix}self_attn.q_proj.weight"]
    return tensors[f"{prefix}{RENAMED[module]}.{leaf}"]


def transformers_model(c, attention="eager"):
    """transformers' model of the shape `c`, with weights large enough that routers and attention are decided."""
    hf = pytest.importorskip("transformers")
    rope = {"rope_type": "default", "rope_theta": c.rope_theta}
    if c.yarn_factor > 1:
        rope |= {
            "rope_type": "yarn",
            "factor": c.yarn_factor,
            "original_max_position_embeddings": c.yarn_length,
            "beta_fast": c.yarn_beta_fast,
            "beta_slow": c.yarn_beta_slow,
            "mscale": c.yarn_mscale,
            "mscale_all_dim": c.yarn_mscale_all_dim,
        }
    sizes = dict(
        vocab_size=c.vocab_size,
        hidden_size=c.hidden,
        intermediate_size=c.dense_hidden,
        moe_intermediate_size=c.expert_hidden,
        num_hidden_layers=c.layers,
        num_attention_heads=c.heads,
        num_key_value_heads=c.heads,
        n_shared_experts=c.shared_experts,
        n_routed_experts=c.experts,
        num_experts_per_tok=c.top_k,
        routed_scaling_factor=c.routed_scale,
        kv_lora_rank=c.latent_rank,
        q_lora_rank=c.query_rank or None,
        qk_rope_head_dim=c.rope_dim,
        qk_nope_head_dim=c.head_dim,
        v_head_dim=c.value_dim,
        n_group=c.groups,
        topk_group=c.top_groups,
        norm_topk_prob=c.renormalise,
        first_k_dense_replace=c.dense_layers,
        rms_norm_eps=c.norm_eps,
        max_position_embeddings=4096,
        rope_parameters=rope,
        tie_word_embeddings=c.tie_embeddings,
        attn_implementation=attention,
        experts_implementation="eager",
    )
    if c.scoring == "sigmoid":
        model = hf.DeepseekV3ForCausalLM(hf.DeepseekV3Config(**sizes))
    else:
        method = "group_limited_greedy" if c.groups > 1 else "greedy"
        model = hf.DeepseekV2ForCausalLM(hf.DeepseekV2Config(**sizes, topk_method=method))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            values = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter.copy_(1 + 0.3 * values)
            elif parameter.numel():  # no shared experts: matrices without rows
                parameter.copy_(values / parameter.shape[-1] ** 0.5)
        for name, buffer in model.named_buffers():
            if "e_score_correction_bias" in name:
                buffer.copy_(torch.randn(buffer.shape, generator=generator) / 8)
    return model


def pair(c, attention="eager"):
    """Both models with the same weights and selection biases."""
    theirs, ours = transformers_model(c, attention), deepseek(c)
    tensors = dict(theirs.named_parameters())
    assert sum(p.numel() for p in tensors.values()) == sum(p.numel() for p in ours.parameters())
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            parameter.copy_(theirs_of(c, name, tensors))
    if c.scoring == "sigmoid":
        for number in range(c.dense_layers, c.layers):
            gate = theirs.model.layers[number].mlp.gate
            ours.layers[str(number)].router.bias.copy_(gate.e_score_correction_bias)
    return theirs, ours


def text(c, batch, sequence):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(c.vocab_size, (batch, sequence + 1), generator=generator)
    return ids[:, :-1].clone(), ids[:, 1:].clone()


def random_model(c, seed=0, place=Place()):
    model = deepseek(shape(**{**c.__dict__, "init_std": 0.2}), place)
    initialise(model, seed)
    return model


def error(a, b):
    assert a.isfinite().all()
    return ((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-12)).item()


def without_gradient(c, sequence, name):
    """Parameters whose true gradient is zero: what is left of it is rounding in both models."""
    lone_weight = c.renormalise and c.top_k == 1
    return (sequence == 1 and "attention.query" in name) or (lone_weight and "router" in name)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", SHAPES)
def test_logits_routing_and_gradients_are_those_of_transformers(name, attention):
    """Logits within 1e-5 of their largest size, gradients within 1e-4 relative (Frobenius), the same experts."""
    c, batch, sequence = SHAPES[name]
    theirs, ours = pair(c, attention)
    inputs, targets = text(c, batch, sequence)
    chosen = []
    for layer in theirs.model.layers[c.dense_layers :]:
        layer.mlp.gate.register_forward_hook(lambda module, args, output: chosen.append(output[1:]))
    logits = theirs(inputs, use_cache=False).logits
    hidden, routing = ours(inputs, torch.arange(sequence))
    difference = ((ours.logits(hidden) - logits).abs().max() / logits.abs().max()).item()
    assert difference < 1e-5

    assert len(routing) == c.layers and routing[: c.dense_layers] == [None] * min(c.dense_layers, c.layers)
    for routed, (weights, ids) in zip(routing[c.dense_layers :], chosen, strict=True):
        order = ids.argsort(dim=1), routed.expert_ids.argsort(dim=1)  # theirs come in no order
        assert torch.equal(routed.expert_ids.gather(1, order[1]), ids.gather(1, order[0]))
        torch.testing.assert_close(
            routed.weights.gather(1, order[1]), weights.gather(1, order[0]), rtol=1e-4, atol=1e-6
        )

    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    loss.backward()
    mine = ours(inputs, torch.arange(sequence), targets=targets)[0] / targets.numel()
    assert mine.item() == pytest.approx(loss.item(), rel=1e-6)
    mine.backward()
    their_grads = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in theirs.named_parameters()}
    whole = torch.cat([g.flatten() for g in their_grads.values()]).norm()
    largest = 0.0
    for n, p in ours.named_parameters():
        their_grad = theirs_of(c, n, their_grads)
        if without_gradient(c, sequence, n):
            assert p.grad.norm() < 1e-5 * whole and their_grad.norm() < 1e-5 * whole, n
        else:
            largest = max(largest, error(p.grad, their_grad))
            assert error(p.grad, their_grad) < 1e-4, n
    print(f"{name}, {attention}: logits {difference:.1e}, gradients {largest:.1e}")  # seen with pytest -rP


@pytest.mark.parametrize("name", ["V2-Lite", "V2", "V3", "V3, two dense layers", "only dense layers"])
def test_decoding_from_the_cache_is_full_recomputation_token_for_token(name):
    c = SHAPES[name][0]
    for cache in families.decodes_as_it_reads(c):  # latents and rotated keys, and nothing that grows with the heads
        assert [t.shape for t in cache.kept] == [(2, 16, c.latent_rank), (2, 16, c.rope_dim)]


@pytest.mark.parametrize("name", ["V2-Lite", "V2", "V3", "no yarn", "no dense layers", "only dense layers"])
def test_packed_documents_are_the_documents_apart(name):
    families.packed_is_apart(SHAPES[name][0])


@pytest.mark.parametrize("cut", [1, 2])
def test_parts_are_the_whole(cut):
    families.parts_are_the_whole(SHAPES["V3"][0], cut)


def test_recomputed_gradients_are_the_same():
    families.recomputed_is_the_same(SHAPES["V3"][0])


@pytest.mark.parametrize("name", ["V2", "V3"])
def test_no_token_sees_the_future(name):
    families.no_token_sees_the_future(SHAPES[name][0])


@pytest.mark.parametrize("name", ["V2", "V3"])
def test_bf16_stays_within_its_rounding(name):
    c = shape(**{**SHAPES[name][0].__dict__, "top_k": 8, "groups": 1, "top_groups": 1})  # no choice can flip
    families.bf16_stays_within_its_rounding(*pair(c), c)


def test_selection_bias_sends_tokens_elsewhere():
    for name in ("V2", "V3"):
        model, (ids, _) = random_model(SHAPES[name][0]), text(BASE, 2, 16)
        model.layers["1"].router.bias[3] = 5.0
        _, routing = model(ids, torch.arange(16))
        assert (routing[1].expert_ids[:, 0] == 3).all() and not (routing[2].expert_ids[:, 0] == 3).all()
        assert "layers.1.router.bias" in model.state_dict()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"rope_dim": 5}, "model.rope_dim: 5 is odd; rotary positions pair features"),
        ({"groups": 3}, "model.groups: 3 does not divide experts, 8"),
        ({"groups": 4, "top_groups": 5}, "model.top_groups: 5 is more than groups, 4"),
        ({"groups": 4}, "model.top_k: 3 is more than the 2 experts of top_groups groups"),
        ({"groups": 8, "top_groups": 8, "scoring": "sigmoid"}, "model.groups: 8 leaves groups of 1"),
        ({"dense_layers": 9}, "model.dense_layers: 9 of 3 layers leaves none with experts"),
        ({"scoring": "tanh"}, "model.scoring: 'tanh' is not one of 'softmax', 'sigmoid'"),
        ({"yarn_factor": 0.5}, "model.yarn_factor: 0.5 is out of range"),
    ],
)
def test_contradictory_configs_are_refused(changes, message):
    with pytest.raises(UserError, match=message.replace(".", r"\.")):
        config_from_tables({"model": {**BASE.__dict__, **changes}}, "run.toml")


def test_magnitudes_of_yarn():
    """DeepSeek-V3's published scale of the softmax: 192^-0.5 (0.1 ln 40 + 1)^2, tables without a magnitude."""
    c = load_config(Path(__file__).parent.parent / "configs" / "deepseek-v3.toml").model
    with torch.device("meta"):
        layer = deepseek(shape(**{**c.__dict__, "layers": 1})).layers["0"]
    assert layer.attention.scale == pytest.approx(192**-0.5 * 1.3688879454**2)
    cos, sin = deepseek(SHAPES["V3"][0]).rotary(torch.arange(5))
    torch.testing.assert_close(cos**2 + sin**2, torch.ones(5, 2))
    cos, sin = deepseek(SHAPES["V2, magnitude on rotated features alone"][0]).rotary(torch.arange(5))
    torch.testing.assert_close(cos**2 + sin**2, torch.full((5, 2), yarn_magnitude(40.0) ** 2))
