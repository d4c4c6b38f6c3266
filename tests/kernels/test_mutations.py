"""The tests of the tests: every line below, broken in a copy of the package, turns a named test red."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from harness import interpreter_only

pytestmark = interpreter_only

ROOT = Path(__file__).parents[2]
NUMBERS = "test_numbers.py::test_several_ragged_tiles_in_every_dimension"
FIRST, LAST = f"{NUMBERS}[True-0-out]", f"{NUMBERS}[False-0-out]"
DEEP = f"{NUMBERS}[True-2-in]"
SLICES = "test_numbers.py::test_a_rank_wider_than_one_slice[out]"
PIECES = "test_numbers.py::test_reductions_in_uneven_pieces"
BANDS = "test_guard_bands.py::test_token_side_between_strided_inputs"
LEFT = "test_guard_bands.py::test_both_sides_backward[many pieces-in-1-all]"
SUMS = "test_sums.py::test_pieces_of_the_tokens"
THREE = "test_sums.py::test_three_sums_of_their_own_sizes_dtypes_and_scalings"
ONE_GRADIENT = "test_guard_bands.py::test_token_side_backward_one_gradient_at_a_time[many pieces"
DROPOUT = "test_options.py::TestDropout::test_the_mask_is_the_references[torch.float32-0.5]"
TOKENS = "test_descriptors.py::test_any_number_of_tokens[33]"
PERSISTENT = "test_descriptors.py::test_programs_that_take_several_tiles[2]"
SLICE = "test_descriptors.py::test_a_slice_of_wider_rows[140]"
MASK = "test_activations.py::TestDropoutMask"
ROUNDING = "test_rounding.py::TestTheBranchDtype"
MERGE = "test_merge_kernel.py"
MERGED = f"{MERGE}::TestNumbers::test_one_rounding_of_an_exact_sum[torch.bfloat16-(65, 33, 5)]"
MERGE_T = f"{MERGE}::test_the_layout_of_w_changes_no_bit_and_is_kept[transposed-77]"
MERGE_SLICE = f"{MERGE}::test_the_layout_of_w_changes_no_bit_and_is_kept[slice-None]"
STOCHASTIC = f"{MERGE}::TestStochasticRounding"
SMALL = "test_small_batch.py"
CROSSED = f"{SMALL}::test_the_largest_and_several_pieces[(16, 300, 70, 5)-out]"
STACKED = f"{SMALL}::test_the_largest_and_several_pieces[(33, 45, 150, 33)-in]"
SMALL_DROPOUT = f"{SMALL}::test_dropout[out]"
FP32 = "test_rounding.py::TestTheFeaturesAreFp32"


class Mutation(NamedTuple):
    """`text` of neat_kernels/kernels/`file`, which occurs once, becomes `other`, and `tests` fail."""

    what: str
    file: str
    text: str
    other: str
    tests: tuple[str, ...]


MUTATIONS = [
    # Masks of loads.
    Mutation("rows of a tall matrix", "skinny.py", "mask_m = offs_m < rows", "mask_m = offs_m >= 0", (FIRST,)),
    Mutation("end of a reduction", "skinny.py", "mask_l = offs_l < last", "mask_l = offs_l >= 0", (FIRST,)),
    Mutation("columns of a factor", "skinny.py", "mask_r = offs_r < R", "mask_r = offs_r < BLOCK_R", (FIRST,)),
    Mutation("end of the base GEMM", "gemm.py", "start + offs_k < K", "start + offs_k >= 0", (FIRST,)),
    Mutation(
        "rows of the base GEMM", "gemm.py", "mask_m, mask_n = offs_m < M", "mask_m, mask_n = offs_m >= 0", (FIRST,)
    ),
    Mutation("columns of S and U", "tiles.py", "mask_r = offs_r < R", "mask_r = offs_r < BLOCK_R", (FIRST,)),
    Mutation(
        "columns of bias",
        "tiles.py",
        "stride_bias, mask=offs_n < N",
        "stride_bias, mask=offs_n >= 0",
        (FIRST,),
    ),
    Mutation("rows of dy", "up_backward.py", "mask=(offs_m < M)", "mask=(offs_m >= 0)", (FIRST,)),
    Mutation(
        "columns of dy",
        "up_backward.py",
        "wide_n, mask_n = offs_n.to(tl.int64), offs_n < N",
        "wide_n, mask_n = offs_n.to(tl.int64), offs_n >= 0",
        (FIRST,),
    ),
    Mutation(
        "padding of the chain's matrices",
        "chain.py",
        "square_ptrs, mask=(offs_s < R)",
        "square_ptrs, mask=(offs_s < BLOCK_R)",
        (DEEP,),
    ),
    Mutation(
        "rows of a shared read of W",
        "small_reads.py",
        "mask=(offs_m < rows)[:, None] & (offs_l < end)",
        "mask=(offs_m >= 0)[:, None] & (offs_l < end)",
        (CROSSED,),
    ),
    Mutation(
        "columns of a shared read of W",
        "small_reads.py",
        "[:, None] & (offs_l < end)[None, :], other",
        "[:, None] & (offs_l >= 0)[None, :], other",
        (STACKED,),
    ),
    Mutation(
        "columns of a factor beside it",
        "small_reads.py",
        "(offs < end)[:, None] & (offs_r < R)",
        "(offs < end)[:, None] & (offs_r < BLOCK_R)",
        (CROSSED,),
    ),
    # Masks of stores.
    Mutation(
        "rows of y",
        "tiles.py",
        "mask=(offs_m < M)[:, None] & (offs_n < N)[None, :])",
        "mask=(offs_m >= 0)[:, None] & (offs_n < N)[None, :])",
        (FIRST,),
    ),
    Mutation(
        "columns of a narrow tile",
        "tiles.py",
        "& (offs_r < R)[None, :]",
        "& (offs_r < BLOCK_R)[None, :]",
        (FIRST,),
    ),
    Mutation("end of a sum", "reduce.py", "offs < size, size", "offs >= 0, size", (FIRST,)),
    # Reductions cut short.
    Mutation(
        "last block of the base GEMM", "gemm.py", "range(0, K, BLOCK_K)", "range(0, K - BLOCK_K, BLOCK_K)", (FIRST,)
    ),
    Mutation(
        "last block of a narrow product",
        "skinny.py",
        "range(first, last, BLOCK_L)",
        "range(first, last - BLOCK_L, BLOCK_L)",
        (FIRST,),
    ),
    Mutation(
        "last slice of r", "tiles.py", "range(0, BLOCK_R, SLICE_R)", "range(0, BLOCK_R - SLICE_R, SLICE_R)", (SLICES,)
    ),
    Mutation(
        "last slice of r in the chain",
        "chain.py",
        "tl.range(0, BLOCK_R, SLICE_R,",
        "tl.range(0, max(SLICE_R, BLOCK_R - SLICE_R), SLICE_R,",
        (SLICES,),
    ),
    Mutation(
        "last block of stacked products",
        "small_reads.py",
        "range(first, last, BLOCK_L)",
        "range(first, last - BLOCK_L, BLOCK_L)",
        (STACKED,),
    ),
    Mutation(
        "last block of crossed products",
        "small_reads.py",
        "range(first, last, BLOCK_M)",
        "range(first, last - BLOCK_M, BLOCK_M)",
        (CROSSED,),
    ),
    Mutation("a share of S", "small_tokens.py", "shares, BLOCK_SHARES)", "shares - 1, BLOCK_SHARES)", (CROSSED,)),
    Mutation("a piece of y", "small_tokens.py", "* N, pieces, BLOCK", "* N, pieces - 1, BLOCK", (STACKED,)),
    Mutation(
        "a share of dchain", "reduce.py", "also_pieces, also_scaling,", "also_pieces - 1, also_scaling,", (CROSSED,)
    ),
    Mutation(
        "a piece of dH",
        "features_backward.py",
        "plane, pieces, BLOCK_PIECES)",
        "plane, pieces - 1, BLOCK_PIECES)",
        (f"{SUMS}[fused-out-1-0.0-torch.float32]",),
    ),
    Mutation("a sum left for dB", "neat.py", "wanted.dchain, left", "wanted.dchain, None", (LEFT,)),
    Mutation(
        "scaling of a sum beside another", "reduce.py", "also_pieces, also_scaling,", "also_pieces, 1.0,", (THREE,)
    ),
    Mutation(
        "σ' in dA",
        "small_reads.py",
        "act_backward(f.to(tl.float32), z, ACTIVATION)",
        "f.to(tl.float32)",
        (SMALL_DROPOUT,),
    ),
    Mutation(
        "s in y", "small_tokens.py", "input_precision=PRECISION) * scaling", "input_precision=PRECISION)", (CROSSED,)
    ),
    Mutation("the mask of dx", "small_tokens.py", "kept(acc, seed_ptr, offs, threshold)", "acc", (SMALL_DROPOUT,)),
    Mutation(
        "1 / (1 - p) in dx of few tokens", "small_tokens.py", "scaling / (1.0 - dropout)", "scaling", (SMALL_DROPOUT,)
    ),
    Mutation("a piece of an ordered sum", "reduce.py", "(offs_p < pieces)", "(offs_p < pieces - 1)", (FIRST,)),
    Mutation(
        "a piece of Z",
        "features.py",
        "* R, pieces, BLOCK_PIECES)",
        "* R, pieces - 1, BLOCK_PIECES)",
        (f"{PIECES}[(5, 811, 13)-out-1-torch.float32]",),
    ),
    Mutation(
        "a ragged last piece",
        "launch.py",
        "max(1, cdiv(tiles, steps))",
        "max(1, tiles // steps)",
        (f"{PIECES}[(5, 811, 13)-out-1-torch.float32]",),
    ),
    Mutation(
        "last block of a piece of dy",
        "up_backward.py",
        "tl.minimum(first + steps * BLOCK_M, M)",
        "tl.minimum(first + (steps - 1) * BLOCK_M, M)",
        (FIRST,),
    ),
    Mutation(
        "last block of the GEMM on descriptors",
        "gemm_descriptor.py",
        "range(0, K, BLOCK_K)",
        "range(0, K - BLOCK_K, BLOCK_K)",
        (TOKENS,),
    ),
    # Descriptors.
    Mutation(
        "tiles of a persistent program",
        "gemm_descriptor.py",
        "tl.num_programs(0), flatten",
        "1, flatten",
        (PERSISTENT,),
    ),
    Mutation(
        "place of a tile of W",
        "gemm_descriptor.py",
        "b_desc.load([start, first_n])",
        "b_desc.load([start, 0])",
        (TOKENS,),
    ),
    Mutation(
        "place of a tile of C",
        "gemm_descriptor.py",
        "c_desc.store([first_m, first_n]",
        "c_desc.store([first_m, 0]",
        (TOKENS,),
    ),
    Mutation("alignment of rows", "gemm_descriptor.py", "itemsize % 16 == 0", "itemsize >= 0", (SLICE,)),
    # Factors and signs.
    Mutation("scaling in y", "tiles.py", "tile = tile * scaling", "tile = tile", (FIRST,)),
    Mutation("sign of the branch", "gemm.py", "acc += low_rank_tile(", "acc -= low_rank_tile(", (LAST,)),
    Mutation(
        "scaling in dS",
        "up_finish.py",
        "pieces, TALL_PIECES) * scaling",
        "pieces, TALL_PIECES)",
        (FIRST,),
    ),
    Mutation("scaling in dbias", "up_finish.py", "N, rows, 1.0, BLOCK", "N, rows, scaling, BLOCK", (FIRST,)),
    Mutation("bias", "gemm.py", "    if bias_ptr is not None:", "    if False:", (FIRST,)),
    # The chain and the activations.
    Mutation(
        "order of the skips",
        "chain.py",
        " h += tl.load(trace_ptr + (2 * DEPTH - 1 - i)",
        " h += tl.load(trace_ptr + (i - DEPTH)",
        (DEEP,),
    ),
    Mutation(
        "order of the skips' gradients",
        "chain.py",
        " dh += tl.load(trace_ptr + (2 * DEPTH - 1 - i)",
        " dh += tl.load(trace_ptr + (DEPTH + i)",
        (DEEP,),
    ),
    Mutation(
        "padding of the chain's layers",
        "chain.py",
        "trace_ptr + i * plane + offs, h, mask=mask",
        "trace_ptr + i * plane + offs, h",
        (DEEP,),
    ),
    Mutation("plane of the trace", "chain.py", "da_ptr = trace_ptr + 2 * DEPTH * plane", "da_ptr = trace_ptr", (DEEP,)),
    Mutation("side of an encoder's gradient", "chain.py", "tl.trans(da), h,", "tl.trans(h), da,", (DEEP,)),
    Mutation(
        "slope of tanh",
        "activations.py",
        "dh * (1.0 - t * t)\n",
        "dh * (1.0 - t)\n",
        ("test_activations.py::TestActivations::test_derivative[tanh]",),
    ),
    Mutation(
        "σ' without a chain",
        "skinny.py",
        "q = act_backward(q.to(tl.float32), z, ACTIVATION)",
        "q = q.to(tl.float32)",
        (FIRST,),
    ),
    Mutation(
        "NaN through relu",
        "activations.py",
        "tl.where(z < 0, 0.0, z)",
        "tl.where(z > 0, z, 0.0)",
        ("test_activations.py::TestActivations::test_what_is_not_finite[relu]",),
    ),
    # Dropout.
    Mutation("1 / (1 - p) in S", "down.py", "s = s * inv_keep", "s = s", (DROPOUT,)),
    Mutation(
        "1 / (1 - p) in dx", "gemm_descriptor.py", "self.scaling / (1.0 - self.dropout)", "self.scaling", (DROPOUT,)
    ),
    Mutation(
        "1 / (1 - p) in dH",
        "features_backward.py",
        "pieces, BLOCK_PIECES) * scaling",
        "pieces, BLOCK_PIECES)",
        (f"{SUMS}[fused-out-1-0.5-torch.float32]",),
    ),
    Mutation("1 / (1 - p) in dD", "down_backward.py", "1.0 / (1.0 - dropout))", "1.0)", (DROPOUT,)),
    Mutation(
        "row of the mask in dx",
        "tiles.py",
        "index = wide_m[:, None] * N",
        "index = wide_m[:, None] * M",
        (DROPOUT,),
    ),
    Mutation(
        "column of the mask in S",
        "skinny.py",
        "offs_l.to(tl.int64)[None, :] * index_l",
        "tl.arange(0, BLOCK_L).to(tl.int64)[None, :] * index_l",
        (DROPOUT,),
    ),
    Mutation(
        "high word of the index",
        "dropout.py",
        "index >> 32",
        "index >> 63",
        (f"{MASK}::test_a_row_beyond_2_to_the_32",),
    ),
    Mutation(
        "edge of the threshold",
        "dropout.py",
        ">= threshold",
        "> threshold",
        (f"{MASK}::test_a_word_equal_to_the_threshold_is_kept",),
    ),
    # Dtypes and offsets.
    Mutation(
        "rounding of U to c",
        "tiles.py",
        "tl.dot(p, q.to(c), ",
        "tl.dot(p.to(tl.float32), q.to(tl.float32), ",
        (f"{ROUNDING}::test_of_up[None-torch.bfloat16]",),
    ),
    Mutation(
        "fp32 features of a half weight",
        "features.py",
        "weight.dtype if weight.dtype == A.dtype and A.dtype in HALF_DTYPES else torch.float32",
        "weight.dtype",
        (f"{FP32}::test_over_an_fp32_A[torch.bfloat16]",),
    ),
    Mutation(
        "fp32 in dA",
        "features_backward.py",
        "BLOCK_R, tl.float32, ACTIVATION",
        "BLOCK_R, tl.bfloat16, ACTIVATION",
        (f"{FP32}::test_their_backward[0-torch.bfloat16]",),
    ),
    Mutation(
        "int64 offsets",
        "skinny.py",
        "wide_m = offs_m.to(tl.int64)",
        "wide_m = offs_m",
        ("test_layouts.py::test_rows_farther_apart_than_an_int32_can_say[x]",),
    ),
    Mutation("a contiguous S", "low_rank.py", "else S.contiguous()", "else S", (f"{BANDS}[0.0-transposed]",)),
    # The merge.
    Mutation("rows of W", "merge.py", "(offs_n < N)[:, None]", "(offs_n >= 0)[:, None]", (MERGED,)),
    Mutation("columns of W", "merge.py", "(offs_k < K)[None, :]", "(offs_k >= 0)[None, :]", (MERGED,)),
    Mutation("sign of ΔW", "merge.py", "w.to(tl.float32) + delta", "w.to(tl.float32) - delta", (MERGED,)),
    Mutation(
        "a second rounding of the merge",
        "merge.py",
        "w.to(tl.float32) + delta",
        "w.to(tl.float32) + delta.to(w.dtype).to(tl.float32)",
        (MERGED,),
    ),
    Mutation(
        "rows of the merge's grid", "merge.py", "launch.cdiv(N, config.block_m)", "N // config.block_m", (MERGED,)
    ),
    Mutation("a transposed W's factors", "merge.py", "merged.t(), U, D, index", "merged.t(), D, U, index", (MERGE_T,)),
    Mutation("a transposed W's index", "merge.py", "index[::-1]", "index", (MERGE_T,)),
    Mutation("strides of the merged weight", "merge.py", "*merged.stride(),", "*weight.stride(),", (MERGE_SLICE,)),
    Mutation(
        "a flag for every tile",
        "merge.py",
        "flag_ptr + pid",
        "flag_ptr + pid // 2",
        (f"{MERGE}::test_what_is_not_finite_is_told[None-W-nan]",),
    ),
    Mutation(
        "infinity in the flag",
        "merge.py",
        '< float("inf")',
        '<= float("inf")',
        (f"{MERGE}::test_an_overflow_of_fp16_is_told",),
    ),
    Mutation(
        "the half of the random word",
        "merge.py",
        "index) >> 16)",
        "index) & 0xFFFF)",
        (f"{STOCHASTIC}::test_every_kind_of_number[1]",),
    ),
    Mutation(
        "bits cut off after the random number",
        "merge.py",
        "& 0xFFFF0000",
        "& 0xFFFFFFFF",
        (f"{STOCHASTIC}::test_every_kind_of_number[1]",),
    ),
    Mutation(
        "the largest bf16 and beyond",
        "merge.py",
        "LARGEST_BITS, rounded",
        "0x7F800000, rounded",
        (f"{STOCHASTIC}::test_what_is_not_finite_and_the_largest_numbers_are_rounded_to_the_nearest",),
    ),
    Mutation(
        "randomness in a row",
        "merge.py",
        "wide_k[None, :] * index_k)",
        "wide_k[None, :] * 0)",
        (f"{STOCHASTIC}::test_rows_and_columns_round_independently",),
    ),
    # What the interpreter is made to do.
    Mutation(
        "ties to even",
        "interpreter.py",
        "0x7FFF + ((bits >> 16) & 1)",
        "0x8000",
        ("test_interpreter_shim.py::TestCasts::test_ties_go_to_even",),
    ),
]

# Everything slow to import but the package itself, whose copies differ: each run is a fork of this process.
SERVER = """
import os, sys
import hypothesis, numpy, pytest, torch, triton.runtime.interpreter
for line in sys.stdin:
    copy, *tests = line.rstrip("\\n").split("\\t")
    child = os.fork()
    if not child:
        os.chdir(copy)
        sys.path.insert(0, copy)
        with open("log", "w") as log:
            os.dup2(log.fileno(), 1), os.dup2(log.fileno(), 2)
            code = pytest.main(["-q", "--tb=line", "--rootdir=.", "-p", "no:cacheprovider", *tests])
            import neat_kernels
            if not neat_kernels.__file__.startswith(copy + os.sep):
                code = 99
            sys.stdout.flush()
            os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def server():
    """A process that runs tests of a copy on request."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    for name in [*environment]:
        if name.startswith(("PYTEST_", "PYTHONPATH")):
            del environment[name]
    with subprocess.Popen(
        [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True
    ) as process:
        yield process
        process.stdin.close()


def outcome(server, copy, tests):
    """Exit status of pytest, and what it said."""
    line = "\t".join([str(copy), *(f"tests/kernels/{test}" for test in tests)])
    server.stdin.write(line + "\n")
    server.stdin.flush()
    return int(server.stdout.readline()), (copy / "log").read_text()


@pytest.fixture
def copy(tmp_path):
    """The package and these tests, to be broken."""
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "neat_kernels", tmp_path / "neat_kernels", ignore=ignore)
    shutil.copytree(ROOT / "tests" / "kernels", tmp_path / "tests" / "kernels", ignore=ignore)
    for name in ("pyproject.toml", "tests/conftest.py", "tests/budget.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def test_the_named_tests_pass_as_they_are(server, copy):
    tests = sorted({test for mutation in MUTATIONS for test in mutation.tests})
    status, said = outcome(server, copy, tests)
    assert status == 0, said
    assert f"{len(tests)} passed" in said


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.what)
def test_a_broken_kernel_turns_the_tests_red(mutation, server, copy):
    path = copy / "neat_kernels" / "kernels" / mutation.file
    source = path.read_text()
    assert source.count(mutation.text) == 1
    path.write_text(source.replace(mutation.text, mutation.other))
    status, said = outcome(server, copy, mutation.tests)
    assert status == 1, said
    assert f"{len(mutation.tests)} failed" in said
    # Wrong numbers or a wrong access, not a mutation that is no program.
    assert not any(f"{kind}Error" in said for kind in ("Name", "Syntax", "Indentation", "Attribute", "Import"))
