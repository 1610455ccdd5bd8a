# %% [markdown]
# # Exercise: send each token once
#
# > Plan the rows that leave a rank, so that a token travels once to each rank that holds any of its experts.
#
# With $n$ ranks of $E / n$ experts each, expert $e$ lives on rank $\lfloor e / (E/n) \rfloor$. A token whose
# experts are 0, 1 and 5 on ranks of four experts is wanted on rank 0 (twice) and on rank 1 (once).
# [Deduplicated dispatch](../41_expert_parallel.py) sends two rows, not three.
#
# ## The task
#
# Write `my_plan(ids, experts_per_rank, ranks)` for `ids` (T, K). Return
#
# - `rows`, a tensor of token numbers, one for each row that is sent, ordered by destination rank and then by
#   token;
# - `counts`, a list, how many of them go to each rank.
#
# Tokens for one's own rank count as well: an all-to-all delivers those at home. Helpful: a (ranks, T) table of
# booleans, and what `nonzero` does with its rows.

# %%
import torch


def my_plan(ids, experts_per_rank, ranks):
    raise NotImplementedError  # your turn


# %% [markdown]
# ## The check
#
# It does what the ranks would do: each rank computes its experts' share of the rows it got, and the rows are
# added up at home. The result must be what one rank alone computes, and no row may travel twice.


# %%
def check(plan):
    torch.manual_seed(0)
    for tokens, experts, top_k, ranks in ((7, 8, 3, 2), (30, 16, 4, 4), (5, 4, 1, 4), (1, 8, 8, 2)):
        case = f"{tokens} tokens, {experts} experts, top_k {top_k}, {ranks} ranks"
        x, ids = torch.randn(tokens, 6), torch.rand(tokens, experts).topk(top_k).indices
        factor = torch.randn(experts)  # an expert multiplies by a number
        here = experts // ranks
        rows, counts = plan(ids, here, ranks)
        assert len(counts) == ranks and sum(counts) == len(rows), f"{case}: counts {counts} of {len(rows)} rows"
        home, best = torch.zeros_like(x), 0
        for rank, piece in enumerate(rows.split(list(counts))):
            assert piece.tolist() == sorted(set(piece.tolist())), f"{case}: to rank {rank} go {piece.tolist()}"
            mine = ids[piece] // here == rank
            assert mine.any(dim=1).all(), f"{case}: rank {rank} gets a token it has no expert for"
            home.index_add_(0, piece, x[piece] * (factor[ids[piece]] * mine).sum(dim=1, keepdim=True))
            best += int((ids // here == rank).any(dim=1).sum())
        torch.testing.assert_close(home, x * factor[ids].sum(dim=1, keepdim=True), msg=f"{case}: wrong sums")
        assert len(rows) == best, f"{case}: {len(rows)} rows are sent, {best} would do"
    print("Right.")


try:
    check(my_plan)
except NotImplementedError:
    print("Not written yet.")

# %% [markdown]
# ## A mistake worth making
#
# Sorting the pairs by rank sends a copy for each expert:


# %%
def copies(ids, experts_per_rank, ranks):
    rank = (ids // experts_per_rank).flatten()
    return rank.argsort(stable=True) // ids.shape[1], rank.bincount(minlength=ranks).tolist()


try:
    check(copies)
    raise SystemExit("the check let a mistake pass")
except AssertionError as error:
    print(error)

# %% [markdown]
# ## A solution


# %% tags=["hide-cell"]
def solution(ids, experts_per_rank, ranks):
    wanted = torch.zeros(ranks, len(ids), dtype=torch.bool)
    wanted[ids // experts_per_rank, torch.arange(len(ids)).unsqueeze(1)] = True
    return wanted.nonzero()[:, 1], wanted.sum(dim=1).tolist()


check(solution)

# %% [markdown]
# ## To think about
#
# - With 128 experts, `top_k` 8 and 16 ranks, how many rows does a token send on average? The closed form is in
#   [the notebook](../41_expert_parallel.py); count with your plan.
# - What has to travel with a row, so that the rank knows which of its experts are meant?
#
# Next: [merging two softmaxes](42_ring.py).
