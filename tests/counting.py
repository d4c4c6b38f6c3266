"""Count the package's operators as they reach the dispatcher, below autograd and autocast, and look inside them."""

from collections import Counter

from torch.utils._python_dispatch import TorchDispatchMode

from neat_kernels.ops.register import KERNELS


class InsideOps(TorchDispatchMode):
    """Gives every operator of torch's, those inside the package's own too, to `operator`."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def operator(self, func, args, kwargs):
        raise NotImplementedError

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "neat_kernels":
            with self:  # the kernel itself, since a call of the operator would come back here
                return KERNELS[func._opname](*args)
        return self.operator(func, args, kwargs or {})


class CountOps(TorchDispatchMode):
    """Inside the block, `calls` counts every `neat_kernels::*` operator by its bare name."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()
        self.arguments = {}

    @property
    def features(self):
        """Passes through the features of a layer, alone or with its token side."""
        return self.calls["features"] + self.calls["neat_linear"]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        namespace, _, name = func._schema.name.partition("::")
        if namespace == "neat_kernels":
            self.calls[name] += 1
            self.arguments.setdefault(name, []).append(args)
        return func(*args, **(kwargs or {}))
