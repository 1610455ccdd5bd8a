"""A GPU replays what was launched once: without the host, a kernel's own time is left."""

from collections.abc import Callable

import torch


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
