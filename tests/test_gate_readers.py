import pytest

from benchmarks.gate import amdgcn, ptx, sass
from benchmarks.gate.accesses import Access
from benchmarks.gate.targets import TARGETS, blocks_per_multiprocessor


@pytest.mark.parametrize(
    ("name", "warps", "registers", "shared", "tensor_memory", "blocks"),
    [
        ("sm_80", 4, 32, 0, 0, 16),  # 64 warps
        ("sm_80", 1, 32, 0, 0, 32),  # blocks
        ("sm_80", 4, 128, 0, 0, 4),  # 16384 / (128·32) = 4 warps of a sub-partition
        ("sm_80", 4, 129, 0, 0, 3),  # rounded up to 136: 3 warps of a sub-partition
        ("sm_80", 4, 32, 163 * 1024, 0, 1),
        ("sm_80", 4, 32, 163 * 1024 + 1, 0, 0),
        ("sm_80", 4, 32, 81 * 1024, 0, 2),  # with 1 KiB reserved for each
        ("sm_80", 4, 32, 81 * 1024 + 1, 0, 1),
        ("sm_86", 4, 32, 0, 0, 12),
        ("sm_89", 1, 32, 0, 0, 24),
        ("sm_90", 8, 168, 227 * 1024, 0, 1),
        ("sm_100", 4, 64, 1024, 256, 2),
        ("gfx942", 4, 128, 0, 0, 4),  # 512 / 128 waves of a SIMD
        ("gfx942", 8, 130, 0, 0, 1),  # rounded up to 136: 3 waves, 2 for each block
        ("gfx942", 4, 32, 20 * 1024, 0, 3),
    ],
)
def test_blocks_per_multiprocessor(name, warps, registers, shared, tensor_memory, blocks):
    assert blocks_per_multiprocessor(TARGETS[name], warps, registers, shared, tensor_memory) == blocks


PTX = """
.visible .entry k(
	.param .u64 .ptr .global .align 1 k_param_0, .param .u64 .ptr .global .align 1 k_param_1,
	.param .u64 k_param_2, .param .u64 .ptr .global .align 1 k_param_3
)
{
	ld.param.b64 	%rd1, [k_param_0];
	ld.param.b64 	%rd2, [k_param_1];
	ld.param.b64 	%rd3, [k_param_2];
	mad.lo.s64 	%rd4, %rd3, 16, %rd1;
	mov.b64 	%rd9, %rd4;
$L__BB0_1:
	mov.u32 %r1, 0x0; @%p1 ld.global.L1::evict_last.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd9 + 0 ];
	add.s64 	%rd9, %rd9, 64; // %rd2 is in a comment
	cp.async.ca.shared.global [ %r9 + 0 ], [ %rd2 + 16 ], 0x8, %r10;
	selp.b64 	%rd5, %rd1, %rd2, %p2;
	ld.global.v8.b32 	{%r11, %r12, %r13, %r14, %r15, %r16, %r17, %r18}, [%rd5];
	st.shared.v4.b32 	[%r9], {%r1, %r2, %r3, %r4};
	cvt.u64.u32 	%rd7, %r1;
	st.global.b16 	[%rd7], %rs1;
	red.global.add.f32 	[%rd2], %r5;
	@%p1 bra 	$L__BB0_1;
	mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 { %r1 }, { %r2 }, { %r3 }, { %r1 };
	ret;
}
"""


def test_reading_ptx():
    code = ptx.read(PTX, ["x", "w", "", "y"])
    assert code.accesses == [
        Access("load", "x", 16),
        Access("load", "w", 8),
        Access("load", "w|x", 32),
        Access("store", "", 2),
    ]
    assert code.mma == {"mma.sync m16n8k16 f32.bf16.bf16.f32": 1}
    assert code.atomics == {"red.global.add.f32": 1}


def test_reading_sass():
    opcodes = {"LDGSTS.E.BYPASS.LTC128B.128": 3, "LDG.E.U16.CONSTANT": 2, "LDG.E": 1, "STG.E.64": 1, "UTMALDG.2D": 1}
    assert sass._accesses(opcodes) == {"load": {"16": 3, "2": 2, "4": 1, "tma": 1}, "store": {"8": 1}}


LLIR = """
define amdgpu_kernel void @k(ptr addrspace(1) inreg captures(none) %0, ptr addrspace(1) inreg %1) #0 {
  %3 = getelementptr i8, ptr addrspace(1) %0, i64 %9
  br label %4
4:
  %5 = phi ptr addrspace(1) [ %3, %2 ], [ %6, %4 ]
  %6 = getelementptr i8, ptr addrspace(1) %5, i64 64
  %7 = load <8 x bfloat>, ptr addrspace(1) %5, align 16
  %8 = load <4 x i16>, ptr addrspace(3) %10, align 8
  %11 = tail call ptr addrspace(8) @llvm.amdgcn.make.buffer.rsrc.p8.p1(ptr addrspace(1) %1, i16 0, i64 1, i32 2)
  %12 = tail call <4 x i32> @llvm.amdgcn.raw.ptr.buffer.load.v4i32(ptr addrspace(8) %11, i32 %13, i32 0, i32 0)
  tail call void @llvm.amdgcn.raw.ptr.buffer.store.i16(i16 %14, ptr addrspace(8) %11, i32 %13, i32 0, i32 0)
  store <2 x float> %15, ptr addrspace(1) %6, align 8
"""

AMDGCN = """
	buffer_load_dwordx4 v[0:3], v4, s[0:3], 0 offen
	global_load_ushort v5, v[6:7], off
	global_store_short_d16_hi v[6:7], v5, off
	ds_read_b128 v[0:3], v4
	v_mfma_f32_32x32x8_bf16 v[0:15], v[16:17], v[18:19], v[0:15]
	v_mfma_f32_16x16x4_f32 v[0:3], v16, v18, v[0:3]
	global_atomic_add_f32 v0, v1, s[0:1]
	ds_add_f32 v0, v1
	scratch_store_dword off, v0, s32
    .private_segment_fixed_size: 68
    .sgpr_spill_count: 2
    .vgpr_count:     122
    .vgpr_spill_count: 3
"""


def test_reading_amdgcn():
    code = amdgcn.read(LLIR, AMDGCN, ["x", "y"])
    assert code.accesses == [
        Access("load", "x", 16),
        Access("load", "y", 16),
        Access("store", "y", 2),
        Access("store", "x", 8),
    ]
    assert code.machine_accesses == {"load": {"16": 1, "2": 1}, "store": {"2": 1}}
    assert code.mma == {"mfma m32n32k8 f32.bf16": 1, "mfma m16n16k4 f32.f32": 1}
    assert code.atomics == {"global_atomic_add_f32": 1, "ds_add_f32": 1}
    assert (code.registers, code.spilled_registers, code.local_bytes, code.local_accesses) == (122, 5, 68, 1)
