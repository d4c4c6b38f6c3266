"""The documentation's tables and pictures are those of the committed results."""

import json
import re

import pytest

from benchmarks import document
from benchmarks.document import BLOCK, PAGES, fill
from neat_kernels.bench.model_results import summarize as summarize_models
from neat_kernels.bench.processes import summarize
from neat_kernels.bench.provenance import ROOT

RESULT = "benchmarks/results/2026-11-27-nvidia-h200/layer-8192x4096.json"
KERNELS = "benchmarks/results/2026-11-27-nvidia-h200/kernel_times-2.json"
PAGE = ROOT / "docs" / "benchmarks.md"


def block(asked, content=""):
    return f"before\n<!-- made: {asked} -->\n{content}<!-- made end -->\nafter\n"


def filled(asked, page=PAGE):
    return fill(block(asked), page)[0]


def rows(text):
    """The cells of a page's tables by the first of each row."""
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")
    ]
    return {line[0]: line[1:] for line in lines}


def test_the_pages_say_what_the_results_say(capsys):
    pytest.importorskip("matplotlib")
    assert document.main(["--check"]) == 0, capsys.readouterr().out


def test_every_measured_table_of_the_page_is_made():
    """What is written by hand there are no figures: only the list of contenders."""
    by_hand = BLOCK.sub("", PAGE.read_text(encoding="utf-8"))
    tables = [line for line in by_hand.splitlines() if line.startswith("|")]
    assert tables[0] == "| contender | what runs |"
    assert not re.search(r"\| *[\d.,]+", "\n".join(tables))
    assert len(BLOCK.findall(PAGE.read_text(encoding="utf-8"))) > 4


def test_a_figure_that_was_changed_by_hand_is_found_and_made_anew(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(document, "ROOT", tmp_path)
    monkeypatch.setattr(document, "PAGES", ("page.md",))
    (tmp_path / "result.json").write_bytes((ROOT / RESULT).read_bytes())
    page = tmp_path / "page.md"
    page.write_text(block("layer result.json graphs"))
    assert document.main(["--check"]) == 1
    assert "page.md differs" in capsys.readouterr().out
    assert document.main([]) == 0
    right = page.read_text()
    assert document.main(["--check"]) == 0
    page.write_text(right.replace("| 1.28 |", "| 1.08 |", 1))
    assert page.read_text() != right
    assert document.main(["--check"]) == 1
    assert document.main([]) == 0
    assert page.read_text() == right


def test_a_picture_of_other_results_is_drawn_anew(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(document, "ROOT", tmp_path)
    monkeypatch.setattr(document, "PAGES", ("page.md",))
    for name in ("1", "2"):
        (tmp_path / f"{name}.json").write_bytes((ROOT / KERNELS.replace("_times-2", f"_times-{name}")).read_bytes())
    (tmp_path / "page.md").write_text(block("picture roof.svg roofline 1.json 2.json"))
    assert document.main([]) == 0
    assert "![roofline](roof.svg)" in (tmp_path / "page.md").read_text()
    assert document.main(["--check"]) == 0
    (tmp_path / "page.md").write_text((tmp_path / "page.md").read_text().replace("1.json 2.json", "1.json"))
    assert document.main(["--check"]) == 1


def test_a_table_is_what_the_file_says():
    content = json.loads((ROOT / RESULT).read_text())
    summary = content["cases"][0]["summary"]
    found = rows(filled(f"layer {RESULT} graphs ms memory"))
    ratio = summary["graphs"]["ratios"]["peft_lora/frozen"]["median"]
    ms, peak = summary["graphs"]["ms"]["peft_lora"], summary["peak_bytes"]["peft_lora"]
    assert found["PEFT LoRA"] == ["fp32", f"{ratio:.2f} = {ms:#.3g} ms", f"{peak / 2**20:.1f}", "–"]
    assert set(rows(filled(f"layer {RESULT} contenders=frozen,neat"))) == {
        "forward + backward", "---", "frozen nn.Linear", "neat-kernels"
    }  # fmt: skip
    text = filled(f"origin {RESULT}")
    for word in ("NVIDIA H200", "torch 2.11.0+cu130", "one process, hence no spread", content["provenance"]["command"]):
        assert word in text


def test_the_suite_of_a_cpu(tmp_path):
    facts = {"device": "a CPU", "driver": None, "cpu_capability": "AVX512", "versions": {"torch": "2.13.0"},
             "commit": "0123456789", "date": "2026-11-28T00:00:00", "command": "python -m x"}  # fmt: skip
    entry = {"status": "timed", "adapter_dtype": "bfloat16", "peak_bytes": 2**21, "saved_bytes": 2**20}
    runs = [{"contenders": {name: {**entry, "samples_ms": [ms]} for name, ms in (("frozen", 2.0), ("neat", one))}}
            for one in (2.2, 2.4, 2.6)]  # fmt: skip
    case = {"mode": "training", "shape": "64x32x16x4", "dtype": "bfloat16", "device": "cpu", "threads": 2,
            "runs": runs, "summary": summarize(runs)}  # fmt: skip
    result = {"provenance": facts, "processes": 3, "cases": [case]}
    (tmp_path / "layers-training-bf16.json").write_text(json.dumps(result))
    blocks = {**result, "cases": [{**case, "block": "llama-3.2-1b"}]}
    (tmp_path / "block.json").write_text(json.dumps(blocks))
    steps = {"neat": [{"trained": 1234, "ms": [100.0], "peak_bytes": 2**30, "loss": 1.0}]}
    model = {"model": "m", "targets": "all-linear", "dtype": "float32", "r": 8, "tokens": 50, "runs": steps,
             "processes": 3, "provenance": facts, "summary": summarize_models(steps, 50)}  # fmt: skip
    (tmp_path / "model-all-linear-fp32.json").write_text(json.dumps(model))
    text = filled(f"suite {tmp_path}")
    assert [line for line in text.splitlines() if line.startswith("###")] == [
        "### layers-training-bf16", "### block", "### model-all-linear-fp32"
    ]  # fmt: skip
    assert "| neat-kernels | bf16 | 1.20 (1.10–1.30) |" in text
    assert "block of llama-3.2-1b, M=64, r=4, bf16" in text
    assert "| neat-kernels | bf16 | 1.20 (1.10–1.30) | 2.0 | 1.0 |" in text
    assert "| neat-kernels | 1,234 | 100 (100–100) | – | 500 | 1,024 |" in text
    assert "a CPU (AVX512); torch 2.13.0; commit 0123456, 2026-11-28; median and range of 3" in text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (block("guess x.json"), "expected layer, model, origin, suite or picture"),
        (block("layer no.json"), "expected a result file"),
        (block(f"layer {RESULT} sorted"), "expected ms, graphs, memory"),
        (block(f"layer {RESULT} size=4"), "got 'size'"),
        (block(f"layer {RESULT} mode=inference"), "expected a case with"),
        (block("layer benchmarks/results/layer_ratio-cpu-epyc-avx2.json graphs"), "expected times under CUDA graphs"),
        (block("suite docs"), "expected results of benchmarks.cpu_suite"),
        (block(f"picture x.svg memory {KERNELS}"), "expected one of the pictures roofline"),
        (block(f"picture x.png roofline {KERNELS}"), "expected an .svg"),
        ("<!-- made: layer x.json -->\n", "expected every block to begin and end"),
    ],
)
def test_what_cannot_be_made_is_refused(text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        fill(text, PAGE)


def test_predictions_are_refused(tmp_path):
    path = tmp_path / "predicted.json"
    path.write_text(json.dumps({"kind": "predicted, not measured", "device": {}, "cases": []}))
    with pytest.raises(ValueError, match="expected a result file"):
        filled(f"layer {path}")


def test_the_pages_are_those_with_blocks():
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    marked = {str(page.relative_to(ROOT)) for page in pages if "<!-- made: " in page.read_text(encoding="utf-8")}
    assert marked == set(PAGES)
