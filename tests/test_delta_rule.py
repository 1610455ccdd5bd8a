"""The gated delta rule against the recurrence in float64, and the layer against transformers'."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from pithtrain.layers import delta_rule
from pithtrain.layers.attention import Cache, OneRank, Sequences
from pithtrain.layers.delta_rule import GatedDeltaNet, ages, gated_delta_rule, short_convolution

NOWHERE = torch.zeros(0)  # the layer reads no rotary table


def error(a, b):
    assert a.isfinite().all()
    return ((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-12)).item()


def recurrence(q, k, v, log_a, b, state, begins):
    """The definition, in float64; `begins` (B, S) marks tokens ahead of which the memory is emptied."""
    q, k, v, log_a, b, state = (x.double() for x in (q, k, v, log_a, b, state))
    outputs = []
    for t in range(q.shape[1]):
        state = state * (~begins[:, t]).view(-1, 1, 1, 1)
        held = torch.einsum("bhvk,bhk->bhv", state, k[:, t])
        state = log_a[:, t].exp()[..., None, None] * (
            state - b[:, t, :, None, None] * held[..., None] * k[:, t, :, None]
        )
        state = state + b[:, t, :, None, None] * v[:, t][..., None] * k[:, t, :, None]
        outputs.append(torch.einsum("bhvk,bhk->bhv", state, q[:, t]))
    return torch.stack(outputs, dim=1), state


def by_recurrence(q, k, v, log_a, b, state=None, age=None):
    """`gated_delta_rule` for one document, by the definition."""
    state = v.new_zeros(len(v), v.shape[2], v.shape[-1], k.shape[-1])
    return tuple(x.float() for x in recurrence(q, k, v, log_a, b, state, torch.zeros(v.shape[:2], dtype=torch.bool)))


def make(B, S, heads, Dk, Dv, seed=0, decay=1.0):
    g = torch.Generator().manual_seed(seed)
    q, k = (F.normalize(torch.randn(B, S, heads, Dk, generator=g), dim=-1) for _ in range(2))
    v, state = torch.randn(B, S, heads, Dv, generator=g), torch.randn(B, heads, Dv, Dk, generator=g)
    return q, k, v, -decay * torch.rand(B, S, heads, generator=g), torch.rand(B, S, heads, generator=g), state


def compare(inputs, documents=None, chunk=64, tolerance=3e-6):
    B, S = inputs[0].shape[:2]
    age = None if documents is None else ages(documents, B, S)
    begins = torch.zeros(B, S, dtype=torch.bool) if age is None else age == 0
    leaves = [x.clone().requires_grad_() for x in inputs]
    true = recurrence(*leaves, begins)
    seeds = [torch.randn(x.shape, generator=torch.Generator().manual_seed(9), dtype=x.dtype) for x in true]
    true_grads = torch.autograd.grad(true, leaves, seeds)
    got = gated_delta_rule(*leaves, age=age, chunk=chunk)
    grads = torch.autograd.grad(got, leaves, [s.float() for s in seeds])
    for name, a, b in zip(("output", "state"), got, true, strict=True):
        assert a.shape == b.shape and error(a, b) < tolerance, f"{name}: {error(a, b):.1e}"
    for name, a, b in zip(("q", "k", "v", "log_a", "b", "before"), grads, true_grads, strict=True):
        if b.norm() < 1e-9:  # nothing of it can matter: another document, or lost to the decay
            assert a.norm() < 1e-6, name
        else:
            assert error(a, b) < 5 * tolerance, f"gradient of {name}: {error(a, b):.1e}"


@pytest.mark.parametrize("chunk", [1, 3, 16, 64])
@pytest.mark.parametrize(
    "B, S, heads, Dk, Dv", [(2, 50, 3, 8, 12), (1, 1, 1, 4, 4), (1, 64, 2, 16, 8), (1, 65, 1, 2, 1)]
)
def test_chunks_are_the_recurrence(B, S, heads, Dk, Dv, chunk):
    compare(make(B, S, heads, Dk, Dv), chunk=chunk)


@pytest.mark.parametrize("cuts", [[0, 48, 96], [0, 1, 2, 48, 60, 96], [0, 15, 16, 17, 31, 33, 48, 95, 96]])
@pytest.mark.parametrize("chunk", [1, 7, 16, 64])
def test_documents(cuts, chunk):
    compare(make(2, 48, 2, 6, 5), torch.tensor(cuts), chunk=chunk)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_any_documents_and_any_chunk(data):
    B, S = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 40))
    cuts = data.draw(st.sets(st.integers(0, B * S)))
    documents = torch.tensor(sorted(cuts | {row * S for row in range(B + 1)}), dtype=torch.int32)
    compare(make(B, S, 2, 4, 3, data.draw(st.integers(0, 999))), documents, data.draw(st.integers(1, 50)))


@pytest.mark.parametrize("decay", [0.0, 20.0, 200.0])
def test_weak_and_strong_decay(decay):
    compare(make(1, 150, 2, 8, 8, decay=decay))


@pytest.mark.parametrize("strong", [-100.0, -1e4])
def test_what_follows_a_token_that_forgets_all_is_as_exact_as_the_rest(strong):
    q, k, v, log_a, b, state = make(1, 200, 2, 8, 8)
    compare((q, k, v, torch.where(log_a < -0.8, strong, -0.01), b, state))


def test_repeated_keys_and_full_strength():
    """The hardest system to solve: each write replaces the one before it."""
    q, k, v, log_a, b, state = make(1, 130, 2, 8, 8)
    compare((q, k[:, :1].expand_as(k), v, torch.zeros_like(log_a), torch.ones_like(b), state))


def test_a_state_carries_over():
    inputs = make(2, 40, 2, 8, 8)
    whole, last = gated_delta_rule(*inputs, chunk=16)
    state, outputs = inputs[-1], []
    for i, j in ((0, 13), (13, 14), (14, 40)):
        o, state = gated_delta_rule(*(x[:, i:j] for x in inputs[:-1]), state, chunk=16)
        outputs.append(o)
    assert error(torch.cat(outputs, dim=1), whole) < 3e-6 and error(state, last) < 3e-6


def test_bf16_inputs_are_computed_in_fp32():
    *inputs, before = make(1, 70, 2, 8, 8)
    inputs = [x.bfloat16() for x in inputs]
    o, state = gated_delta_rule(*inputs, before)
    true, _ = gated_delta_rule(*(x.float() for x in inputs), before)
    assert o.dtype == torch.bfloat16 and state.dtype == torch.float32
    assert torch.equal(o, true.bfloat16())


def test_against_transformers():
    theirs = pytest.importorskip("transformers.models.qwen3_5_moe.modeling_qwen3_5_moe")
    q, k, v, log_a, b, state = make(2, 100, 2, 8, 12)
    for function in (theirs.torch_chunk_gated_delta_rule, theirs.torch_recurrent_gated_delta_rule):
        expected, last = function(q, k, v, log_a, b, initial_state=state.mT.contiguous(), output_final_state=True)
        o, ours = gated_delta_rule(q * 8**-0.5, k, v, log_a, b, state)
        assert error(o, expected) < 3e-6 and error(ours, last.mT) < 3e-6


@pytest.mark.parametrize("taps", [1, 2, 4])
def test_convolution_is_torchs_within_each_document(taps):
    g = torch.Generator().manual_seed(0)
    x, weight = torch.randn(2, 20, 3, 5, generator=g), torch.randn(taps, 3, 5, generator=g)
    cuts = [0, 1, 3, 9, 20, 36, 40]

    def conv(piece):
        padded = F.pad(piece.flatten(1).t()[None], (taps - 1, 0))
        return F.conv1d(padded, weight.flatten(1).t().unsqueeze(1), groups=15)[0].t().view_as(piece)

    rows = x.flatten(0, 1)
    torch.testing.assert_close(short_convolution(x, weight), torch.stack([conv(row) for row in x]))
    expected = torch.cat([conv(rows[i:j]) for i, j in itertools.pairwise(cuts)]).view_as(x)
    torch.testing.assert_close(short_convolution(x, weight, age=ages(torch.tensor(cuts), 2, 20)), expected)
    if taps > 1:
        ahead = short_convolution(x[:, 7:], weight, before=x[:, 7 - taps + 1 : 7])
        torch.testing.assert_close(ahead, short_convolution(x, weight)[:, 7:])


SIZES = {
    "one to one": (16, 2, 2, 8, 8, 4),
    "values grouped": (24, 2, 6, 8, 4, 4),
    "one head, wide values": (16, 1, 1, 4, 16, 4),
    "two taps": (16, 2, 4, 8, 8, 2),
}


def pair(size):
    """transformers' layer and ours with the same weights, gates of every strength."""
    hidden, key_heads, value_heads, key_dim, value_dim, taps = size
    hf = pytest.importorskip("transformers.models.qwen3_5_moe.modeling_qwen3_5_moe")
    config = hf.Qwen3_5MoeTextConfig(
        hidden_size=hidden,
        num_hidden_layers=1,
        linear_num_key_heads=key_heads,
        linear_num_value_heads=value_heads,
        linear_key_head_dim=key_dim,
        linear_value_head_dim=value_dim,
        linear_conv_kernel_dim=taps,
    )
    theirs = hf.Qwen3_5MoeGatedDeltaNet(config, 0)
    ours = GatedDeltaNet(*size, config.rms_norm_eps)
    names = {"qkv": "in_proj_qkv", "gate": "in_proj_z", "strength": "in_proj_b", "decay": "in_proj_a"}
    names |= {"convolution": "conv1d.weight", "output": "out_proj"}
    generator = torch.Generator().manual_seed(0)
    source = dict(theirs.named_parameters())
    mapping = {}
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            stem, _, leaf = name.partition(".")
            mapping[name] = ".".join(filter(None, (names.get(stem, stem), leaf)))
            values = torch.randn(parameter.shape, generator=generator)
            values = values / parameter.shape[-1] ** 0.5 if parameter.dim() > 1 else parameter + 0.3 * values
            parameter.copy_(values)
            source.pop(mapping[name]).copy_(values)
    assert not source
    return theirs, ours, mapping


@pytest.mark.parametrize("size", [1.0, 1e-3])  # keys of 1e-3 are not brought to length 1
@pytest.mark.parametrize("name", SIZES)
def test_layer_is_that_of_transformers(name, size, monkeypatch):
    theirs, ours, mapping = pair(SIZES[name])
    x = size * torch.randn(2, 70, SIZES[name][0], generator=torch.Generator().manual_seed(1))
    expected, got = theirs(x), ours(x, Sequences(NOWHERE, NOWHERE))
    assert ((got - expected).abs().max() / expected.abs().max()).item() < 1e-5
    seed = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    expected.backward(seed)
    got.backward(seed)
    source = dict(theirs.named_parameters())
    true = copy.deepcopy(ours)
    true.zero_grad()
    monkeypatch.setattr(delta_rule, "gated_delta_rule", by_recurrence)
    true(x, Sequences(NOWHERE, NOWHERE)).backward(seed)
    for (n, p), exact in zip(ours.named_parameters(), true.parameters(), strict=True):
        assert error(p.grad, exact.grad) < 1e-5, n
        # Little is left of small keys to fade: the gradients of the decay are rounding in theirs.
        if size == 1 or n not in ("A_log", "dt_bias", "decay.weight"):
            assert error(p.grad, source[mapping[n]].grad) < 1e-4, n


def test_layer_decodes_as_it_reads():
    _, ours, _ = pair(SIZES["values grouped"])
    x = torch.randn(3, 30, 24, generator=torch.Generator().manual_seed(1))
    nothing = Sequences(NOWHERE, NOWHERE)
    whole = ours(x, nothing)
    for first in (1, 2, 3, 17):
        cache, outputs = Cache(), []
        for i, j in [(0, first), *((t, t + 1) for t in range(first, 20)), (20, 30)]:
            outputs.append(ours(x[:, i:j], nothing, cache))
        torch.testing.assert_close(torch.cat(outputs, dim=1), whole, rtol=1e-4, atol=1e-5)


def test_layer_keeps_documents_apart():
    _, ours, _ = pair(SIZES["values grouped"])
    x = torch.randn(2, 30, 24, generator=torch.Generator().manual_seed(1))
    cuts = [0, 1, 3, 17, 30, 58, 60]
    packed = ours(x, Sequences(NOWHERE, NOWHERE, torch.tensor(cuts)))
    rows = x.flatten(0, 1)
    apart = [ours(rows[None, i:j], Sequences(NOWHERE, NOWHERE)) for i, j in itertools.pairwise(cuts)]
    torch.testing.assert_close(packed.flatten(0, 1), torch.cat(apart, dim=1)[0], rtol=1e-4, atol=1e-5)


class HalfTheHeads(OneRank):
    """The share of one of two ranks, tokens left where they are: outputs of the other's heads are zero."""

    def __init__(self, rank):
        self.rank = rank

    def held(self, heads):
        return slice(self.rank * heads // 2, (self.rank + 1) * heads // 2)

    def whole_sequence(self, x):
        return x[:, :, self.held(x.shape[2])]

    def own_sequence(self, x):
        return torch.cat([torch.zeros_like(x)] * self.rank + [x] + [torch.zeros_like(x)] * (1 - self.rank), dim=2)


def test_heads_can_be_shared_by_ranks():
    _, ours, _ = pair(SIZES["values grouped"])
    x = torch.randn(2, 30, 24, generator=torch.Generator().manual_seed(1))
    whole, total = ours(x, Sequences(NOWHERE, NOWHERE)), 0
    for rank in range(2):
        ours.core = HalfTheHeads(rank)
        total = total + ours(x, Sequences(NOWHERE, NOWHERE))
    torch.testing.assert_close(total, whole, rtol=1e-4, atol=1e-5)


def test_layer_in_bf16():
    _, ours, _ = pair(SIZES["values grouped"])
    x = torch.randn(2, 30, 24, generator=torch.Generator().manual_seed(1))
    full, half = ours(x, Sequences(NOWHERE, NOWHERE)), ours(x.bfloat16(), Sequences(NOWHERE, NOWHERE))
    assert half.dtype == torch.bfloat16 and 1e-4 < error(half, full) < 3e-2
    half.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in ours.parameters())
