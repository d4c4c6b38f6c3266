"""The `neat-kernels` command. Everything heavy is imported by the command that needs it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from neat_kernels._version import __version__

# One paragraph a line: rich would otherwise join the lines of the code.
UNDER_PEFT = """\
[bold]An existing PEFT script, PEANuT or LoRA, in three lines:[/]

from neat_kernels.integrations.peft import accelerate

model = get_peft_model(model, PeanutConfig(...))  # as before, or LoraConfig(...)

print(accelerate(model))
"""

app = typer.Typer(
    name="neat-kernels",
    help="Fast Neat fine-tuning: see what this machine runs, fine-tune a model, measure, predict costs, tune launches.",
    epilog=UNDER_PEFT,
    rich_markup_mode="rich",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

# A shell gives 128 + SIGINT to what Ctrl-C has ended.
USAGE, FAILURE, INTERRUPTED = 2, 1, 130


def main() -> None:
    """Run the command line."""
    app()


def print_version(wanted: bool) -> None:
    """Print the version and leave."""
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=print_version)
    ] = False,
) -> None:
    """Fast Neat fine-tuning: see what this machine runs, fine-tune a model, measure, predict costs, tune launches."""


@contextmanager
def told_plainly() -> Iterator[None]:
    """Turn the errors a user can act on into one message and an exit status."""
    from neat_kernels.adapters.errors import AdapterError
    from neat_kernels.bench import BenchError
    from neat_kernels.finetune.train import TrainingError
    from neat_kernels.interrupt import Interrupted
    from neat_kernels.tuning import TuningError
    from neat_kernels.usage import UsageError

    try:
        yield
    except Interrupted as error:
        Console(stderr=True).print(escape(str(error)), highlight=False, soft_wrap=True)
        raise typer.Exit(INTERRUPTED) from error
    except (UsageError, TrainingError, TuningError, AdapterError, BenchError, OSError) as error:
        Console(stderr=True).print(f"[bold red]Error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        raise typer.Exit(USAGE if isinstance(error, UsageError) else FAILURE) from error


@app.command()
def env() -> None:
    """Print versions, devices and backends, and check each backend against float64 on this machine."""
    from neat_kernels.environment import print_environment, print_self_check

    console = Console()
    print_environment(console)
    if not print_self_check(console):
        raise typer.Exit(FAILURE)


def option(help: str, default: str, panel: str, *names: str) -> Any:
    """An option that is None unless it is given, so that one that nothing would read can be refused."""
    return typer.Option(*names, help=help, show_default=default, rich_help_panel=panel)


DATA, METHODS, TRAINING = "Model and data", "Methods", "Training"
ACTIVATIONS = "relu, sin2pi, sin, gelu, gelu_tanh, silu, tanh, sigmoid or identity"
SEVERAL = "several, repeated or in a comma list"

Text = str | None
Texts = list[str] | None
Whole = int | None
Real = float | None
Place = Path | None


@app.command()
def finetune(
    task: Annotated[
        Text, option("classify, or lm for a causal language model (needs --model and --data).", "classify", DATA)
    ] = None,
    model: Annotated[Text, option("Folder or hub id of a text model.", "all-MiniLM-L6-v2, installed", DATA)] = None,
    data: Annotated[
        Place,
        option(
            ".csv, .jsonl or .parquet file (lm: .txt too), or a name for `datasets`.", "docstrings of libraries", DATA
        ),
    ] = None,
    text_column: Annotated[Text, option("Column of the text.", "text", DATA)] = None,
    prompt_column: Annotated[Text, option("lm: column of a prompt that is not learned.", "none", DATA)] = None,
    messages_column: Annotated[
        Text, option("lm: column of chats, of which the assistant's turns are learned.", "none", DATA)
    ] = None,
    label_column: Annotated[Text, option("Column of the label.", "label", DATA)] = None,
    pair_column: Annotated[Text, option("Column of a second text, for pairs.", "none", DATA)] = None,
    methods: Annotated[
        Texts,
        option(
            f"probe (not lm), lora, neat or full; {SEVERAL}, are compared.",
            "probe,lora,neat; lm: lora,neat",
            METHODS,
            "--method",
        ),
    ] = None,
    r: Annotated[Whole, option("Rank of the adapters.", "8", METHODS, "--r")] = None,
    depth: Annotated[Whole, option("Neat: pairs of encoder and decoder.", "0", METHODS)] = None,
    activation: Annotated[Text, option(f"Neat: {ACTIVATIONS}.", "relu", METHODS)] = None,
    orientation: Annotated[Text, option("Neat: the side of W that A acts on, out or in.", "out", METHODS)] = None,
    scaling: Annotated[Real, option("Factor of the adapters' update.", "1", METHODS)] = None,
    target_modules: Annotated[
        Texts, option(f"Layers to adapt ({SEVERAL}), or all-linear.", "PEFT's choice, such as query,value", METHODS)
    ] = None,
    lr: Annotated[
        Texts,
        option(f"Learning rate; of {SEVERAL}, each method gets its best in validation.", "each method's own", TRAINING),
    ] = None,
    steps: Annotated[Whole, option("Optimizer steps.", "200", TRAINING)] = None,
    batch_size: Annotated[Whole, option("Texts in a step; lm: rows.", "32; lm: 8", TRAINING)] = None,
    max_length: Annotated[
        Whole, option("Tokens read of each text; lm: of a row.", "32 of a docstring, else 128; lm: 512", TRAINING)
    ] = None,
    dtype: Annotated[
        Text, option("float32; or bfloat16, float16: what trains stays float32.", "float32", TRAINING)
    ] = None,
    device: Annotated[Text, option("Such as cpu, cuda or cuda:1.", "an accelerator, else cpu", TRAINING)] = None,
    seed: Annotated[
        Texts, option(f"Seed of head, adapters and batches; {SEVERAL}, are averaged.", "0", TRAINING)
    ] = None,
    output: Annotated[Place, option("Folder for the results.", "neat-finetune", TRAINING)] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the results of an earlier run.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with a run that was stopped, as if it had not.")
    ] = False,
) -> None:
    """Fine-tune a pretrained text model by several methods, and compare them: as a classifier, or as a language model.

    Without options, MiniLM learns to tell from a docstring which library it was written for; nothing is downloaded.
    Ctrl-C writes what there is: the same command with --resume goes on from there.
    """
    given = dict(locals())
    with told_plainly():
        from neat_kernels.finetune.settings import Settings

        settings = Settings.from_options(given)
        quiet_libraries()
        from neat_kernels.finetune.run import run

        run(settings, Console())


LAYER, FILES = "Layer and device", "Files"


@app.command()
def bench(
    preset: Annotated[
        Text, typer.Argument(help="quick, under three minutes on a CPU, or full.", show_default="quick")
    ] = None,
    model: Annotated[bool, typer.Option("--model", help="Predict from the performance model; nothing is run.")] = False,
    device: Annotated[
        Text,
        option("cpu or cuda; with --model one that the model knows, such as A100.", "cuda or cpu; model: H200", LAYER),
    ] = None,
    shape: Annotated[
        Texts,
        option("A layer as TOKENSxINxOUT or, measured, LAYER@TOKENS; may be repeated.", "the preset's layers", LAYER),
    ] = None,
    r: Annotated[
        Whole, option("Rank of the adapter of --shape; with --model up to 128.", "16", LAYER, "--r", "--rank")
    ] = None,
    dtype: Annotated[Text, option("bf16, fp16 or fp32.", "what the device multiplies; model: bf16", LAYER)] = None,
    threads: Annotated[Whole, option("CPU threads.", "torch's", LAYER)] = None,
    plan: Annotated[
        Text, option("With --model: auto, fused, cublas or small.", "auto: the model's choice", LAYER)
    ] = None,
    compare: Annotated[
        Place, option("An earlier result: measure it again, and tell what changed beyond noise.", "none", FILES)
    ] = None,
    measured: Annotated[
        Place, option("A result to compare with it, or to predict with --model; nothing is run.", "none", FILES)
    ] = None,
    json: Annotated[
        Place, option("Write the results to this file.", "named after the time; model: none", FILES)
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace that file if it is there.", rich_help_panel=FILES)
    ] = False,
) -> None:
    """Time one layer against the frozen linear, LoRA and other ways to run Neat, each held to float64 first.

    Prints ratios to the frozen linear with their spread over fresh processes, and memory; writes them as JSON. With
    --model it predicts bytes, operations and time of every kernel on a GPU instead: predictions are no measurements.
    """
    given = dict(locals())
    with told_plainly():
        if model:
            from neat_kernels.model.command import run
        else:
            from neat_kernels.bench.command import run

        run(given, Console())


@app.command()
def plot(
    files: Annotated[
        list[Path],
        typer.Argument(
            help="A result of bench, of benchmarks.layer_ratio or benchmarks.model_step; or some of kernel_times."
        ),
    ],
    output_dir: Annotated[Place, typer.Option(help="Folder for the pictures.", show_default="this one")] = None,
    format: Annotated[Text, typer.Option(help="svg or png.", show_default="svg")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace pictures that are there.")] = False,
) -> None:
    """Draw measurements: overhead against tokens and width, memory, whole models, kernels under the roofline."""
    with told_plainly():
        from neat_kernels.bench.plot_command import run

        run(files, output_dir, format, overwrite, Console())


@app.command()
def tune(
    stage: Annotated[
        Texts,
        typer.Option(
            help="What to measure: gemm, gemm-descriptor, rows, columns, down, up-backward, finish, stacked, "
            "crossed, small-down, small-finish, merge, "
            "chain or plans; may be repeated.",
            show_default="all",
        ),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Ranks up to 16 in bf16, no dropout, fewer samples.")] = False,
    minutes: Annotated[Real, typer.Option(help="Begin nothing after this many minutes.", show_default="60")] = None,
    output_dir: Annotated[Place, typer.Option(help="Folder for the two files.", show_default="the kernels'")] = None,
    again: Annotated[bool, typer.Option("--again", help="Measure what the files have from this version too.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List what would be measured; needs no GPU.")] = False,
) -> None:
    """Measure launch configurations and plans on this machine's GPU, and write what the kernels then read.

    What is finished is written at once: after an interruption the same command goes on where it was.
    """
    given = dict(locals())
    with told_plainly():
        from neat_kernels.tuning.command import run

        run(given, Console())


FOLDER, OUTPUT = "Folder of the adapter.", "New folder for the result."
BASE = "Folder or hub id of the base model."
RECORDED = "the one in the adapter's configuration"


@app.command()
def inspect(folder: Annotated[Path, typer.Argument(help=FOLDER)]) -> None:
    """Print what an adapter folder holds, and check every value of it."""
    with told_plainly():
        from neat_kernels.adapters.command import inspect as run

        run(folder, Console())


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(help=FOLDER)],
    output: Annotated[Path, typer.Argument(help=OUTPUT)],
    model: Annotated[Text, typer.Option(help=BASE, show_default=RECORDED)] = None,
    pad_to: Annotated[
        Text, typer.Option(help="Rank of every layer, or vllm for one that it takes.", show_default="the largest")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an adapter that is there.")] = False,
) -> None:
    """Write a Neat adapter as the LoRA adapter that it is, for PEFT and what serves its LoRA folders."""
    with told_plainly():
        from neat_kernels.adapters.command import export as run

        quiet_libraries()
        run(folder, output, model, pad_to, overwrite, Console())


@app.command()
def merge(
    folder: Annotated[Path, typer.Argument(help=FOLDER)],
    output: Annotated[Path, typer.Argument(help=OUTPUT)],
    model: Annotated[Text, typer.Option(help=BASE, show_default=RECORDED)] = None,
    rounding: Annotated[Text, typer.Option(help="nearest, or stochastic for bfloat16.", show_default="nearest")] = None,
    seed: Annotated[Whole, typer.Option(help="Seed of stochastic rounding.", show_default="drawn")] = None,
    dtype: Annotated[Text, typer.Option(help="Of the merged weights.", show_default="the base model's")] = None,
) -> None:
    """Write the base model with the adapter merged into its weights."""
    with told_plainly():
        from neat_kernels.adapters.command import merge as run

        quiet_libraries()
        run(folder, output, model, rounding or "nearest", seed, dtype, Console())


def quiet_libraries() -> None:
    """Keep transformers' own bars and notices out of the progress display."""
    import warnings

    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    # PEFT reads an attribute that transformers has renamed.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    # It says that it does for GPT-2 what it has to do.
    warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False", module="peft")
