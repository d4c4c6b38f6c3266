"""`neat-kernels plot`: what is drawn from which file, points worked out by hand, and what it refuses."""

import json
import re

import pytest
from typer.testing import CliRunner

pytest.importorskip("matplotlib")
from neat_kernels.bench import plot
from neat_kernels.bench.contenders import CONTENDERS
from neat_kernels.bench.model_results import summarize as summarize_models
from neat_kernels.bench.plot import digest, pictures, write_picture
from neat_kernels.bench.processes import summarize
from neat_kernels.bench.provenance import ROOT
from neat_kernels.bench.roofline import read_roofline
from neat_kernels.bench.shapes import LayerShape
from neat_kernels.cli import app

H200 = ROOT / "benchmarks" / "results" / "2026-11-27-nvidia-h200"
FACTS = {"device": "a GPU", "versions": {}}
M, K, N, R = 8192, 4096, 4096, 16


def run(*arguments):
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, ["plot", *map(str, arguments)])


def write(path, content):
    path.write_text(json.dumps({"provenance": FACTS, **content}))
    return path


def case_of(shape, **more):
    entry = {"status": "timed", "adapter_dtype": None, "peak_bytes": 4096, "saved_bytes": 1024}
    contenders = {name: {**entry, "samples_ms": [float(i + 1)]} for i, name in enumerate(CONTENDERS)}
    runs = [{"tolerance": 1.0, "weight_copies": 1, "contenders": contenders}] * 2
    facts = {"mode": "training", "shape": shape, "dtype": "float32", "device": "cpu", "threads": 2, "seconds": 1.0,
             "contenders": list(contenders)}  # fmt: skip
    return {**facts, **more, "runs": runs, "summary": summarize(runs)}


def times_of(**kernels):
    """Of a layer of 8192 tokens, 4096→4096: the time of each kernel, with its launches if they are not one."""
    listed = [{"kernel": name, "launches": 1.0, "us": us} if not isinstance(us, tuple) else
              {"kernel": name, "launches": us[1], "us": us[0]} for name, us in kernels.items()]  # fmt: skip
    return {"dtype": "bfloat16", "ceilings": {"copy bytes/s": 2e12, "bf16 GEMM FLOP/s": 8e14},
            "cases": [{"shape": f"{M}x{K}x{N}x{R}", "contender": "neat", "kernels": listed}]}  # fmt: skip


class TestRoofline:
    def test_points_worked_out_by_hand(self, tmp_path):
        path = write(tmp_path / "k.json", times_of(_up_backward_kernel=20.0, _down_kernel=50.0, _reduce_kernel=1.0))
        found = {point.kernel: point for point in read_roofline([path]).points}
        assert set(found) == {"up_backward", "down"}
        up = found["up_backward"]
        assert up.intensity == pytest.approx(4 * R / 2)
        assert up.throughput == pytest.approx(4 * M * N * R / 20e-6)
        # Without a GEMM of ours, down writes the branch's product for cuBLAS to accumulate onto.
        assert found["down"].bytes == 2 * M * (K + N)
        fused = write(tmp_path / "f.json", times_of(_gemm_descriptor_kernel=(350.0, 2.0), _down_kernel=16.0))
        found = {point.kernel: point for point in read_roofline([fused]).points}
        assert found["down"].bytes == 2 * M * K
        assert found["gemm_descriptor"].throughput == pytest.approx((2 * M * N * K + M * (N + K) * R) / 350e-6)

    def test_a_time_of_two_kernels_under_one_name_is_not_drawn(self, tmp_path):
        both = times_of(_finish_kernel=(20.0, 2.0), _up_backward_kernel=20.0)
        alone = times_of(_finish_kernel=20.0, _up_backward_kernel=20.0)
        names = [
            {point.kernel for point in read_roofline([write(tmp_path / "k.json", content)]).points}
            for content in (both, alone)
        ]
        assert names == [{"up_backward"}, {"up_backward", "up_finish"}]

    def test_the_last_file_s_times_of_a_layer_hold(self):
        found = read_roofline([H200 / "kernel_times-1.json", H200 / "kernel_times-2.json"])
        assert found.device == "NVIDIA H200"
        assert found.bandwidth == pytest.approx(2.7078e12, rel=1e-4)
        large = [point for point in found.points if point.shape == LayerShape(M, K, N, R)]
        assert {point.kernel for point in large} >= {"cuBLAS", "down", "up_backward", "project", "weight"}
        (up,) = [point for point in large if point.kernel == "up_backward"]
        assert up.seconds == pytest.approx(21.872e-6)

    def test_files_of_two_devices_are_refused(self, tmp_path):
        other = write(tmp_path / "k.json", times_of(_down_kernel=50.0))
        result = run(H200 / "kernel_times-1.json", other, "--output-dir", tmp_path)
        assert result.exit_code == 2
        assert "expected kernel times of one device and dtype" in result.output


def test_what_is_drawn_is_what_the_file_has(tmp_path):
    several = write(
        tmp_path / "a.json", {"cases": [case_of("64x32x32x4"), case_of("128x32x32x4"), case_of("64x16x16x4")]}
    )
    assert list(pictures([several])) == ["tokens", "widths", "ratios", "memory"]
    assert list(pictures([write(tmp_path / "b.json", {"cases": [case_of("64x32x16x4")]})])) == ["ratios", "memory"]
    block = write(tmp_path / "c.json", {"cases": [case_of("64x32x32x4", block="x"), case_of("128x32x32x4", block="x")]})
    assert list(pictures([block])) == ["ratios", "memory"]
    result = run(several, "--output-dir", tmp_path)
    assert result.exit_code == 0, result.output
    drawn = (tmp_path / "a-tokens.svg").read_text()
    for contender in CONTENDERS.values():
        assert (contender.label in drawn) == (contender.name != "frozen")
    assert "32→32" in drawn
    assert "saved for backward" in (tmp_path / "a-memory.svg").read_text()


def test_a_model_s_file_is_drawn(tmp_path):
    runs = {name: [{"trained": 1, "ms": [2.0], "peak_bytes": 2**20, "loss": 1.0}] for name in ("frozen", "full")}
    content = {"model": "m", "targets": "default", "dtype": "float32", "r": 4, "tokens": 8, "runs": runs}
    path = write(tmp_path / "m.json", {**content, "summary": summarize_models(runs, 8)})
    result = run(path, "--output-dir", tmp_path, "--format", "png")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "m-model.png").read_bytes().startswith(b"\x89PNG")
    write_picture(tmp_path / "m.svg", pictures([path])["model"])
    assert "full fine-tuning" in (tmp_path / "m.svg").read_text()


def test_the_same_data_give_the_same_bytes_and_tell_their_source(tmp_path):
    sources = [H200 / "kernel_times-2.json"]
    for name in ("one.svg", "two.svg"):
        write_picture(tmp_path / name, pictures(sources)["roofline"], sources)
    one = (tmp_path / "one.svg").read_text()
    assert one == (tmp_path / "two.svg").read_text()
    assert digest(sources) in one
    assert re.fullmatch("sha256 [0-9a-f]{64}", digest(sources))
    assert digest(sources) != digest([H200 / "kernel_times-1.json"])


def test_every_contender_has_a_style():
    assert set(plot._STYLES) == set(CONTENDERS)
    assert len(set(plot._STYLES.values())) == len(CONTENDERS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("no.json",), "expected a result file in JSON"),
        ((H200 / "layer-2048x768.json", H200 / "layer-8192x4096.json"), "expected one file, or several of"),
        ((H200 / "layer-2048x768.json", "--format", "gif"), "--format must be one of svg, png; got 'gif'"),
        ((H200 / "layer-2048x768.json", "--output-dir", "no"), "--output-dir must be a folder that is there"),
    ],
)
def test_refused(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert message in result.output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [{}, [], {"ceilings": 1}, {"targets": "x"}, {"cases": []}])
def test_a_file_that_is_no_result_is_refused(content, tmp_path):
    path = tmp_path / "x.json"
    path.write_text(json.dumps(content))
    result = run(path, "--output-dir", tmp_path)
    assert result.exit_code == 2
    assert "expected a result file of" in result.output


def test_pictures_that_are_there_are_kept(tmp_path):
    (tmp_path / "layer-2048x768-memory.svg").write_text("mine")
    result = run(H200 / "layer-2048x768.json", "--output-dir", tmp_path)
    assert result.exit_code == 2
    assert "is there already" in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["layer-2048x768-memory.svg"]
    assert run(H200 / "layer-2048x768.json", "--output-dir", tmp_path, "--overwrite").exit_code == 0
