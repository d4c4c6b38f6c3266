"""A step captured in a CUDA graph, as torch's notes on graphs ask for it: warmed up on a side stream first."""

import torch


def capture(step):
    """The graph of step(), and the tensors that every replay fills."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    return graph, captured
