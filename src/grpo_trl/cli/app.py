"""The command `grpo-trl`. What loads torch is imported where it is used, so that help and completion answer at once."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.live import Live
from rich.table import Table

from ..errors import RunStopped
from ..plan import RunPlan, card_named
from .template import configuration


STOPPED, WRONG = 1, 2
"""Exit codes: a run that ended early and is saved; something that cannot work, found before training."""
OPEN = {"allow_extra_args": True, "ignore_unknown_options": True}

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Train language models with GRPO: plan before, watch during, understand after.",
    epilog="Exit codes: 0 done, 1 stopped by a guard, 2 mistake, 75 signal, 130 Ctrl-C.",
)
ConfigFile = Annotated[
    Path, typer.Argument(exists=True, dir_okay=False, metavar="CONFIG", help="A YAML file; see grpo-trl init.")
]
RUN = typer.Argument(exists=True, file_okay=False, metavar="RUN_DIR", help="The output_dir of a run.")
RunFolder = Annotated[Path, RUN]
RunFolders = Annotated[list[Path], RUN]


@contextmanager
def mistakes() -> Iterator[None]:
    """Show what the user can mend as one message, without a traceback."""
    try:
        yield
    except (ValueError, TypeError, ImportError, OSError) as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(WRONG) from error


@app.command(context_settings=OPEN)
def train(context: typer.Context, config: ConfigFile) -> None:
    """Train as CONFIG says; further options override it.

    For example: grpo-trl train CONFIG --learning_rate 2e-6

    On several GPUs: torchrun --nproc_per_node 8 -m grpo_trl train CONFIG
    """
    from .configuration import Configuration, known_options, options_of
    from .launch import launch, split_launch

    with mistakes():
        launched = split_launch(options_of(config), context.args, known_options())
        launch(launched, config)
        job = Configuration.parse(launched.training, launched.words)
        trainer = job.trainer()
    try:
        trainer.train(resume_from_checkpoint=job.training.resume_from_checkpoint)
    except RunStopped as stop:
        typer.echo(f"Stopped: {stop}", err=True)
        raise typer.Exit(STOPPED) from stop
    trainer.save_model(job.training.output_dir)
    if trainer.is_world_process_zero():
        typer.echo(f"The model is in {job.training.output_dir}. Next: grpo-trl report {job.training.output_dir}")
    if job.training.push_to_hub:
        trainer.push_to_hub(dataset_name=job.script.dataset_name)


@app.command(context_settings=OPEN)
def plan(
    context: typer.Context,
    config: ConfigFile,
    gpu: Annotated[str | None, typer.Option(help="Estimate the time of a step on this card, e.g. H100.")] = None,
    gpu_memory: Annotated[float | None, typer.Option(help="GiB of a card; that of --gpu by default.")] = None,
    ranks: Annotated[int | None, typer.Option(min=1, help="GPUs; num_processes of CONFIG by default, or 1.")] = None,
) -> None:
    """Show what CONFIG does and costs, without loading weights.

    Options of the configuration override it, as for train.
    """
    from .planned import planned_run

    with mistakes():
        card = None if gpu is None else card_named(gpu)
        planned = planned_run(config, context.args, ranks, card, gpu_memory)
    console = Console()
    typer.echo(planned.text(console.width if console.is_terminal else None))
    if planned.gpu_bytes is not None:
        console.print(_launches(planned))


def _launches(planned: RunPlan) -> Table:
    table = Table("launch", "GiB a rank at the peak", "fits")
    for name, size, fits in planned.fitting():
        table.add_row(name, f"{size / 2**30:.1f}", "yes" if fits else "no")
    return table


@app.command()
def init(
    file: Annotated[Path, typer.Argument(metavar="CONFIG", help="The file to write.")] = Path("grpo.yaml"),
    model: Annotated[str, typer.Option(help="Hub name or path.")] = "Qwen/Qwen2.5-0.5B-Instruct",
    dataset: Annotated[str, typer.Option(help="Hub name, folder or file with a column 'question'.")] = "openai/gsm8k",
    output: Annotated[str, typer.Option(help="Where the run goes.")] = "outputs/grpo",
) -> None:
    """Write a commented configuration to start from."""
    with mistakes():
        if file.exists():
            raise ValueError(f"{file} exists; give another name.")
        file.write_text(configuration(str(file), model, dataset, output), encoding="utf-8")
    typer.echo(f"{file} is written. Next: grpo-trl plan {file}")


@app.command()
def watch(
    run: RunFolder,
    once: Annotated[bool, typer.Option("--once", help="Show the run as it is now, and leave.")] = False,
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks.")] = 2.0,
) -> None:
    """Watch a run of another process until it ends or stops."""
    from ..report.live import view
    from ..report.run import Run

    with mistakes():
        shown: Any = view(Run.read(run), run)
    if once:
        Console().print(shown)
        return
    with Live(shown, refresh_per_second=4) as live:
        while not (state := Run.read(run)).over:
            live.update(view(state, run))
            time.sleep(interval)
        live.update(view(state, run))


@app.command()
def report(
    runs: RunFolders,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Default: report.html in the first run.")
    ] = None,
    png: Annotated[Path | None, typer.Option(help="Draw the curves of the first run as a picture, too.")] = None,
) -> None:
    """Write one HTML page about a run, or about several."""
    from ..report import Run, plot_run, write_report

    with mistakes():
        page = write_report(runs, output or runs[0] / "report.html")
        if png is not None:
            first = Run.read(runs[0])
            plot_run(first.entries, png, first.name)
    typer.echo(str(page))


def main() -> None:
    """Run the command."""
    app(prog_name="grpo-trl")
