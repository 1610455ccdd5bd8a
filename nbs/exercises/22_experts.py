# %% [markdown]
# # Exercise: experts without wasted work
#
# > Sort pairs of token and expert, so that each expert reads one block of rows and no row is computed twice.
#
# A loop over experts that looks for its tokens reads the whole list of choices $E$ times. The fast way sorts
# the $T K$ pairs of token and expert once, so that each expert's rows lie together ([sort](../11_sort.py));
# then one *grouped* matrix product, or here one slice for each expert, does the work.
#
# ## The task
#
# Write `my_experts(tokens, ids, weights, matrices)`: `tokens` (T, H), `ids` and `weights` (T, K), `matrices`
# (E, H, H). An expert is a single matrix here: $y_t = \sum_k w_{tk}\, M_{e(t, k)}\, x_t$. Rules: one `argsort`
# and no comparison of `ids` with an expert's number; each pair is computed exactly once.
#
# Helpful: row $i$ of `ids.flatten()` belongs to token $\lfloor i / K \rfloor$; `bincount` says how many rows
# each expert has, also for experts that have none; `index_add` sums rows to where they belong.

# %%
import torch


def my_experts(tokens, ids, weights, matrices):
    raise NotImplementedError  # your turn


# %% [markdown]
# ## The check
#
# Random choices, an expert without tokens, and all tokens at one expert. It counts multiplications too, through
# matrices that count their rows.


# %%
class Counted:
    """A stack of matrices that counts the rows they are applied to."""

    def __init__(self, matrices):
        self.matrices, self.rows = matrices, 0

    def __len__(self):
        return len(self.matrices)

    def __getitem__(self, expert):
        return lambda rows: self.apply(rows, self.matrices[expert])

    def apply(self, rows, matrix):
        self.rows += len(rows)
        return rows @ matrix.T


def check(experts):
    torch.manual_seed(0)
    tokens, matrices = torch.randn(40, 16), torch.randn(6, 16, 16) / 4
    weights = torch.rand(40, 2)
    choices = {
        "random choice": torch.rand(40, 6).topk(2).indices,
        "expert 0 without tokens": 1 + torch.rand(40, 5).topk(2).indices,
        "all tokens at experts 3 and 5": torch.tensor([[3, 5]]).repeat(40, 1),
    }
    for name, ids in choices.items():
        counted = Counted(matrices)
        output = experts(tokens, ids, weights, counted)
        want = torch.einsum("tk,tkhi,ti->th", weights, matrices[ids], tokens)
        torch.testing.assert_close(output, want, msg=lambda said, name=name: f"{name}: {said}")
        assert counted.rows == 80, f"{name}: {counted.rows} rows were computed, 80 would do"
    print("Right.")


try:
    check(my_experts)
except NotImplementedError:
    print("Not written yet.")

# %% [markdown]
# `matrices[e](rows)` applies expert `e` to its rows, and counts them.
#
# ## A mistake worth making
#
# Computing every expert for every token and weighing with zeros is right, and $E / K$ times the work:


# %%
def everything(tokens, ids, weights, matrices):
    share = torch.zeros(len(tokens), len(matrices)).scatter_add(1, ids, weights)
    return sum(share[:, e, None] * matrices[e](tokens) for e in range(len(matrices)))


try:
    check(everything)
    raise SystemExit("the check let a mistake pass")
except AssertionError as error:
    print(error)

# %% [markdown]
# ## A solution


# %% tags=["hide-cell"]
def solution(tokens, ids, weights, matrices):
    order = ids.flatten().argsort(stable=True)
    token = order // ids.shape[1]
    counts = ids.flatten().bincount(minlength=len(matrices)).tolist()
    rows = [matrices[e](block) for e, block in enumerate(tokens[token].split(counts))]
    weighted = torch.cat(rows) * weights.flatten()[order, None]
    return torch.zeros_like(tokens).index_add(0, token, weighted)


check(solution)

# %% [markdown]
# ## To think about
#
# - Sorted rows are a copy of the tokens, $K$ times as large. Which kernel of [the expert
#   MLP](../12_expert_mlp.py) does without it, and how?
# - What would a limit to an expert's rows (a *capacity*) change in the output, and what in the gradient?
#
# Next: [a kernel](10_kernel.py).
