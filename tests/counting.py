"""Count the package's operators as they reach the dispatcher, below autograd and autocast."""

from collections import Counter

from torch.utils._python_dispatch import TorchDispatchMode


class CountOps(TorchDispatchMode):
    """Inside the block, `calls` counts every `neat_kernels::*` operator by its bare name."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()
        self.arguments = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        namespace, _, name = func._schema.name.partition("::")
        if namespace == "neat_kernels":
            self.calls[name] += 1
            self.arguments.setdefault(name, []).append(args)
        return func(*args, **(kwargs or {}))
