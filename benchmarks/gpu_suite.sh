#!/usr/bin/env bash
# Tests and benchmarks on a GPU machine, in named parts of under ten minutes each, without installing anything.
#
#   benchmarks/gpu_suite.sh [--resume] [PART...]      default: every part, in the order below
#
#   environment     device, driver, versions
#   ceilings        what the device copies and multiplies
#   tests-gpu       the tests that need a CUDA device
#   tests-kernels   the kernels' tests, on the GPU what they are in the interpreter elsewhere
#   tests-cpu       all other tests
#   sanitizer       compute-sanitizer's memcheck and racecheck over the kernels' guard bands
#   layer-large     one layer against its peers over fresh processes, shapes bound by arithmetic
#   layer-small     the same, shapes bound by launches and by reading W
#   layer-modes     forward, backward and inference with cached features of a large and a small layer
#   decoding        inference with cached features of 1 to 16 tokens
#   tokens          the overhead of a layer from 32 to 32768 tokens
#   widths          the same from width 768 to 8192
#   block           a transformer block, training and inference
#   kernels         the time of every kernel of one layer and of its peers, and the ceilings
#   model           a training step of a whole Llama against PEFT, in the setting of PEFT's own benchmark
#   model-all-linear    the same, every linear layer adapted
#   host            what the host does for a layer's forward and backward, and where its time goes
#   pytest          the pytest-benchmark files
#   tune            launch configurations and plans, ranks up to 16, into OUT; repeated, it goes on where it stopped
#
# Where a GPU is at hand for a quarter of an hour, these first, each line one call:
#   tests-kernels kernels host layer-large          (about 130 + 80 + 15 + 150 s)
#   tests-gpu layer-small model tune
# A wrong kernel spoils all that follows, hence tests-kernels; `kernels` has the ceilings too.
#
# --resume leaves the parts that OUT has as "ok", and begins no case or process anew that an interrupted part has of the
# same commit, device and versions.
#
# PYTHON   the interpreter (default python3)
# OUT      where the results go (default benchmarks/results/DATE-DEVICE)
# NEAT_KERNELS_COMMIT   the commit of a copied tree, whose .git is missing or tells of another
#
# Each part leaves PART.json; suite.log has all output, summary.txt one line per part. The exit status is 1 if a part
# failed; a part that cannot run here is "skipped", with the reason, and is no failure.
set -uo pipefail
cd "$(dirname "$0")/.."

PARTS=(environment ceilings tests-gpu tests-kernels tests-cpu sanitizer layer-large layer-small layer-modes decoding
    tokens widths block kernels model model-all-linear host pytest tune)
LIMIT_S=570
PYTHON="${PYTHON:-python3}"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1

die() { echo "gpu_suite: $*" >&2; exit 2; }
has() { "$PYTHON" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$1') is None)"; }

resume=""
[[ "${1:-}" != --resume ]] || { resume=yes; shift; }
for part in "$@"; do
    [[ " ${PARTS[*]} " == *" $part "* ]] || die "expected parts among: ${PARTS[*]}; got '$part'"
done
[[ $# -gt 0 ]] || set -- "${PARTS[@]}"

"$PYTHON" -c 'import torch' || die "$PYTHON cannot import torch; set PYTHON to an interpreter that can"
command -v timeout > /dev/null || die "expected the command 'timeout' (coreutils), found none"
device="$("$PYTHON" -m neat_kernels.bench.provenance name)" || die "the package cannot be imported"
OUT="${OUT:-benchmarks/results/$(date -u +%Y-%m-%d)-$device}"
mkdir -p "$OUT" || die "cannot write to $OUT"

gpu=""
"$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' && gpu=yes
workers=()
has xdist && workers=(-n auto)
output="$(mktemp)"
trap 'rm -f "$output"' EXIT

# The reason why a part cannot run on this machine, or nothing.
obstacle() {
    case "$1" in
        tests-*)
            has pytest || { echo "pytest is not installed"; return; }
            has hypothesis || { echo "hypothesis is not installed"; return; } ;;
        block | model*) has transformers || { echo "transformers is not installed"; return; } ;;
        pytest) has pytest_benchmark || { echo "pytest-benchmark is not installed"; return; } ;;
        tune)
            for module in triton typer rich tqdm; do has "$module" || { echo "$module is not installed"; return; }; done ;;
    esac
    [[ "$1" != sanitizer ]] || command -v compute-sanitizer > /dev/null || { echo "compute-sanitizer is not installed"; return; }
    case "$1" in ceilings | tests-gpu | tests-kernels | sanitizer | layer-* | decoding | tokens | widths | block | kernels | model* | \
            host | pytest | tune) [[ -n "$gpu" ]] || echo "no CUDA device" ;; esac
}

few=(neat neat_half accelerated peft_lora peft_lora_half peft_peanut lora_by_hand)
all=("${few[@]}" neat_lora formula formula_compiled)

# A process takes half a minute to start on a GPU machine: each measures all the shapes of a part.
# Set `command` to a run of layer_ratio, or of model_step, for a part; what a part has of it already is kept or gone.
ratio() {
    local part="$1"
    shift
    command=("$PYTHON" -m benchmarks.layer_ratio --device cuda --dtypes bfloat16 --threads 8 --seconds 0.5 --limit 500
        --together --output "$OUT/$part.json" --resume "$@")
}
step() {
    command=("$PYTHON" -m benchmarks.model_step --device cuda --model llama-3.2-3b --targets "$2" --dtype bfloat16
        --threads 8 --limit 480 --contenders frozen neat accelerated peft_lora peft_lora_half peft_peanut
        --output "$OUT/$1.json" --resume)
}

# Set `command` to the command of a part.
command_of() {
    case "$1" in
        environment) command=("$PYTHON" -m neat_kernels.bench.provenance) ;;
        tests-gpu) command=("$PYTHON" -m pytest -m gpu) ;;
        # Nearly all of its time is the compiler's: 15 workers take two minutes, one takes half an hour.
        tests-kernels) command=("$PYTHON" -m pytest tests/kernels ${workers[@]+"${workers[@]}"}) ;;
        tests-cpu) command=("$PYTHON" -m pytest -m "not gpu" --ignore tests/kernels ${workers[@]+"${workers[@]}"}) ;;
        sanitizer)
            # racecheck and memcheck are tools of their own; a launch is some hundred times slower under either.
            command=(bash -c "for tool in memcheck racecheck; do compute-sanitizer --tool \$tool --error-exitcode 1 \
                '$PYTHON' -m pytest -x tests/kernels/test_guard_bands.py -k between_strided || exit 1; done") ;;
        ceilings) command=("$PYTHON" -m benchmarks.kernel_times --ceilings --output "$OUT/$1.json") ;;
        layer-large | layer-small) ratio "$1" --shapes "gpu-${1#layer-}" --processes 3 --contenders "${all[@]}" ;;
        layer-modes)
            ratio "$1" --shapes llama-3-8b.q_proj@8192 roberta-base.query@2048 --modes forward backward inference \
                --processes 3 --contenders "${few[@]}" ;;
        decoding) ratio "$1" --shapes decoding-8b --modes inference --processes 3 --contenders "${few[@]}" ;;
        tokens | widths) ratio "$1" --shapes "gpu-$1" --processes 2 --contenders neat peft_lora peft_lora_half peft_peanut ;;
        block)
            ratio "$1" --blocks llama-3.2-3b@3072 --modes training inference --processes 3 \
                --contenders neat neat_half accelerated peft_lora peft_lora_half peft_peanut ;;
        kernels)
            command=("$PYTHON" -m benchmarks.kernel_times --output "$OUT/$1.json"
                --contenders frozen neat neat_half neat_lora peft_lora_half lora_by_hand) ;;
        model) step "$1" default ;;
        model-all-linear) step "$1" all-linear ;;
        host) command=("$PYTHON" -m benchmarks.host_cost --device cuda --profile --output "$OUT/$1.json") ;;
        pytest) command=("$PYTHON" -m pytest -m gpu benchmarks --benchmark-json "$OUT/pytest.json") ;;
        # What has begun is finished: the rest of the part's time is for that.
        tune) command=("$PYTHON" -m neat_kernels tune --quick --minutes 8 --output-dir "$OUT") ;;
    esac
}

# Run a part; its outcome goes to summary.txt, and to PART.json where the command has written none itself.
run_part() {
    local part="$1" outcome rc=0 start=$SECONDS reason
    if [[ -n "$resume" ]] && grep -q "^$part  *[0-9]* s  ok" "$OUT/summary.txt"; then
        echo "=== $part: done before"
        return 0
    fi
    reason="$(obstacle "$part")"
    command_of "$part"
    # With --resume a command that goes on where it stopped finds its file.
    [[ -n "$resume" && " ${command[*]} " == *" --resume "* ]] || rm -f "$OUT/$part.json"
    echo "=== $part: ${command[*]}"
    if [[ -n "$reason" ]]; then
        outcome="skipped: $reason"
    else
        timeout --kill-after=10 "$LIMIT_S" "${command[@]}" 2>&1 | tee "$output"
        rc=${PIPESTATUS[0]}
        case "$rc" in
            0) outcome="ok" ;;
            5) outcome="skipped: pytest selected no test" rc=0 ;;
            124 | 137) outcome="failed: stopped after $LIMIT_S s" ;;
            *) outcome="failed: exit status $rc" ;;
        esac
        [[ "${command[2]}" != pytest ]] || outcome="$outcome; $(tail -n 1 "$output" | tr -d =)"
    fi
    [[ -s "$OUT/$part.json" ]] ||
        "$PYTHON" -m neat_kernels.bench.provenance write "$OUT/$part.json" "$outcome" "${command[@]}" || rc=1
    # A part has one line, its last run's.
    grep -v "^$part " "$OUT/summary.txt" > "$output" || true
    cat "$output" > "$OUT/summary.txt"
    printf '%-16s %4d s  %s\n' "$part" "$((SECONDS - start))" "$outcome" >> "$OUT/summary.txt"
    return "$rc"
}

main() {
    local failed=0 module part
    echo "device: $device; results: $OUT"
    for module in triton peft transformers typer; do
        has "$module" || echo "not installed, what needs it is skipped: $module"
    done
    [[ -n "$resume" ]] || : > "$OUT/summary.txt"
    touch "$OUT/summary.txt"
    for part in "$@"; do
        run_part "$part" || failed=1
    done
    echo "=== summary"
    cat "$OUT/summary.txt"
    return "$failed"
}

main "$@" 2>&1 | tee ${resume:+-a} "$OUT/suite.log"
exit "${PIPESTATUS[0]}"
