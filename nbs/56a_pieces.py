# %% [markdown]
# # A forward in pieces
#
# > Cuts a stage's forward into pieces with graphs of their own, whose backwards run one by one, whole or split.

# %%
#| default_exp parallel.pipeline.pieces

# %% [markdown]
# ## The idea
#
# Autograd walks from the loss to the first weight in one go. A pipeline wants more say. It asks for the gradient
# of a stage's input now and for those of its weights later (the passes $\mathsf{I}$ and $\mathsf{W}$ of
# [50](50_schedule.py)); and an overlapped action wants to pause a backward while its tokens are on the wire, and
# to compute something else in the meantime.
#
# Both come from knowing a graph's parts. This notebook first splits a backward in two, then cuts a forward in
# pieces. What a stage makes of that is for [57](57_engine.py) and [57a](57a_overlap.py).

# %%
#| export
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

# %% [markdown]
# ## Splitting a backward in two
#
# A graph has one node per operation, and each node turns the gradient of its output into gradients of its inputs.
# Some nodes lead on to the input $x$; call them the *trunk*. Where a weight is used, an edge leaves the trunk, as
# at both products of a small MLP:
#
# ```
# loss grad ──▶ mul(h, w₂) ──▶ relu ──▶ mul(x, w₁) ──▶ x        the trunk
#                   │                        │
#                   ▼                        ▼
#                   w₂                       w₁                  the branches
# ```
#
# - **I** sends the gradient along the trunk only (autograd computes what is asked for and no more), and notes
#   the gradient that arrives at each node with a branch.
# - **W** then starts at each of those nodes, with the noted gradient, and follows the branches only.
#
# The sum over both is what one backward would have done, in the same operations: $\mathsf{I}$ and
# $\mathsf{W}$ together cost what $\mathsf{B}$ costs. One thing does not fit: a weight used at two places of the
# trunk, for from the later place the path to it leads through the earlier one. Its gradient is computed in
# $\mathsf{I}$.


# %%
#| export
def split_graph(roots: Sequence[Node], x: Tensor) -> tuple[dict[Node, list[Tensor]], list[Tensor]]:
    """For each trunk node the weights on its branches; and the weights that several trunk nodes share."""
    order: list[Node] = []  # children before parents
    stack: list[tuple[Node, bool]] = [(root, False) for root in roots]
    seen: set[Node] = set()
    while stack:
        node, closing = stack.pop()
        if closing:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack += [(child, False) for child, _ in node.next_functions if child is not None]
    trunk: set[Node] = set()
    leaves: dict[Node, frozenset[Tensor]] = {}  # of nodes off the trunk: the weights they lead to
    weights: dict[Node, list[Tensor]] = {}
    uses: dict[Tensor, int] = {}
    for node in order:
        leaf = getattr(node, "variable", None)
        children = [child for child, _ in node.next_functions if child is not None]
        found = frozenset().union(*(leaves[child] for child in children if child not in trunk))
        if leaf is x or any(child in trunk for child in children):
            trunk.add(node)
            weights[node] = list(found)
            for weight in found:
                uses[weight] = uses.get(weight, 0) + 1
        else:
            leaves[node] = found if leaf is None else frozenset((leaf,))
    shared = [weight for weight, count in uses.items() if count > 1]
    own = {node: [w for w in found if uses[w] == 1] for node, found in weights.items()}
    return {node: found for node, found in own.items() if found}, shared


# %% [markdown]
# An MLP whose first weight is used twice:

# %%
torch.manual_seed(0)
w1, w2 = (torch.randn(4, 4, requires_grad=True) for _ in range(2))
x = torch.randn(2, 4, requires_grad=True)
y = ((x @ w1).relu() @ w2).relu() @ w1
branches, shared = split_graph([y.grad_fn], x)
print("branches:", [(node.name(), len(found)) for node, found in branches.items()])
print("shared weights:", len(shared))
assert shared[0] is w1 and next(iter(branches.values()))[0] is w2


# %%
#| export
class Branches(NamedTuple):
    """What is left for W: per trunk node the gradient that arrived at it and the weights that branch off."""

    noted: dict[Node, tuple[Tensor | None, ...]]
    weights: dict[Node, list[Tensor]]
    roots: Sequence[GradientEdge]  #: they own the graph; its nodes from Python code would not outlive it by themselves

    def backward(self) -> None:
        """Adds to the gradients of the weights; what was kept for them is let go of on the way."""
        while self.noted:
            node, grads = self.noted.popitem()
            edges, grads = zip(*((GradientEdge(node, i), g) for i, g in enumerate(grads) if g is not None), strict=True)
            torch.autograd.backward(edges, grads, inputs=self.weights.pop(node))


# %%
#| export
def backward_to(x: Tensor, edges: Sequence[GradientEdge], grads: Sequence[Tensor]) -> Branches:
    """Sends the gradients at `edges` along the trunk to the leaf `x`; what is left for W."""
    weights, shared = split_graph([edge.node for edge in edges], x)
    noted: dict[Node, tuple[Tensor | None, ...]] = {}
    hooks = [node.register_prehook(lambda grads, node=node: noted.__setitem__(node, grads)) for node in weights]
    torch.autograd.backward(edges, grads, retain_graph=bool(weights), inputs=[x, *shared])
    for hook in hooks:
        hook.remove()
    return Branches(noted, weights, edges)


# %%
rest = backward_to(x, [get_gradient_edge(y)], [torch.ones_like(y)])
print("behind I:", "x" * (x.grad is not None), "w1" * (w1.grad is not None), "w2" * (w2.grad is not None))
assert w2.grad is None
rest.backward()
whole = torch.autograd.grad((((x @ w1).relu() @ w2).relu() @ w1).sum(), (x, w1, w2))
assert all(torch.equal(t.grad, g) for t, g in zip((x, w1, w2), whole, strict=True))

# %% [markdown]
# (A node whose backward is written by hand would compute its weight gradients in both halves, unless it
# [asks](10_triton.py) what is wanted of it.)
#
# ## Cutting a forward
#
# Let a forward be $y = f_n(\dots f_2(f_1(x)))$. If the result of each $f_i$ is detached before $f_{i+1}$ gets it,
# each has a graph of its own, and the backward of the whole is theirs, last to first: the gradient that comes out
# of one goes into the one before. Between two of them anything else can be done.
#
# A detached tensor needs some place that holds its gradient. Were it a leaf, autograd would keep the tensor's data
# for as long as the leaf lives, whether or not an operation needs it. So it enters the next piece through a function
# that does nothing but leave the gradient at the *border* where the tensor came from.


# %%
#| export
class Border:
    """Where a tensor leaves a piece: its place in that piece's graph, and the gradient that has come back."""

    def __init__(self) -> None:
        self.edge: GradientEdge | None = None
        self.grad: Tensor | None = None


class Enter(torch.autograd.Function):
    """`tensor` as the next piece gets it; `anchor`, a leaf without data, is what that piece's trunk leads to."""

    @staticmethod
    def forward(ctx, anchor: Tensor, tensor: Tensor, border: Border) -> Tensor:
        ctx.border = border
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[None, None, None]:
        before = ctx.border.grad
        ctx.border.grad = grad if before is None else before + grad
        return None, None, None


@dataclass
class Crossing:
    """A detached tensor between pieces; without a border where it has no gradient."""

    tensor: Tensor
    border: Border | None


# %% [markdown]
# ## The tape
#
# A `Tape` runs functions as pieces and remembers them. A piece may
#
# - be run **again**: its forward keeps what went in alone, and its graph is made when its backward comes. That is
#   activation checkpointing, and the graph so made serves $\mathsf{I}$ and $\mathsf{W}$ both. (torch's own
#   `checkpoint` would compute it once for $\mathsf{I}$ and once for every branch of $\mathsf{W}$.)
# - be run **aside**: on a GPU, on a second stream. Pieces of one tape still run one after the other, since each
#   waits on the device for the one before; but what *others* launch on the first stream runs at the same time.
#
# The allocator has to be told of tensors that go from one stream to the other, or it would give away their memory
# while the other still reads it: `record_stream`.


# %%
#| export
class Piece(NamedTuple):
    """A function that a tape ran, by what is needed for its backward."""

    name: str
    borders: list[Border]  #: of its outputs that may have a gradient
    aside: bool
    again: Callable[[], Any] | None  #: makes the graph, where it was not kept


class Tape:
    """One microbatch's way through a stage, in pieces; `beside` is the stream of those that are run aside.

    The gradient of the stage's output is put into `last.grad`, and that of its input comes out of `first.grad`,
    unless `first` is None."""

    def __init__(self, beside: torch.cuda.Stream | None = None):
        self.beside, self.anchor = beside, torch.empty(0, requires_grad=True)
        self.pieces: list[Piece] = []
        self.ready: torch.cuda.Event | None = None
        self.first: Border | None = None
        self.last: Border | None = None
        self.output: Tensor | None = None

    def begin(self, x: Tensor | None) -> Crossing | None:
        """The stage's input, as the first piece takes it."""
        if x is None:
            return None
        self.first = Border()
        return Crossing(x.detach(), self.first)

    def end(self, y: Crossing) -> None:
        """Sets the stage's output."""
        self.output, self.last = y.tensor, y.border

    def take(self) -> Tensor:
        """The stage's output, of which the tape keeps nothing."""
        output, self.output = self.output, None
        return output

    @contextmanager
    def lane(self, name: str, aside: bool) -> Iterator[None]:
        """What is inside runs behind this tape's last piece, on the current stream or the one beside it."""
        with torch.profiler.record_function(name):
            if self.beside is None:
                yield
                return
            stream = self.beside if aside else torch.cuda.current_stream()
            if self.ready is not None:
                stream.wait_event(self.ready)
            with torch.cuda.stream(stream):
                yield
            self.ready = stream.record_event()

    def enter(self, value: Any) -> Any:
        """A tensor that crossed into a piece, on that piece's stream; anything else as it is."""
        if not isinstance(value, Crossing):
            return value
        lend(value.tensor)
        return value.tensor if value.border is None else Enter.apply(self.anchor, value.tensor, value.border)

    def run(self, name: str, function: Callable, *inputs: Any, aside: bool = False, again: bool = False) -> Any:
        """`function` of `inputs` as a piece; in what it returns, of any nesting, tensors are crossings."""
        borders: list[Border] = []

        def leave(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            if not (value.requires_grad or (again and value.is_floating_point())):
                return Crossing(value, None)
            borders.append(border := Border())
            border.edge = get_gradient_edge(value) if value.requires_grad else None
            return Crossing(value.detach(), border)

        def call() -> Any:
            return function(*each(inputs, self.enter))

        with self.lane(f"forward {name}", aside), torch.set_grad_enabled(not again):
            outputs = each(call(), leave)
        if borders:
            self.pieces.append(Piece(name, borders, aside, call if again else None))
        return outputs

    def backward(self, piece: Piece, split: bool = False) -> Branches | None:
        """The backward of a piece, those behind it being done: all of it, or I alone; then what W needs."""
        with self.lane(f"backward {piece.name}", piece.aside):
            if piece.again is not None:
                borders = iter(piece.borders)

                def leave(value: Any) -> None:
                    if isinstance(value, Tensor) and value.is_floating_point():
                        next(borders).edge = get_gradient_edge(value) if value.requires_grad else None

                with torch.enable_grad():
                    each(piece.again(), leave)
            edges, grads = [], []
            for border in piece.borders:
                if border.edge is not None and border.grad is not None:
                    edges.append(border.edge)
                    grads.append(lend(border.grad))
                border.edge = border.grad = None
            if split:
                return backward_to(self.anchor, edges, grads)
            torch.autograd.backward(edges, grads)
            return None


def each(values: Any, change: Callable[[Any], Any]) -> Any:
    """`values` with each of what is in its tuples and lists changed."""
    if not isinstance(values, tuple | list):
        return change(values)
    changed = [each(value, change) for value in values]
    return type(values)(*changed) if hasattr(values, "_fields") else type(values)(changed)


def lend(tensor: Tensor) -> Tensor:
    """`tensor`, whose memory is not given away before the current stream is done with it."""
    if tensor.is_cuda:
        tensor.record_stream(torch.cuda.current_stream())
    return tensor


# %% [markdown]
# The MLP again, its halves as pieces, one of them kept and one run again. Between the two backwards anything else
# could run.

# %%
calls = []


def half(w):
    def function(x):
        calls.append(torch.is_grad_enabled())
        return (x @ w).relu()

    return function


w1.grad = w2.grad = None
tape = Tape()
hidden = tape.run("first half", half(w1), tape.begin(x), again=True)
tape.end(tape.run("second half", half(w2), hidden))
tape.last.grad = torch.ones_like(tape.take())
for piece in reversed(tape.pieces):
    tape.backward(piece)
    print(f"behind {piece.name}:", "dx" if tape.first.grad is not None else "no dx yet")
whole = torch.autograd.grad(((x @ w1).relu() @ w2).relu().sum(), (x, w1, w2))
assert all(torch.equal(a, b) for a, b in zip((tape.first.grad, w1.grad, w2.grad), whole, strict=True))
assert calls == [False, True, True]  # first half without a graph, second half, first half again

# %% [markdown]
# ## What is kept
#
# `a.exp()` needs its result for its backward, `a + b` needs nothing. With a leaf at each border the sum's result would
# be kept; here it is not.

# %%
import weakref

a = torch.randn(1000, requires_grad=True)
tape = Tape()
total = tape.run("sum", lambda a: a + 1, tape.begin(a))
kept = tape.run("exp", torch.exp, total)
storages = [weakref.ref(t.tensor.untyped_storage()) for t in (total, kept)]
del total, kept
print("kept behind the forward: sum", storages[0]() is not None, " exp", storages[1]() is not None)
assert storages[0]() is None and storages[1]() is not None

# %% [markdown]
# **Next:** [the engine](57_engine.py), and what a stage owes it.
