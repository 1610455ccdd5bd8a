"""What the measuring tools share: entrants take turns, and a GPU replays what was launched once."""

from collections.abc import Callable, Iterable, Iterator

import torch


def in_turns(names: Iterable[str], turns: int) -> Iterator[str]:
    """All names, as often as there are turns; every other turn goes backwards."""
    for turn in range(turns):
        yield from list(names)[:: -1 if turn % 2 else 1]


def graph_of(run: Callable[[], object]) -> Callable[[], object]:
    """A function that replays what `run` launches on the GPU."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay
