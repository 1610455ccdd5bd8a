# %% [markdown]
# # Exercise: merge two softmaxes
#
# > Attention over keys that arrive in blocks: combine two partial results so that nobody can tell.
#
# In [ring attention](../42_ring_attention.py) a rank sees the keys and values of a sequence block by block, and
# keeps only what it has so far: an output and, for each query, the logarithm of the sum of exponentials,
#
# $$o = \sum_j \frac{e^{s_j}}{\sum_i e^{s_i}} v_j, \qquad \ell = \log \sum_j e^{s_j}.$$
#
# ## The task
#
# Write `my_merge(out_a, lse_a, out_b, lse_b)` for outputs (Q, D) and log-sums (Q,) of two blocks. Return the
# output and log-sum over both. Scores may be large, so no exponential of a score itself may appear; and a block
# in which a query sees nothing has $\ell = -\infty$.

# %%
import torch


def my_merge(out_a, lse_a, out_b, lse_b):
    raise NotImplementedError  # your turn


# %% [markdown]
# ## The check
#
# Ordinary scores, scores of a hundred and more, and blocks that are hidden from some queries.


# %%
def attend(scores, values):
    """The output and log-sum of one block; a query that sees nothing gets zeros."""
    return torch.softmax(scores, dim=1).nan_to_num() @ values, torch.logsumexp(scores, dim=1)


def check(merge):
    torch.manual_seed(0)
    values = torch.randn(12, 4)
    for name, size, hidden in (("small scores", 1, 0), ("large scores", 100, 0), ("hidden blocks", 1, 3)):
        scores = size * torch.randn(6, 12)
        scores[:hidden, :5] = -torch.inf
        merged, lse = merge(*attend(scores[:, :5], values[:5]), *attend(scores[:, 5:], values[5:]))
        want, want_lse = attend(scores, values)
        torch.testing.assert_close(merged, want, msg=f"{name}: wrong output")
        torch.testing.assert_close(lse, want_lse, msg=f"{name}: wrong log-sum")
    print("Right.")


try:
    check(my_merge)
except NotImplementedError:
    print("Not written yet.")

# %% [markdown]
# ## A mistake worth making
#
# The formula, written as it stands on paper:


# %%
def naive(out_a, lse_a, out_b, lse_b):
    a, b = lse_a.exp(), lse_b.exp()
    return (a.unsqueeze(1) * out_a + b.unsqueeze(1) * out_b) / (a + b).unsqueeze(1), (a + b).log()


try:
    check(naive)
    raise SystemExit("the check let a mistake pass")
except AssertionError as error:
    print(error)

# %% [markdown]
# ## A solution
#
# Only the difference of the two log-sums matters, and a sigmoid of it never overflows.


# %% tags=["hide-cell"]
def solution(out_a, lse_a, out_b, lse_b):
    share = torch.sigmoid(lse_b - lse_a).unsqueeze(1)  # of the second block
    return out_a + share * (out_b - out_a), torch.logaddexp(lse_a, lse_b)


check(solution)

# %% [markdown]
# ## To think about
#
# - What does the solution give for a query that sees nothing in either block? Can that happen under a causal
#   mask?
# - In which order do blocks arrive at rank 2 of 4, and does the order change the result's bits?
#
# Next: [a schedule of one's own](51_schedule.py).
