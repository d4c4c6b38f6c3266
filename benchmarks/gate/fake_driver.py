"""A Triton driver without a device: host code runs on CPU tensors, its kernels are compiled, its launches written down.

    with capture("sm_90") as launches:
        host_code(x, w)
    launches[0].kernel, launches[0].grid, launches[0].arguments["x_ptr"], launches[0].compiled.asm["ptx"]

Nothing is executed: outputs keep whatever they held. Not for threads, and not under TRITON_INTERPRET.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.driver import DriverBase
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from benchmarks.gate.targets import TARGETS, Target

# Blocks ask for more shared memory than a device has: the rules report that, where Triton would stop the host code.
_UNLIMITED = 1 << 40


class Launch(NamedTuple):
    """One launch: `kernel[grid](...)`, or a launch of a kernel compiled before.

    Fields:
        kernel: the JIT function, by its module's last name and its own: "gemm._gemm_kernel".
        grid: three numbers, as the device gets them.
        arguments: every argument by name, as the host code gave it: tensors, descriptors, numbers, None.
        constants: the names whose value is compiled in: tl.constexpr, None, and integers equal to 1.
        num_warps: warps of a block.
        num_stages: stages of the software pipeline.
        target: the device that it was compiled for.
        compiled: Triton's CompiledKernel: `asm`, `metadata`, `src`, `hash`.
    """

    kernel: str
    grid: tuple[int, int, int]
    arguments: dict[str, Any]
    constants: frozenset[str]
    num_warps: int
    num_stages: int
    target: Target
    compiled: Any

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors among the arguments by name; for a descriptor, the tensor that it describes."""
        bases = {name: getattr(value, "base", value) for name, value in self.arguments.items()}
        return {name: base for name, base in bases.items() if isinstance(base, torch.Tensor)}


@contextlib.contextmanager
def capture(target: str | Target, record: bool = True) -> Iterator[list[Launch]]:
    """Inside, Triton compiles for `target` and the list receives every launch; outside, nothing of Triton's is changed.

    Args:
        target: a name of TARGETS, or a target.
        record: whether launches are written down; without, the list stays empty and a launch costs nothing.

    Yields:
        The launches so far, in order.

    Raises:
        KeyError: there is no target of that name.
        RuntimeError: kernels are interpreted in this process, so none can be compiled.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError("expected a process without TRITON_INTERPRET: its kernels are interpreted, never compiled")
    fake = _FakeDriver(TARGETS[target] if isinstance(target, str) else target, record)
    # Not driver.active: reading it makes the default driver, which needs a device.
    before = driver._active
    configured = _package_configured_for(fake.target, record)
    try:
        with mock.patch.object(JITFunction, "run", fake.watched(JITFunction.run)), configured:
            driver.set_active(fake)
            yield fake.launches
    finally:
        driver._active = before
        fake.forget()


class _FakeDriver(DriverBase):
    """A driver whose device is itself, so that no other driver's kernels are found in a JIT function's caches."""

    def __init__(self, target: Target, record: bool) -> None:
        self.target = target
        self.record = record
        self.launches: list[Launch] = []
        self.closed = False
        self.utils = _Utils()
        self.launcher_cls = self._launcher
        self._functions: dict[int, Any] = {}

    @classmethod
    def is_active(cls) -> bool:
        return False

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError("a launcher of the fake driver has no C++ part")

    def get_current_target(self) -> Any:
        return self.target.gpu_target

    def get_current_device(self) -> _FakeDriver:
        return self

    def set_current_device(self, device: Any) -> None:
        pass

    def get_current_stream(self, device: Any) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Any:
        raise NotImplementedError("nothing can be timed on the fake driver")

    def watched(self, run: Any) -> Any:
        """JITFunction.run, remembering which functions hold kernels for this driver."""

        def watched(function: Any, *arguments: Any, **options: Any) -> Any:
            self._functions[id(function)] = function
            return run(function, *arguments, **options)

        return watched

    def forget(self) -> None:
        """Take this driver's kernels out of every JIT function; one that host code has kept raises when launched."""
        self.closed = True
        for function in self._functions.values():
            kernels, *_ = function.device_caches.pop(self, ({},))
            for kernel in kernels.values():
                # As before its first launch: a destructor must not unload it from a driver that never had it.
                kernel.module = kernel.function = kernel._run = None
        self._functions.clear()
        # The caller's list alone keeps the tensors: this driver is part of a cycle, and may live for a while.
        self.launches = []

    def _launcher(self, src: Any, metadata: Any) -> Any:
        """What Triton calls to launch a compiled kernel; made at the kernel's first launch."""
        function = src.fn
        names = function.arg_names
        compiled = next(k for k in function.device_caches[self][0].values() if k.metadata is metadata)
        constants = frozenset(names[path[0]] for path in src.constants if len(path) == 1)
        kernel = f"{function.__module__.rpartition('.')[2]}.{function.__name__}"
        fixed = (constants, metadata.num_warps, metadata.num_stages, self.target, compiled)

        # After the grid: stream, function, packed metadata, and what is named here.
        def launch(
            x: int, y: int, z: int, _s: Any, _f: Any, _p: Any, metadata: Any, enter: Any, leave: Any, *rest: Any
        ) -> None:
            if self.closed:
                raise RuntimeError(f"{kernel} was compiled in a capture that has ended: no device can run it")
            if enter is not None:
                enter(metadata)
            if self.record:
                given = (getattr(argument, "tensor", argument) for argument in rest)
                self.launches.append(Launch(kernel, (x, y, z), dict(zip(names, given, strict=True)), *fixed))
            if leave is not None:
                leave(metadata)

        return launch


class _Address(int):
    """An address that a launch passes, with the tensor that lies there: it is what is written down."""

    tensor: torch.Tensor

    def __new__(cls, tensor: torch.Tensor) -> _Address:
        address = super().__new__(cls, tensor.data_ptr())
        address.tensor = tensor
        return address


class _Utils:
    """What Triton asks of a device before a kernel's first launch."""

    def get_device_properties(self, device: _FakeDriver) -> dict[str, Any]:
        return {"max_shared_mem": _UNLIMITED, "multiprocessor_count": device.target.multiprocessors}

    def load_binary(self, name: str, binary: bytes, shared: int, device: _FakeDriver) -> tuple[Any, Any, int, int, int]:
        """Module, function, registers and spills (unread), and the threads a block may have."""
        return name, name, 0, 0, 1024

    def unload_module(self, module: Any) -> None:
        pass


@contextlib.contextmanager
def _package_configured_for(target: Target, record: bool) -> Iterator[None]:
    """The package's own kernels take their configurations for `target`, though their tensors are on the CPU."""
    from neat_kernels.kernels import bound, launch

    arch = launch.family(target.arch) if isinstance(target.arch, int) else target.arch
    family = launch.Target(arch, target.multiprocessors)

    def chosen(place: launch.Place) -> launch.Target:
        return place if isinstance(place, launch.Target) else family

    def on(device: torch.device) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    bound.forget()
    try:
        with (
            mock.patch.object(launch, "target", chosen),
            mock.patch.object(launch, "on", on),
            mock.patch.object(bound, "_address", _Address if record else bound._address),
        ):
            yield
    finally:
        # What was prepared holds kernels of this driver, which has none any more.
        bound.forget()
