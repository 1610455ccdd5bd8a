"""GPT-OSS against transformers, in every corner of the config; decoding, packed documents, parts, bad settings."""

import random
from dataclasses import replace

import families
import pytest
import torch

from pithtrain.config import GptOssConfig, OptimizerConfig, UserError, config_from_tables
from pithtrain.models.gpt_oss import gpt_oss
from pithtrain.models.stages import Place
from pithtrain.train.optimizer import make_optimizer

BASE = GptOssConfig(
    vocab_size=300, layers=3, hidden=32, heads=4, kv_heads=2, head_dim=8, experts=8, top_k=3, expert_hidden=24,
    window=6, yarn_factor=32.0, yarn_length=64, tie_embeddings=False,
)  # fmt: skip

SHAPES = {
    "base": (BASE, 2, 16),
    "window longer than the text": (replace(BASE, window=50), 2, 16),
    "window of one": (replace(BASE, window=1), 2, 16),
    "window, odd and long": (replace(BASE, window=7), 1, 301),
    "no yarn": (replace(BASE, yarn_factor=1.0), 3, 37),
    "other betas": (replace(BASE, yarn_beta_fast=4.0, yarn_beta_slow=0.5, head_dim=12, rope_theta=100.0), 2, 90),
    "published positions": (
        replace(BASE, rope_theta=150_000.0, yarn_length=4096, head_dim=64, heads=2, kv_heads=1),
        1,
        40,
    ),
    "one kv head": (replace(BASE, kv_heads=1), 2, 16),
    "all kv heads": (replace(BASE, kv_heads=4), 2, 16),
    "top_k 1": (replace(BASE, top_k=1), 2, 16),
    "all experts": (replace(BASE, top_k=8), 2, 16),
    "one expert": (replace(BASE, experts=1, top_k=1), 2, 16),
    "one token": (BASE, 1, 1),
    "one layer": (replace(BASE, layers=1), 2, 16),
    "tied": (replace(BASE, tie_embeddings=True), 2, 16),
    "eps 1e-2": (replace(BASE, norm_eps=1e-2), 2, 16),
    "deep, many experts": (replace(BASE, layers=6, experts=32, top_k=6, expert_hidden=8), 2, 23),
}


def drawn(seed):
    """A shape by chance."""
    pick = random.Random(seed)
    kv_heads, experts = pick.choice((1, 2, 3)), pick.choice((3, 8, 17))
    c = replace(BASE, layers=pick.randint(1, 4), hidden=pick.choice((16, 24, 40)), heads=kv_heads * pick.choice((1, 2)),
                kv_heads=kv_heads, head_dim=pick.choice((4, 10, 16)), experts=experts, top_k=pick.randint(1, experts),
                expert_hidden=pick.choice((8, 24)), window=pick.choice((1, 3, 10, 60)),
                yarn_factor=pick.choice((1.0, 4.0, 32.0)), yarn_length=pick.choice((16, 64)),
                rope_theta=pick.choice((100.0, 1e4, 150_000.0)), tie_embeddings=pick.random() < 0.5)  # fmt: skip
    return c, pick.randint(1, 3), pick.randint(2, 50)


SHAPES |= {f"drawn {seed}": drawn(seed) for seed in range(8)}
RENAMED = {
    "attention_norm": "input_layernorm",
    "expert_norm": "post_attention_layernorm",
    "attention": "self_attn",
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.output": "self_attn.o_proj",
    "router": "mlp.router",
}
TOP = {
    "embedding.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}


def theirs_of(name, tensors):
    """Our parameter `name`, made from `tensors` by the names of transformers."""
    if name in TOP:
        return tensors[TOP[name]]
    _, layer, rest = name.split(".", 2)
    module, _, leaf = rest.rpartition(".")
    if module == "experts":
        stem = leaf.removesuffix("_bias")
        theirs = tensors[f"model.layers.{layer}.mlp.experts.{stem}_proj{leaf.removeprefix(stem)}"]
        if stem == "gate_up":  # columns alternate between gate and up
            theirs = torch.cat([theirs[..., ::2], theirs[..., 1::2]], dim=-1)
        return theirs.mT if theirs.dim() == 3 else theirs
    return tensors[f"model.layers.{layer}.{RENAMED[module]}.{leaf.removeprefix('score_')}"]


def pair(c):
    """transformers' model and ours with the same weights, large enough to decide routers and to reach the clamps."""
    hf = pytest.importorskip("transformers.models.gpt_oss.modeling_gpt_oss")
    rope = {"rope_type": "default", "rope_theta": c.rope_theta}
    if c.yarn_factor > 1:
        rope |= {
            "rope_type": "yarn",
            "factor": c.yarn_factor,
            "original_max_position_embeddings": c.yarn_length,
            "beta_fast": c.yarn_beta_fast,
            "beta_slow": c.yarn_beta_slow,
            "truncate": False,
        }
    config = hf.GptOssConfig(
        vocab_size=c.vocab_size,
        num_hidden_layers=c.layers,
        hidden_size=c.hidden,
        intermediate_size=c.expert_hidden,
        num_attention_heads=c.heads,
        num_key_value_heads=c.kv_heads,
        head_dim=c.head_dim,
        num_local_experts=c.experts,
        num_experts_per_tok=c.top_k,
        sliding_window=c.window,
        rms_norm_eps=c.norm_eps,
        tie_word_embeddings=c.tie_embeddings,
        rope_parameters=rope,
        max_position_embeddings=4096,
        attn_implementation="eager",
        experts_implementation="eager",
    )
    theirs, ours = hf.GptOssForCausalLM(config), gpt_oss(c)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            values = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                values = 1 + 0.3 * values
            elif name.endswith("gate_up_proj"):
                values = 4 * values / parameter.shape[1] ** 0.5
            elif parameter.dim() > 1 and "bias" not in name:
                values = values / parameter.shape[-1] ** 0.5
            parameter.copy_(values)
        tensors = dict(theirs.named_parameters())
        assert sum(p.numel() for p in tensors.values()) == sum(p.numel() for p in ours.parameters())
        for name, parameter in ours.named_parameters():
            parameter.copy_(theirs_of(name, tensors))
    return theirs, ours


@pytest.mark.parametrize("name", SHAPES)
def test_logits_routing_and_gradients_are_those_of_transformers(name):
    c, batch, sequence = SHAPES[name]

    def zero_gradient(parameter):
        # A lone weight is 1 whatever the score. (The key's bias has a gradient here: a sink sets the level.)
        return c.top_k == 1 and "router" in parameter

    families.compare(c, *pair(c), theirs_of, batch, sequence, zero_gradient=zero_gradient)


@pytest.mark.parametrize("name", ["base", "window of one", "window longer than the text", "no yarn"])
def test_decoding_from_the_cache_is_full_recomputation_token_for_token(name):
    c = SHAPES[name][0]
    caches = families.decodes_as_it_reads(c)
    for number, cache in enumerate(caches):  # through a window no more is kept than it spans
        kept = min(16, c.window - 1) if number % 2 == 0 else 16
        assert [t.shape for t in cache.kept] == [(2, c.kv_heads, kept, c.head_dim)] * 2


@pytest.mark.parametrize("name", ["base", "window of one", "window longer than the text", "no yarn"])
def test_packed_documents_are_the_documents_apart(name):
    families.packed_is_apart(SHAPES[name][0])


@pytest.mark.parametrize("cut", [1, 2])
def test_parts_are_the_whole(cut):
    families.parts_are_the_whole(BASE, cut)


def test_recomputed_gradients_are_the_same():
    families.recomputed_is_the_same(BASE)


def test_no_token_sees_the_future():
    families.no_token_sees_the_future(BASE)


def test_bf16_stays_within_its_rounding():
    c = replace(BASE, top_k=8)
    families.bf16_stays_within_its_rounding(*pair(c), c)


def test_windows_alternate_and_limit_what_is_seen():
    windows = [layer.attention.window for layer in gpt_oss(replace(BASE, layers=4)).layers.values()]
    assert windows == [6, None, 6, None]
    part = gpt_oss(replace(BASE, layers=4), Place(layers=range(1, 3), first=False))
    assert [layer.attention.window for layer in part.layers.values()] == [None, 6]

    c = replace(BASE, layers=1)
    model, (ids, _) = families.random_model(c), families.text(c, 1, 20)
    changed = ids.clone()
    changed[0, 6] = (ids[0, 6] + 1) % c.vocab_size
    before, after = (model(x, torch.arange(20))[0][0] for x in (ids, changed))
    felt = (before - after).abs().amax(dim=1) > 1e-5
    assert felt.nonzero().flatten().tolist() == list(range(6, 12))


def test_selection_bias_sends_tokens_elsewhere_and_leaves_the_weights():
    model, (ids, _) = families.random_model(BASE), families.text(BASE, 2, 16)
    model.layers["1"].router.bias[3] = 50.0
    routing = model(ids, torch.arange(16))[1]
    assert (routing[1].expert_ids == 3).any(dim=1).all() and not (routing[0].expert_ids == 3).any(dim=1).all()
    chosen = routing[1].probs.gather(1, routing[1].expert_ids)
    torch.testing.assert_close(routing[1].weights, chosen / chosen.sum(dim=1, keepdim=True))
    assert "layers.1.router.bias" in model.state_dict()


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"kv_heads": 3}, "model.kv_heads: 3 does not divide heads, 8"),
        ({"head_dim": 7}, "model.head_dim: 7 is odd"),
        ({"window": 0}, "model.window: 0 is out of range"),
        ({"windw": 4}, "model.windw: no such setting; did you mean 'window'?"),
    ],
)
def test_bad_settings_are_refused_in_one_line(settings, message):
    with pytest.raises(UserError) as caught:
        config_from_tables({"model": {"family": "gpt-oss", **settings}}, "x.toml")
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_matrices_are_decayed_and_vectors_not():
    """A layer's experts are stacked: their biases have two axes and are vectors still."""
    named = dict(gpt_oss(BASE).named_parameters())
    decays = {p: group["weight_decay"] for group in make_optimizer(named, OptimizerConfig()).param_groups
              for p in group["params"]}  # fmt: skip
    vectors = {name for name, p in named.items() if decays[p] == 0}
    assert vectors == {name for name in named if name.endswith(("bias", "sinks")) or "norm" in name}
    assert any("experts" in name for name in vectors) and set(decays.values()) == {0.0, OptimizerConfig().weight_decay}
