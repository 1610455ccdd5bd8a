# %% [markdown]
# # Exercise: route a batch of tokens
#
# > Write softmax routing for a whole batch, with a bias that chooses and does not weigh.
#
# [The router's notebook](../20_router.py) begins with one token at a time. Here it is done for a batch, in
# PyTorch and without a loop. For router rows $r_e$ and a selection bias $b_e$,
#
# $$p_e = \operatorname{softmax}_e(r \cdot x), \qquad S = \operatorname{top\text{-}k}_e(p_e + b_e), \qquad
#   w_e = \frac{p_e}{\sum_{j \in S} p_j}.$$
#
# ## The task
#
# Write `my_route(tokens, router, bias, top_k)` with `tokens` (T, H), `router` (E, H) and `bias` (E,). Return
# the weights (T, K) and the ids of the experts (T, K), best first. `torch.topk` and `torch.gather` are all that
# it needs.

# %%
import torch


def my_route(tokens, router, bias, top_k):
    raise NotImplementedError  # your turn


# %% [markdown]
# ## The check
#
# It compares with one token at a time, first without a bias, then with one that is large enough to change the
# choice.


# %%
def check(route):
    torch.manual_seed(0)
    tokens, router = torch.randn(50, 16), torch.randn(8, 16) / 4
    for bias in (torch.zeros(8), torch.linspace(-0.2, 0.2, 8)):
        weights, ids = route(tokens, router, bias, 3)
        assert weights.shape == ids.shape == (50, 3), f"want two of shape (50, 3), got {weights.shape} and {ids.shape}"
        for t, token in enumerate(tokens):
            p = torch.softmax(router @ token, dim=0)
            chosen = sorted(range(8), key=lambda e: -float(p[e] + bias[e]))[:3]
            assert ids[t].tolist() == chosen, f"token {t}: want experts {chosen}, got {ids[t].tolist()}"
            torch.testing.assert_close(weights[t], p[chosen] / p[chosen].sum(), msg=f"token {t}: wrong weights")
    print("Right.")


try:
    check(my_route)
except NotImplementedError:
    print("Not written yet.")

# %% [markdown]
# ## A mistake worth making
#
# `topk` returns values as well, and it is tempting to use them. But they have the bias in them:


# %%
def biased(tokens, router, bias, top_k):
    values, ids = (torch.softmax(tokens @ router.T, dim=-1) + bias).topk(top_k)
    return values / values.sum(dim=-1, keepdim=True), ids


try:
    check(biased)
    raise SystemExit("the check let a mistake pass")
except AssertionError as error:
    print(error)

# %% [markdown]
# Without a bias it passes, and a model would train; only a run with loss-free balancing would be a little
# worse, and nobody would know why.
#
# ## A solution


# %% tags=["hide-cell"]
def solution(tokens, router, bias, top_k):
    probs = torch.softmax(tokens @ router.T, dim=-1)
    ids = (probs + bias).topk(top_k).indices
    weights = probs.gather(1, ids)
    return weights / weights.sum(dim=-1, keepdim=True), ids


check(solution)

# %% [markdown]
# ## To think about
#
# - Which rows of the router get a gradient from one token, with renormalisation and without? Predict, then look
#   at `router.grad`.
# - In bfloat16, how many of ten thousand random tokens choose other experts than in float32?
#
# Next: [experts without a loop](22_experts.py).
