"""Multi-head latent attention against its definition, written out head by head in float64."""

import pytest
import torch

from pithtrain.layers.attention import Cache, OneRank, Sequences
from pithtrain.layers.latent_attention import LatentAttention
from pithtrain.layers.rotary import rotary_table, rotate

SHAPES = {  # heads, head_dim, rope_dim, value_dim, latent_rank, query_rank
    "published proportions": (4, 8, 4, 8, 16, 12),
    "queries of full rank": (4, 8, 4, 8, 16, 0),
    "one head, wide values": (1, 4, 2, 10, 6, 5),
    "latent of one feature": (3, 6, 2, 3, 1, 0),
}


def error(a, b):
    assert a.isfinite().all()
    return ((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-12)).item()


def make(name, hidden=24):
    heads, head_dim, rope_dim, value_dim, latent_rank, query_rank = SHAPES[name]
    torch.manual_seed(0)
    layer = LatentAttention(
        hidden, heads, head_dim, rope_dim, value_dim, latent_rank, query_rank, (head_dim + rope_dim) ** -0.5, OneRank()
    )
    for norm in (layer.query_norm, layer.latent_norm):
        if norm is not None:
            torch.nn.init.normal_(norm.weight)
    return layer


def sequences(layer, positions, documents=None):
    return Sequences(*rotary_table(positions, layer.rope_dim, 1e4), documents)


def norm(x, weight):
    return weight * x / (x.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()


def definition(layer, x, weights):
    """The formulas of the paper for one batch of whole sequences, with `weights` by name, in their dtype."""
    c, (cos, sin) = layer, rotary_table(torch.arange(x.shape[1]), layer.rope_dim, 1e4)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    source = x
    if c.query_latent is not None:
        source = norm(x @ weights["query_latent.weight"].t(), weights["query_norm.weight"])
    down = x @ weights["latent.weight"].t()
    latent = norm(down[..., : c.latent_rank], weights["latent_norm.weight"])
    shared = rotate(down[..., None, c.latent_rank :], cos, sin, neighbours=True)[..., 0, :]
    future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
    mixed = []
    for query, expand in zip(
        weights["query.weight"].chunk(c.heads), weights["expand.weight"].chunk(c.heads), strict=True
    ):
        q, k, v = source @ query.t(), latent @ expand[: c.head_dim].t(), latent @ expand[c.head_dim :].t()
        turned = rotate(q[..., None, c.head_dim :], cos, sin, neighbours=True)[..., 0, :]
        scores = q[..., : c.head_dim] @ k.transpose(1, 2) + turned @ shared.transpose(1, 2)
        scores = (scores * c.scale).masked_fill(future, -torch.inf)
        mixed.append(scores.softmax(dim=-1) @ v)
    return torch.cat(mixed, dim=-1) @ weights["output.weight"].t()


@pytest.mark.parametrize("sequence", [1, 13])
@pytest.mark.parametrize("name", SHAPES)
def test_output_and_gradients_against_the_definition(name, sequence):
    layer = make(name)
    x = torch.randn(2, sequence, 24, requires_grad=True)
    exact = {n: p.detach().double().requires_grad_() for n, p in layer.named_parameters()}
    x64 = x.detach().double().requires_grad_()
    ours, true = layer(x, sequences(layer, torch.arange(sequence))), definition(layer, x64, exact)
    assert error(ours, true) < 1e-6
    seed = torch.randn(ours.shape)
    ours.backward(seed)
    true.backward(seed.double())
    whole = torch.cat([p.grad.flatten() for p in exact.values()]).norm()
    for n, p in [*layer.named_parameters(), ("x", x)]:
        g = x64.grad if n == "x" else exact[n].grad
        # One key has no rival: what has to do with queries, or a normalised single feature, gets no gradient.
        assert (p.grad - g).norm() < max(1e-5 * g.norm(), 1e-6 * whole), n


@pytest.mark.parametrize("pieces", [[1] * 9, [4, 1, 1, 3], [9]])
@pytest.mark.parametrize("name", SHAPES)
def test_cache_of_latents_against_the_whole(name, pieces):
    layer, x = make(name), torch.randn(2, 9, 24)
    cache, outputs = Cache(), []
    for part, positions in zip(x.split(pieces, dim=1), torch.arange(9).split(pieces), strict=True):
        outputs.append(layer(part, sequences(layer, positions), cache))
    assert error(torch.cat(outputs, dim=1), layer(x, sequences(layer, torch.arange(9)))) < 1e-6
    _, _, rope_dim, _, latent_rank, _ = SHAPES[name]
    assert [t.shape for t in cache.kept] == [(2, 9, latent_rank), (2, 9, rope_dim)]


def test_packed_documents_against_the_documents_apart():
    layer, x = make("published proportions"), torch.randn(1, 12, 24)
    lengths = [5, 1, 6]
    positions = torch.cat([torch.arange(n) for n in lengths])
    documents = torch.tensor([0, 5, 6, 12], dtype=torch.int32)
    packed = layer(x, sequences(layer, positions, documents))
    apart = [layer(part, sequences(layer, torch.arange(part.shape[1]))) for part in x.split(lengths, dim=1)]
    assert error(packed, torch.cat(apart, dim=1)) < 1e-6
    assert error(packed, layer(x, sequences(layer, positions))) > 1e-2


def test_bf16_stays_within_its_rounding_with_fp32_gradients():
    layer, x = make("published proportions"), torch.randn(2, 13, 24)
    half = layer(x.bfloat16(), sequences(layer, torch.arange(13)))
    assert half.dtype == torch.bfloat16
    assert 1e-4 < error(half, layer(x, sequences(layer, torch.arange(13)))) < 2e-2
    half.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in layer.parameters())
