"""The whole model against transformers' Qwen3-MoE, and what must be true of it alone."""

import copy
import dataclasses
import random

import families
import pytest
import torch
import torch.nn.functional as F

from pithtrain.config import Qwen3MoeConfig
from pithtrain.models.decoder import count_parameters, initialise
from pithtrain.models.qwen3_moe import qwen3_moe
from pithtrain.models.stages import Place

BASE = Qwen3MoeConfig(
    vocab_size=300, layers=2, hidden=32, heads=4, kv_heads=2, head_dim=8, experts=8, top_k=2, expert_hidden=24
)


def shape(**changes):
    return Qwen3MoeConfig(**{**BASE.__dict__, **changes})


SHAPES = {
    "base": (shape(), 2, 16),
    "untied": (shape(tie_embeddings=False), 2, 16),
    "not renormalised": (shape(renormalise=False), 2, 16),
    "one kv head": (shape(kv_heads=1), 2, 16),
    "all kv heads": (shape(kv_heads=4), 2, 16),
    "top_k 1": (shape(top_k=1), 2, 16),
    "top_k 1, not renormalised": (shape(top_k=1, renormalise=False), 2, 16),
    "all experts": (shape(top_k=8), 2, 16),
    "one expert": (shape(experts=1, top_k=1), 2, 16),
    "odd sequence": (shape(), 3, 37),
    "one token": (shape(), 1, 1),
    "theta 1e6, long": (shape(rope_theta=1e6), 1, 301),
    "theta 100, eps 1e-2": (shape(rope_theta=100.0, norm_eps=1e-2), 2, 33),
    "heads wider than hidden": (shape(heads=6, kv_heads=3, head_dim=10, tie_embeddings=False), 2, 19),
    "deep, many experts": (shape(layers=5, experts=32, top_k=6, expert_hidden=8), 2, 23),
}


def drawn(seed):
    """A shape by chance."""
    pick = random.Random(seed)
    kv_heads, experts = pick.choice((1, 2, 3)), pick.choice((3, 8, 17))
    c = shape(layers=pick.randint(1, 4), hidden=pick.choice((16, 24, 40)), heads=kv_heads * pick.choice((1, 2, 3)),
              kv_heads=kv_heads, head_dim=pick.choice((4, 10, 16)), experts=experts, top_k=pick.randint(1, experts),
              expert_hidden=pick.choice((8, 20)), renormalise=pick.random() < 0.5, tie_embeddings=pick.random() < 0.5,
              rope_theta=pick.choice((100.0, 1e4, 1e6)), norm_eps=pick.choice((1e-6, 1e-5)))  # fmt: skip
    return c, pick.randint(1, 3), pick.randint(2, 50)


SHAPES |= {f"drawn {seed}": drawn(seed) for seed in range(8)}
RENAMED = {
    "attention_norm": "input_layernorm",
    "expert_norm": "post_attention_layernorm",
    "attention.query_norm": "self_attn.q_norm",
    "attention.key_norm": "self_attn.k_norm",
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.output": "self_attn.o_proj",
    "router": "mlp.gate",
}
TOP = {
    "embedding.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}


def their_name(name):
    """The name in transformers of our parameter `name`."""
    if name in TOP:
        return TOP[name]
    _, layer, rest = name.split(".", 2)
    if rest.startswith("experts."):
        return f"model.layers.{layer}.mlp.{rest}_proj"
    module, _, leaf = rest.rpartition(".")
    return f"model.layers.{layer}.{RENAMED[module]}.{leaf}"


def transformers_model(c, attention="eager"):
    """transformers' model of the shape `c`, with weights large enough that routers and attention are decided."""
    hf = pytest.importorskip("transformers.models.qwen3_moe.modeling_qwen3_moe")
    config = hf.Qwen3MoeConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.hidden,
        num_hidden_layers=c.layers,
        num_attention_heads=c.heads,
        num_key_value_heads=c.kv_heads,
        head_dim=c.head_dim,
        moe_intermediate_size=c.expert_hidden,
        num_experts=c.experts,
        num_experts_per_tok=c.top_k,
        norm_topk_prob=c.renormalise,
        rms_norm_eps=c.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
        tie_word_embeddings=c.tie_embeddings,
        attn_implementation=attention,
        experts_implementation="eager",
    )
    model = hf.Qwen3MoeForCausalLM(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            values = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter.copy_(1 + 0.3 * values)
            else:
                parameter.copy_(values / parameter.shape[-1] ** 0.5)
    return model


def copy_weights(theirs, ours):
    source = dict(theirs.named_parameters())
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            parameter.copy_(source.pop(their_name(name)))
    assert not source, f"left over: {sorted(source)}"


def pair(c, attention="eager"):
    theirs, ours = transformers_model(c, attention), qwen3_moe(c)
    copy_weights(theirs, ours)
    return theirs, ours


def text(c, batch, sequence):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(c.vocab_size, (batch, sequence + 1), generator=generator)
    inputs, targets = ids[:, :-1].clone(), ids[:, 1:].clone()
    if targets.numel() > 1:
        targets[torch.rand(targets.shape, generator=generator) < 0.2] = -100
    return inputs, targets


def our_loss(model, inputs, targets):
    return model(inputs, torch.arange(inputs.shape[1]), targets=targets)[0] / (targets != -100).sum()


def run(model, inputs):
    return model(inputs, torch.arange(inputs.shape[1]))


def error(a, b):
    assert a.isfinite().all()
    return ((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-12)).item()


def without_gradient(c, sequence, name):
    """Parameters whose true gradient is zero: what is left of it is rounding in both models."""
    lone_score = sequence == 1 and any(part in name for part in ("query", "key"))
    lone_weight = (c.renormalise and c.top_k == 1) or c.experts == 1
    return lone_score or (lone_weight and "router" in name)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", SHAPES)
def test_logits_routing_and_gradients_are_those_of_transformers(name, attention):
    """Logits within 1e-5 of their largest size, gradients within 1e-4 relative (Frobenius), the same experts."""
    c, batch, sequence = SHAPES[name]
    theirs, ours = pair(c, attention)
    inputs, targets = text(c, batch, sequence)
    output = theirs(inputs, output_router_logits=True, use_cache=False)
    hidden, routing = run(ours, inputs)
    difference = ((ours.logits(hidden) - output.logits).abs().max() / output.logits.abs().max()).item()
    assert difference < 1e-5

    assert len(routing) == len(output.router_logits) == c.layers
    for routed, logits in zip(routing, output.router_logits, strict=True):
        probs = logits.softmax(dim=-1)
        assert torch.equal(routed.expert_ids, probs.topk(c.top_k).indices)
        torch.testing.assert_close(routed.probs, probs, rtol=1e-4, atol=1e-6)

    loss = F.cross_entropy(output.logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
    loss.backward()
    mine = our_loss(ours, inputs, targets)
    assert mine.item() == pytest.approx(loss.item(), rel=1e-6)
    mine.backward()
    their_grads = {n: p.grad for n, p in theirs.named_parameters()}
    whole = torch.cat([g.flatten() for g in their_grads.values()]).norm()
    largest = 0.0
    for n, p in ours.named_parameters():
        their_grad = their_grads[their_name(n)]
        if without_gradient(c, sequence, n):
            assert p.grad.norm() < 1e-5 * whole and their_grad.norm() < 1e-5 * whole, n
        else:
            largest = max(largest, error(p.grad, their_grad))
            assert error(p.grad, their_grad) < 1e-4, n
    print(f"{name}, {attention}: logits {difference:.1e}, gradients {largest:.1e}")  # seen with pytest -rP


@pytest.mark.parametrize("name", ["base", "not renormalised", "theta 1e6, long", "one kv head"])
def test_decoding_from_the_cache_is_full_recomputation_token_for_token(name):
    c = SHAPES[name][0]
    for cache in families.decodes_as_it_reads(c):
        assert [t.shape for t in cache.kept] == [(2, c.kv_heads, 16, c.head_dim)] * 2


@pytest.mark.parametrize("name", ["base", "not renormalised", "one kv head", "heads wider than hidden"])
def test_packed_documents_are_the_documents_apart(name):
    families.packed_is_apart(SHAPES[name][0])


def test_parts_are_the_whole():
    families.parts_are_the_whole(shape(tie_embeddings=False, layers=3), 1)


def test_recomputed_gradients_are_the_same():
    families.recomputed_is_the_same(BASE)


def test_balance_losses_meet_those_of_transformers():
    """Its loss is taken over all layers' tokens at once and counts each of the top_k choices."""
    from pithtrain.layers.balance import switch_loss
    from pithtrain.layers.router import expert_load

    c = shape(layers=1)
    theirs, ours = pair(c)
    inputs, _ = text(c, 2, 16)
    (routed,) = run(ours, inputs)[1]
    expected = theirs(inputs, output_router_logits=True, use_cache=False).aux_loss
    torch.testing.assert_close(
        c.top_k * switch_loss(routed.probs, expert_load(routed.expert_ids.flatten(), c.experts)), expected
    )


@pytest.mark.parametrize("name", ["base", "untied", "deep, many experts", "all experts"])
def test_count_parameters_against_transformers(name):
    c = SHAPES[name][0]
    total, active = count_parameters(qwen3_moe(c), c.experts, c.top_k)
    theirs = transformers_model(c)
    assert total == theirs.num_parameters()
    lean = transformers_model(shape(**{**c.__dict__, "experts": c.top_k}))  # only the experts a token visits
    assert active == lean.num_parameters() + c.layers * (c.experts - c.top_k) * c.hidden


def random_model(c, seed=0):
    model = qwen3_moe(dataclasses.replace(c, init_std=0.2))
    initialise(model, seed)
    return model


def test_no_token_sees_the_future():
    """Through embedding, attention, routing and experts: the gradient of a position by later ones is zero."""
    model = random_model(shape(tie_embeddings=False))
    inputs = torch.arange(20, 32)[None]  # every token once, so a row of the embedding is a position
    for t in (0, 5, 11):
        hidden, _ = run(model, inputs)
        (grad,) = torch.autograd.grad(
            hidden[0, t].square().sum() + model.logits(hidden)[0, t].sum(), model.embedding.weight
        )
        reach = grad[20:32].abs().amax(dim=1)
        assert not reach[t + 1 :].any() and (reach[: t + 1] > 0).all()
    changed = inputs.clone()
    changed[0, 6] = 99
    before, after = run(model, inputs)[0][0], run(model, changed)[0][0]
    torch.testing.assert_close(before[:6], after[:6], rtol=1e-5, atol=1e-5)
    assert ((before[6:] - after[6:]).abs().amax(dim=1) > 1e-3).all()


def test_sequences_of_a_batch_do_not_mix():
    model = random_model(BASE)
    inputs, _ = text(BASE, 3, 9)
    together = run(model, inputs)[0]
    apart = torch.cat([run(model, row[None])[0] for row in inputs])
    torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_accumulated_gradient_is_the_gradient_of_the_batch(size):
    model = random_model(BASE)
    inputs, targets = text(BASE, 6, 13)
    our_loss(model, inputs, targets).backward()
    whole = {n: p.grad for n, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    tokens = (targets != -100).sum()
    for start in range(0, 6, size):
        piece = slice(start, start + size)
        (model(inputs[piece], torch.arange(inputs.shape[1]), targets=targets[piece])[0] / tokens).backward()
    for n, p in model.named_parameters():
        assert error(p.grad, whole[n]) < 1e-5, n


def test_a_step_is_the_same_to_the_last_bit_twice():
    runs = []
    for _ in range(2):
        model = random_model(BASE)
        our_loss(model, *text(BASE, 2, 16)).backward()
        runs.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("top_k", [2, 8])
def test_bf16_stays_within_its_rounding(top_k):
    """As near to fp32 as transformers' bf16 model is; with all experts chosen no choice can flip, so within 2%."""
    c = shape(top_k=top_k)
    theirs, ours = pair(c)
    inputs, targets = text(c, 4, 32)
    hidden, routing = run(ours, inputs)
    half = qwen3_moe(c, Place(dtype=torch.bfloat16))
    half.load_state_dict(ours.state_dict())
    half_hidden, half_routing = run(half, inputs)
    assert half_hidden.dtype == torch.bfloat16
    assert all(r.probs.dtype == r.weights.dtype == torch.float32 for r in half_routing)
    half_logits = ours.logits(half_hidden)
    assert half_logits.dtype == torch.float32
    with torch.no_grad():
        their_half = copy.deepcopy(theirs).bfloat16()(inputs, use_cache=False).logits
    full = ours.logits(hidden)
    assert 1e-4 < error(half_logits, full) < 1.25 * error(their_half, full) + 1e-3
    if top_k == c.experts:
        assert error(half_hidden, hidden) < 2e-2
    for routed, other in zip(routing, half_routing, strict=True):
        same = routed.expert_ids.sort().values == other.expert_ids.sort().values
        assert same.float().mean() > 0.95

    loss, half_loss = our_loss(ours, inputs, targets), our_loss(half, inputs, targets)
    assert half_loss.item() == pytest.approx(loss.item(), rel=1e-2)
    grads = torch.autograd.grad(loss, list(ours.parameters()))
    half_grads = torch.autograd.grad(half_loss, list(half.parameters()))
    assert all(g.dtype == torch.float32 for g in half_grads)
    flat, half_flat = (torch.cat([g.flatten() for g in gs]) for gs in (grads, half_grads))
    if top_k == c.experts:
        assert error(half_flat, flat) < 3e-2


def test_no_grad_makes_no_graph_and_the_same_hidden_states():
    model = random_model(BASE)
    inputs, _ = text(BASE, 2, 16)
    with torch.no_grad():
        quiet, routing = run(model, inputs)
    loud, _ = run(model, inputs)
    assert not quiet.requires_grad and not any(r.weights.requires_grad for r in routing)
    assert torch.equal(quiet, loud)


def test_selection_bias_sends_tokens_elsewhere():
    model = random_model(BASE)
    inputs, _ = text(BASE, 2, 16)
    model.layers["1"].router.bias[3] = 5.0
    _, routing = run(model, inputs)
    assert (routing[1].expert_ids[:, 0] == 3).all() and not (routing[0].expert_ids[:, 0] == 3).all()
    assert "layers.1.router.bias" in model.state_dict()


class Reordered(torch.nn.Module):
    """A model whose parameters come in the opposite order."""

    def __init__(self, model):
        super().__init__()
        self.model, self.config, self.place = model, model.config, model.place

    def named_parameters(self):
        return reversed(list(self.model.named_parameters()))


def test_first_weights_do_not_depend_on_order_or_on_the_global_generator():
    one, other = qwen3_moe(BASE), qwen3_moe(BASE)
    torch.manual_seed(1)
    initialise(one, seed=3)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    initialise(Reordered(other), seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    for (n, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), n
    deeper = qwen3_moe(shape(layers=4))  # a name has the same weights whatever else the model holds
    initialise(deeper, seed=3)
    assert torch.equal(deeper.layers["1"].experts.gate_up, one.layers["1"].experts.gate_up)


@pytest.mark.parametrize("seeds", [(0, 1), (1, 2), (0, 2**32), (7, 2**63)])
def test_first_weights_differ_by_seed_and_by_name(seeds):
    models = [random_model(shape(tie_embeddings=False), seed) for seed in seeds]
    for (n, a), b in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        if a.dim() > 1:
            correlation = torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]
            assert abs(correlation) < 6 / a.numel() ** 0.5, n
        else:
            assert torch.equal(a, torch.ones_like(a)), n
    first, second = models[0].layers.values()
    assert not torch.equal(first.router.weight, second.router.weight)
    assert not torch.equal(models[0].embedding.weight, models[0].head.weight)


def test_size_of_first_weights():
    c = shape(hidden=64, layers=8)
    model = qwen3_moe(c)
    initialise(model, seed=0)
    for n, p in model.named_parameters():
        if p.dim() > 1:
            expected = 0.02 / 4 if "output" in n or "down" in n else 0.02
            assert p.std().item() == pytest.approx(expected, rel=6 / p.numel() ** 0.5), n
            assert abs(p.mean().item()) < 6 * expected / p.numel() ** 0.5, n


@pytest.mark.gpu
def test_gpu_kernels_of_experts_and_router_are_as_exact_as_torch(monkeypatch):
    """Loss and all gradients of a bf16 model, by kernels and by the CPU's plan, each against the plan in fp32."""
    from pithtrain.layers import experts, router

    config = Qwen3MoeConfig(
        hidden=256, heads=4, head_dim=64, experts=16, top_k=4, expert_hidden=128, vocab_size=512, layers=3, init_std=0.1
    )
    ids = torch.randint(512, (4, 257), generator=torch.Generator().manual_seed(0)).cuda()
    calls = []

    def run(kernels, dtype):
        counted = lambda kernel: lambda *a, **k: (calls.append(kernel), kernel(*a, **k))[1]  # noqa: E731
        with monkeypatch.context() as patch:
            patch.setattr(experts, "triton_expert_mlp", counted(experts.triton_expert_mlp))
            patch.setattr(router, "triton_route", counted(router.triton_route))
            if not kernels:
                patch.setattr(experts, "kernels_take", lambda *_: False)
                patch.setattr(router, "kernels_serve", lambda _: False)
            model = qwen3_moe(config, Place(dtype=dtype)).cuda()
            initialise(model, 0)
            for layer in model.layers.values():  # what the kernel takes, so that all choose nearly the same experts
                layer.router.weight.data = layer.router.weight.data.bfloat16().float()
            loss = model(ids[:, :-1], torch.arange(256, device="cuda"), targets=ids[:, 1:])[0]
            loss.backward()
        return loss.item(), torch.cat([p.grad.flatten().double() for p in model.parameters()])

    kernel_loss, kernel_grads = run(True, torch.bfloat16)
    assert len(calls) == 2 * config.layers
    torch_loss, torch_grads = run(False, torch.bfloat16)
    true_loss, true = run(False, torch.float32)
    assert len(calls) == 2 * config.layers
    ours, theirs = ((grads - true).norm() / true.norm() for grads in (kernel_grads, torch_grads))
    print(f"loss {kernel_loss}, torch {torch_loss}, fp32 {true_loss}; gradients' errors {ours:.1e}, torch {theirs:.1e}")
    assert abs(kernel_loss / true_loss - 1) < 1e-3
    assert ours < 1.2 * theirs
