"""What tests of several model families ask: the same numbers as transformers, decoding, packed documents, parts."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from pithtrain.config import Config, RunConfig, to_toml
from pithtrain.layers.attention import Cache
from pithtrain.models.build import build
from pithtrain.models.decoder import initialise
from pithtrain.models.stages import Place
from pithtrain.train.checkpoint import save_checkpoint


def error(a, b):
    assert a.isfinite().all()
    return ((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-12)).item()


def text(config, batch, sequence):
    """Token ids and targets, some of which do not count."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(config.vocab_size, (batch, sequence + 1), generator=generator)
    inputs, targets = ids[:, :-1].clone(), ids[:, 1:].clone()
    if targets.numel() > 1:
        targets[torch.rand(targets.shape, generator=generator) < 0.2] = -100
    return inputs, targets


def random_model(config, place=Place(), biases=0.3):
    """Weights large enough that routers and attention are decided; what modules set themselves is moved from there."""
    model = build(replace(config, init_std=0.2), place)
    initialise(model, 0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 or name.endswith(("bias", "convolution")):
                generator = torch.Generator().manual_seed(sum(map(ord, name)))
                parameter += biases * torch.randn(parameter.shape, generator=generator)
    return model


def make_run(config, run, step=3, model=None):
    """A run folder as the trainer leaves it, with random weights."""
    model = model or random_model(config, biases=0.1)
    run.mkdir(parents=True)
    (run / "config.toml").write_text(to_toml(Config(run=RunConfig(name=run.name), model=config)))
    save_checkpoint(run / "checkpoints", step, {f"model.{n}": t for n, t in model.state_dict().items()}, keep=1)
    return model


def compare(config, theirs, ours, theirs_of, batch, sequence, limit=1e-5, zero_gradient=lambda name: False):
    """Logits within `limit` of their largest size, gradients within 10 `limit` relative (Frobenius), the same experts.

    `theirs_of(name, tensors)` makes our parameter `name` of theirs; `zero_gradient` tells those whose true gradient
    is zero, what is left of it being rounding in both models.
    """
    inputs, targets = text(config, batch, sequence)
    output = theirs(inputs, output_router_logits=True, use_cache=False)
    logits = output.logits
    hidden, routing = ours(inputs, torch.arange(sequence))
    difference = ((ours.logits(hidden) - logits).abs().max() / logits.abs().max()).item()
    assert difference < limit, f"logits differ by {difference:.1e}"
    assert len(routing) == len(output.router_logits) == config.layers
    for routed, scores in zip(routing, output.router_logits, strict=True):
        assert torch.equal(routed.expert_ids, scores.topk(config.top_k).indices)
        probs = scores.softmax(dim=-1)
        torch.testing.assert_close(routed.probs, probs, rtol=1e-4, atol=1e-6)
        chosen = probs.gather(1, routed.expert_ids)
        torch.testing.assert_close(routed.weights, chosen / chosen.sum(dim=1, keepdim=True), rtol=1e-4, atol=1e-6)

    counted = (targets != -100).sum()
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
    loss.backward()
    mine = ours(inputs, torch.arange(sequence), targets=targets)[0] / counted
    assert mine.item() == pytest.approx(loss.item(), rel=1e-6)
    mine.backward()
    grads = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in theirs.named_parameters()}
    whole = torch.cat([g.flatten() for g in grads.values()]).norm()
    largest = 0.0
    for name, parameter in ours.named_parameters():
        their_grad = theirs_of(name, grads)
        if zero_gradient(name):
            assert parameter.grad.norm() < 1e-5 * whole and their_grad.norm() < 1e-5 * whole, name
        else:
            largest = max(largest, error(parameter.grad, their_grad))
            assert error(parameter.grad, their_grad) < 10 * limit, name
    print(f"logits {difference:.1e}, gradients {largest:.1e}")  # seen with pytest -rP


def decodes_as_it_reads(config, limit=1e-5, prompt=5, steps=12):
    """A prompt in one piece, then the likeliest token again and again from the caches alone; gives the caches."""
    model, (ids, _) = random_model(config), text(config, 2, prompt)
    caches = [Cache() for _ in model.layers]
    with torch.no_grad():
        step, start = ids, 0
        for _ in range(steps):
            cached = model.logits(model(step, torch.arange(start, ids.shape[1]), caches=caches)[0][:, -1])
            whole = model.logits(model(ids, torch.arange(ids.shape[1]))[0][:, -1])
            assert error(cached, whole) < limit
            assert torch.equal(cached.argmax(dim=-1), whole.argmax(dim=-1))
            start, step = ids.shape[1], whole.argmax(dim=-1, keepdim=True)
            ids = torch.cat([ids, step], dim=1)
    return caches


def packed_is_apart(config, limit=1e-5, stretch=1):
    """Two rows of several documents: hidden states, experts, and the gradient of the sum."""
    row = 20 * stretch
    model, (ids, targets) = random_model(config), text(config, 2, row)
    cuts = [stretch * cut for cut in (0, 7, 8, 20, 33, 40)]
    lengths = [end - start for start, end in zip(cuts, cuts[1:], strict=False)]  # noqa: RUF007
    positions = torch.cat([torch.arange(n) for n in lengths]).view(2, row)
    documents = torch.tensor(cuts, dtype=torch.int32)
    packed, routing = model(ids, positions, documents)
    pieces = list(zip(ids.view(1, -1).split(lengths, 1), targets.view(1, -1).split(lengths, 1), strict=True))
    rows = [model(row, torch.arange(row.shape[1])) for row, _ in pieces]
    assert error(packed.view(1, 2 * row, -1), torch.cat([hidden for hidden, _ in rows], dim=1)) < limit
    for number, routed in enumerate(routing):
        if routed is not None:
            assert torch.equal(routed.expert_ids, torch.cat([r[number].expert_ids for _, r in rows]))
    assert error(packed, model(ids, torch.arange(row))[0]) > 1e-2

    parameters = list(model.parameters())
    together = torch.autograd.grad(model(ids, positions, documents, targets)[0], parameters)
    losses = [model(row, torch.arange(row.shape[1]), targets=target)[0] for row, target in pieces]
    for (name, _), a, b in zip(
        model.named_parameters(), together, torch.autograd.grad(sum(losses), parameters), strict=True
    ):
        assert error(a, b) < 10 * limit, name


def parts_are_the_whole(config, cut):
    """Layers below `cut` and from it on, as two parts: the same loss and gradients to the last bit."""
    ids, targets = text(config, 2, 9)
    front = random_model(config, Place(layers=range(cut), last=False))
    back = random_model(config, Place(layers=range(cut, config.layers), first=False))
    whole = random_model(config)
    hidden, _ = front(ids, torch.arange(9))
    loss, _ = back(hidden, torch.arange(9), targets=targets)
    expected, _ = whole(ids, torch.arange(9), targets=targets)
    assert torch.equal(loss, expected)
    loss.backward()
    expected.backward()
    grads = {n: p.grad for part in (front, back) for n, p in part.named_parameters()}
    assert grads.keys() == {n for n, _ in whole.named_parameters()}
    assert all(torch.equal(grads[n], p.grad) for n, p in whole.named_parameters())


def recomputed_is_the_same(config):
    ids, targets = text(config, 2, 9)
    grads = []
    for recompute in ("none", "attention", "experts", "layer"):
        model = random_model(config, Place(recompute=recompute))
        model(ids, torch.arange(9), targets=targets)[0].backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for other in grads[1:] for a, b in zip(grads[0], other, strict=True))


def no_token_sees_the_future(config):
    model, (ids, _) = random_model(config), text(config, 1, 12)
    changed = ids.clone()
    changed[0, 6] = (ids[0, 6] + 1) % config.vocab_size
    before, after = (model(x, torch.arange(12))[0][0] for x in (ids, changed))
    torch.testing.assert_close(before[:6], after[:6], rtol=1e-5, atol=1e-5)
    assert ((before[6:] - after[6:]).abs().amax(dim=1) > 1e-4).all()


def bf16_stays_within_its_rounding(theirs, ours, config):
    """As near to fp32 as transformers' own bf16; routing and gradients stay fp32. All experts are to be chosen."""
    assert config.top_k == config.experts  # so no choice can flip
    half = build(config, Place(dtype=torch.bfloat16))
    half.load_state_dict(ours.state_dict())
    inputs, targets = text(config, 4, 32)
    hidden, routing = half(inputs, torch.arange(32))
    assert hidden.dtype == torch.bfloat16
    assert all(r.weights.dtype == r.probs.dtype == torch.float32 for r in routing if r is not None)
    full = ours.logits(ours(inputs, torch.arange(32))[0])
    with torch.no_grad():
        their_half = theirs.bfloat16()(inputs, use_cache=False).logits
    assert 1e-4 < error(half.logits(hidden), full) < 1.25 * error(their_half, full) + 1e-3
    half(inputs, torch.arange(32), targets=targets)[0].backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in half.parameters())
