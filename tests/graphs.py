"""A backend of torch.compile that counts what it compiles, and needs no compiler."""

from torch._dynamo.backends.registry import lookup_backend


class CountedGraphs:
    """count: graphs compiled so far by `backend`, which runs them through ATen's own kernels."""

    def __init__(self):
        self.count = 0

    def backend(self, graph, inputs):
        self.count += 1
        return lookup_backend("aot_eager")(graph, inputs)
