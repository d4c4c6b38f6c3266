"""The devices that kernels are compiled for, and the vendors' limits for each.

NVIDIA, every number: "CUDA C++ Programming Guide", section "Compute Capabilities", table "Technical Specifications per
Compute Capability", https://docs.nvidia.com/cuda/cuda-c-programming-guide/index.html#compute-capabilities
Cells of that table span columns; read against NVIDIA's own `arch_traits`, one entry per compute capability,
https://github.com/NVIDIA/cccl/blob/main/libcudacxx/include/cuda/__device/arch_traits.h, which agrees.

AMD gfx942: "AMD GPU specifications", https://rocm.docs.amd.com/en/latest/reference/gpu-specs.html, for LDS, VGPR file
and CUs, and AMD's compiler for what that page leaves out, see the comments at the numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

from triton.backends.compiler import GPUTarget

# "CUDA reserves 1 KB of shared memory per thread block": section "Unified Shared Memory/L1/Texture Cache" of the tuning
# guides, https://docs.nvidia.com/cuda/ampere-tuning-guide/ and https://docs.nvidia.com/cuda/blackwell-tuning-guide/.
_RESERVED = 1024
# cuda_occupancy.h of the CUDA toolkit: cudaOccSMemAllocationGranularity, cudaOccRegAllocationGranularity and
# cudaOccSubPartitionsPerMultiprocessor, each one value for compute capability 8.x, 9.x, 10.x and 12.x.
_SHARED_UNIT = 128
_REGISTER_UNIT = 256
_SUB_PARTITIONS = 4
# "512 columns and 128 rows per CTA": "PTX ISA", section "Tensor Memory",
# https://docs.nvidia.com/cuda/parallel-thread-execution/#tensor-memory
_TENSOR_MEMORY_COLUMNS = 512

# VGPRs are allocated by 8 from a file of 512 for each lane of a SIMD, accumulators included: getVGPRAllocGranule and
# getTotalNumVGPRs, https://github.com/llvm/llvm-project/blob/main/llvm/lib/Target/AMDGPU/Utils/AMDGPUBaseInfo.cpp.
# 512 KiB a CU / (4 SIMDs · 64 lanes · 4 bytes) = 512, with the VGPR file of "AMD GPU specifications".
_VGPR_UNIT = 8
_SIMDS = 4
# LDS is allocated by 128 dwords: getLdsDwGranularity in the same file.
_LDS_UNIT = 512


@dataclass(frozen=True)
class Target:
    """A device: what Triton calls it, a product that has it, and what a block and a multiprocessor (SM or CU) may use.

    Args:
        name: as the reports say it.
        arch: as Triton's GPUTarget takes it: a compute capability, or an LLVM processor.
        product: the product whose number of multiprocessors is `multiprocessors`; only grids depend on it.
        multiprocessors: SMs or CUs of that product.
        shared_per_block: bytes of shared memory (LDS) a block may ask for.
        shared_per_multiprocessor: bytes of shared memory (LDS) of a multiprocessor.
        registers: 32-bit registers of an SM; of one lane of a SIMD on AMD.
        warps: resident warps (wavefronts) of a multiprocessor.
        blocks: resident blocks of a multiprocessor.
    """

    name: str
    arch: int | str
    product: str
    multiprocessors: int
    shared_per_block: int
    shared_per_multiprocessor: int
    registers: int
    warps: int
    blocks: int

    @property
    def is_cuda(self) -> bool:
        """Whether this is an NVIDIA device."""
        return isinstance(self.arch, int)

    @property
    def gpu_target(self) -> GPUTarget:
        """What Triton compiles for."""
        return GPUTarget("cuda", self.arch, 32) if self.is_cuda else GPUTarget("hip", self.arch, 64)


def _cuda(capability: int, product: str, sms: int, shared_kib: int, warps: int, blocks: int) -> Target:
    """A compute capability; shared_kib is an SM's, of which a block may have all but 1 KiB; 64 K registers on all."""
    shared = shared_kib * 1024
    return Target(f"sm_{capability}", capability, product, sms, shared - _RESERVED, shared, 65536, warps, blocks)


TARGETS = {
    target.name: target
    for target in (
        # compute capability, a product and its SMs, KiB of shared memory, resident warps and blocks of an SM
        _cuda(80, "A100", 108, 164, 64, 32),
        _cuda(86, "RTX 3090", 82, 100, 48, 16),
        _cuda(89, "RTX 4090", 128, 100, 48, 24),
        _cuda(90, "H200", 132, 228, 64, 32),
        _cuda(100, "B200", 148, 228, 64, 32),
        _cuda(120, "RTX 5090", 170, 100, 48, 24),
        # 304 CUs, 64 KiB of LDS each ("AMD GPU specifications"). 8 waves a SIMD: getMaxWavesPerEU for CDNA3,
        # https://github.com/ROCm/rocMLIR, mlir/lib/Dialect/Rock. 16 blocks of several waves: getMaxWorkGroupsPerCU's
        # MaxBarriers in AMDGPUBaseInfo.cpp, as above.
        Target("gfx942", "gfx942", "MI300X", 304, 65536, 65536, 512, 8 * _SIMDS, 16),
    )
}


def blocks_per_multiprocessor(target: Target, warps: int, registers: int, shared: int, tensor_memory: int) -> int:
    """Blocks that fit on a multiprocessor at once; 0 if a single one does not.

    Args:
        target: the device.
        warps: warps of a block.
        registers: registers of a thread.
        shared: bytes of shared memory a block asks for.
        tensor_memory: columns of tensor memory a block allocates.

    Returns:
        The number of blocks that registers, shared memory, tensor memory and the limits on residency all allow.
    """
    if shared > target.shared_per_block:
        return 0
    if target.is_cuda:
        per_warp = _round_up(registers * 32, _REGISTER_UNIT)
        resident = target.registers // _SUB_PARTITIONS // per_warp * _SUB_PARTITIONS
        by_registers = resident // warps
        taken = _round_up(shared + _RESERVED, _SHARED_UNIT)
    else:
        by_registers = target.registers // _round_up(registers, _VGPR_UNIT) // -(-warps // _SIMDS)
        taken = _round_up(shared, _LDS_UNIT)
    fits = [target.blocks, target.warps // warps, by_registers]
    if taken:
        fits.append(target.shared_per_multiprocessor // taken)
    if tensor_memory:
        fits.append(_TENSOR_MEMORY_COLUMNS // tensor_memory)
    return min(fits)


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
