"""The `logitloss` command: options to arguments, errors to one line and an exit code.

What is done is in `evaluate` and `demo`. Exit codes: 0; 1 for input that cannot be evaluated; 2 for a wrong
command line; 130 for Ctrl-C.
"""

import io
import os
import shlex
import sys
import tempfile
import time
import warnings
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import click
from click.core import ParameterSource

import logitloss
from logitloss import demo as digits
from logitloss._backends import NAMES
from logitloss._threads import MOST
from logitloss.evaluate import EvaluationError, EvaluationState, Metrics, evaluate_files
from logitloss.evaluate.atomic import check_writable, refuse_to_overwrite
from logitloss.evaluate.checkpoint import Interrupted, Skipped
from logitloss.evaluate.classes import TOP_K
from logitloss.evaluate.counts import N_RANKS
from logitloss.evaluate.files import files_of
from logitloss.evaluate.merge import merge_files
from logitloss.evaluate.progress import progress_bar
from logitloss.evaluate.provenance import provenance
from logitloss.evaluate.report import Report
from logitloss.evaluate.report.compare import compare
from logitloss.evaluate.report.page import comparison_page, report_page, write_page
from logitloss.evaluate.shard import FLOAT_DTYPES
from logitloss.evaluate.state import Group
from logitloss.evaluate.stream import SAVE_EVERY


class OneLineErrors(click.Group):
    """Commands whose expected failures are a line on stderr, never a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the chosen command."""
        if isinstance(sys.stdout, io.TextIOWrapper):  # names of files may hold bytes that are no text
            sys.stdout.reconfigure(errors="backslashreplace")
        try:
            with warnings.catch_warnings():
                warnings.showwarning = _tell  # type: ignore[assignment]
                return super().invoke(ctx)
        except BrokenPipeError:
            # click's own: whoever read the output has heard enough
            raise
        except (EvaluationError, ImportError, OSError) as error:
            click.echo(f"logitloss: {error}", err=True)
            ctx.exit(1)
        except MemoryError:
            click.echo("logitloss: out of memory; fewer --chunk-rows take less", err=True)
            ctx.exit(1)
        except Interrupted as interrupt:
            again = shlex.join(["logitloss", *sys.argv[1:]])
            click.echo(f"logitloss: {interrupt}; this goes on from there:\n{again}", err=True)
            ctx.exit(130)
        except KeyboardInterrupt:
            click.echo("logitloss: interrupted", err=True)
            ctx.exit(130)


def _is_page(context: click.Context, option: click.Parameter, path: str | None) -> str | None:
    """Refuse a page that could not be written when all is done, or would take the place of something else."""
    if path is None:
        return None
    if not path.lower().endswith((".html", ".htm")):
        raise click.BadParameter(f"{path} does not end in .html")
    if not os.path.isdir(os.path.dirname(path) or "."):
        raise click.BadParameter(f"there is no directory for {path}")
    if os.path.isdir(path):
        raise click.BadParameter(f"{path} is a directory")
    check_writable(path)
    return path


def _tell(what: object, *where_warned: object) -> None:
    """Print a line, or a warning in a line, on stderr; click would write past the progress bar, into it."""
    if sys.stderr is not None:  # closed, print would take stdout for it
        print(f"logitloss: {what}", file=sys.stderr)


backend_option = click.option(
    "--backend", type=click.Choice(NAMES), help="Which kernels; by default the best that this processor has."
)

report_option = click.option(
    "--report",
    "report_file",
    metavar="FILE.html",
    callback=_is_page,
    help="Write a page with pictures of it all to this file; it needs nothing else, and no network.",
)


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout, not a table.")
bytes_option = click.option(
    "--bytes", "n_bytes", type=click.IntRange(1, 2**63 - 1), help="Of the text: for bits per byte."
)
words_option = click.option(
    "--words", "n_words", type=click.IntRange(1, 2**63 - 1), help="Of the text: for perplexity per word."
)
top_k_option = click.option(
    "--top-k",
    type=click.IntRange(1, N_RANKS),
    multiple=True,
    default=TOP_K,
    show_default=True,
    help="Tell the share of labels among the K largest logits; may be given several times.",
)


@click.group(cls=OneLineErrors, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="logitloss", prog_name="logitloss")
def main() -> None:
    """Losses straight from logits."""


@main.command("eval")
@click.argument("files", nargs=-1, metavar="LOGITS TARGETS")
@click.option(
    "--loss",
    type=click.Choice(["ce", "bce"]),
    default="ce",
    show_default=True,
    help="Softmax cross-entropy against class labels, or binary cross-entropy against labels in [0, 1].",
)
@click.option(
    "--ignore-index",
    type=click.IntRange(-(2**63), 2**63 - 1),
    metavar="INTEGER",
    default=-100,
    show_default=True,
    help="Rows with this label do not count.",
)
@click.option("--mask", metavar="FILE", help="Rows where it is 0 do not count, whatever their label.")
@click.option(
    "--shift",
    is_flag=True,
    help="Logits at a position are those of the next label, along TARGETS' last axis.",
)
@click.option(
    "--axis", type=int, help="Where the classes are: 1 by default, -1 for logits (batch, time, vocabulary)."
)
@click.option(
    "--dtype",
    type=click.Choice(list(FLOAT_DTYPES)),
    help="What the logits are where the file cannot say (two-byte void, uint16); widens other floats.",
)
@click.option(
    "--threads",
    type=click.IntRange(1, MOST),
    help="Threads; by default one for each core, with --hidden and --dask one.",
)
@click.option(
    "--chunk-rows", type=click.IntRange(min=1), help="Rows at a time; by default up to 128 MiB of logits."
)
@click.option("--hidden", metavar="FILE", help="Hidden states in place of LOGITS, with an --unembedding.")
@click.option("--unembedding", metavar="FILE", help="The last layer's weight, (classes, dimensions).")
@click.option("--bias", metavar="FILE", help="The last layer's bias.")
@click.option("--softcap", type=click.FloatRange(min=0, min_open=True), help="The bound of its logits.")
@click.option("--logit-scale", type=float, default=1.0, show_default=True, help="What multiplies them.")
@bytes_option
@words_option
@top_k_option
@click.option("--per-class", is_flag=True, help="Figures of each class, too.")
@click.option("--group-by", metavar="FILE", help="A key for each row: a line of figures for each group, too.")
@click.option(
    "--per-row",
    metavar="FILE",
    help="Write what becomes of each row, a record of loss, rank, entropy and more, to this .npy file; of "
    "shards, a file for each, to this directory.",
)
@click.option(
    "--on-error",
    type=click.Choice(["fail", "skip"]),
    default="fail",
    show_default=True,
    help="Whether a shard that cannot be evaluated ends it all, or is left out whole, and told.",
)
@click.option(
    "--state",
    "state_file",
    type=click.Path(dir_okay=False),
    help="Keep the state in this file meanwhile: if stopped or killed, the same command goes on from there.",
)
@click.option(
    "--save-every",
    type=click.FloatRange(min=0),
    default=SAVE_EVERY,
    show_default=True,
    help="Seconds between two writes of it.",
)
@click.option(
    "--dask",
    metavar="ADDRESS",
    help="A Dask scheduler whose workers share the files' file system; or local, or local:N: processes here.",
)
@backend_option
@report_option
@json_option
def eval_command(
    files: tuple[str, ...],
    hidden: str | None,
    unembedding: str | None,
    bias: str | None,
    group_by: str | None,
    mask: str | None,
    per_row: str | None,
    n_bytes: int | None,
    n_words: int | None,
    top_k: tuple[int, ...],
    threads: int | None,
    backend: str | None,
    as_json: bool,
    report_file: str | None,
    on_error: Literal["fail", "skip"],
    **options: Any,
) -> None:
    """Evaluate LOGITS against TARGETS: NLL, perplexity, accuracy, calibration and more.

    Both are files of arrays (.npy, .npz, .safetensors, HDF5, Zarr) or of tables (.arrow, .feather, .ipc,
    .parquet); PATH::NAME picks one array or column of several. LOGITS has the classes on --axis, and TARGETS
    the class of each row (an integer).

    Either may be shards: a directory, or a quoted pattern. They are taken in natural order (2 before 10), and
    those of LOGITS, TARGETS, --group-by and --mask go together by that order.

    Nothing is read whole: memory stays under 400 MiB (and 4 MB a thread) whatever the files' size.

    With --dask the pieces of the files are evaluated by a cluster's workers, a thread each.

    With --hidden and --unembedding only TARGETS is given, and the logits are made a few rows at a time.
    """
    if (hidden is None) != (unembedding is None):
        raise click.UsageError("--hidden and --unembedding go together")
    if hidden is not None:
        files = (hidden, *files)
    elif bias is not None or options["softcap"] is not None or options["logit_scale"] != 1:
        raise click.UsageError("--bias, --softcap and --logit-scale are for --hidden")
    if len(files) != 2:
        wanted = "LOGITS and TARGETS" if hidden is None else "TARGETS alone, beside --hidden"
        raise click.UsageError(f"expected {wanted}; {len(files)} files are given")
    _check_top_k(options["loss"])
    if options["state_file"] is None and _is_given("save_every"):
        raise click.UsageError("--save-every is for --state")
    if report_file is not None:
        read = files_of(*files, unembedding, bias, group_by, mask)
        refuse_to_overwrite([report_file], [*read, *filter(None, (per_row, options["state_file"]))])
    with progress_bar() as progress:
        started, start = datetime.now(UTC), time.perf_counter()
        evaluation = evaluate_files(
            *files,
            unembedding_path=unembedding,
            bias_path=bias,
            groups_path=group_by,
            mask_path=mask,
            per_row_path=per_row,
            on_error=on_error,
            on_skip=_tell_skipped,
            describe=as_json or report_file is not None,
            progress=progress,
            num_threads=threads,
            backend=backend,
            **options,
        )
        seconds = time.perf_counter() - start
    metrics, groups = _computed(evaluation.state, n_bytes, n_words, top_k)
    asked = options | {"on_error": on_error}
    is_alone = threads is None and bool(options["dask"] or unembedding)  # in a task, beside BLAS
    report = Report(
        *files,
        metrics,
        groups,
        seconds,
        evaluation.n_rows,
        evaluation.n_bytes,
        provenance(
            started, evaluation.inputs, asked, num_threads=1 if is_alone else threads, backend=backend
        ),
        per_row,
        evaluation.skipped if on_error == "skip" else None,
    )
    _print(report, as_json)
    if report_file is not None:
        write_page(report_file, report_page(report.document()))


@main.command("merge")
@click.argument("files", nargs=-1, required=True, metavar="STATES...")
@click.option("--output", metavar="FILE", help="Write the sum's state to this file, to be merged again.")
@bytes_option
@words_option
@top_k_option
@json_option
def merge_command(
    files: tuple[str, ...],
    output: str | None,
    n_bytes: int | None,
    n_words: int | None,
    top_k: tuple[int, ...],
    as_json: bool,
) -> None:
    """Add up STATES of evaluations of different rows, and report on all of them.

    Each is a file of JSON: what EvaluationState.to_dict returns, lines of that, or what eval --state has
    written by its end. Whether two of them have seen the same rows cannot be told from states: rows that are
    in both count twice.
    """
    state, skipped = merge_files(files, output)
    _check_top_k(state.loss)
    metrics, groups = _computed(state, n_bytes, n_words, top_k)
    _print(Report(None, None, metrics, groups, skipped=skipped or None, states=list(files)), as_json)


def _check_top_k(loss: str) -> None:
    if loss != "ce" and _is_given("top_k"):
        raise click.UsageError("--top-k is for labels of classes")


def _is_given(option: str) -> bool:
    """Whether an option that has a default was given."""
    return click.get_current_context().get_parameter_source(option) is ParameterSource.COMMANDLINE


def _computed(
    state: EvaluationState, n_bytes: int | None, n_words: int | None, top_k: tuple[int, ...]
) -> tuple[Metrics, dict[Group, Metrics]]:
    """Return the figures of the whole and of its groups; what makes them doubtful is told on stderr."""
    top_k = tuple(dict.fromkeys(top_k))
    groups = {key: group.compute(top_k=top_k) for key, group in sorted(state.groups.items())}
    metrics = state.compute(n_bytes=n_bytes, n_words=n_words, top_k=top_k)
    for line in metrics.warnings:
        _tell(f"warning: {line}")
    return metrics, groups


def _print(report: Report, as_json: bool) -> None:
    if as_json:
        click.echo(report.to_json())
    else:
        report.print_table()


def _tell_skipped(one: Skipped) -> None:
    _tell(f"skipped {one.file}: {one.reason}")


@main.command("compare")
@click.argument("a", metavar="A.json")
@click.argument("b", metavar="B.json")
@click.option(
    "--rows",
    nargs=2,
    metavar="A B",
    help="What --per-row wrote of both; by default what the JSON of both names.",
)
@click.option("--unpaired", is_flag=True, help="Do without rows: take the runs as independent samples.")
@report_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout, not a table.")
def compare_command(
    a: str, b: str, rows: tuple[str, str] | None, unpaired: bool, report_file: str | None, as_json: bool
) -> None:
    """Compare two runs by their JSON, as `logitloss eval --json` printed it: differences B - A.

    Each has a 95 % confidence interval by the normal approximation. If both were run with --per-row, it is
    that of row-wise differences, which is the narrower; else the runs are taken as independent samples.
    """
    if rows is not None and unpaired:
        raise click.UsageError("--rows and --unpaired exclude each other")
    if report_file is not None:
        refuse_to_overwrite([report_file], [a, b])
    comparison = compare(a, b, rows=rows, is_paired=not unpaired)
    page = None
    if report_file is not None:
        refuse_to_overwrite([report_file], files_of(*comparison.rows or ()))
        page = comparison_page(comparison)
    if as_json:
        click.echo(comparison.to_json())
    else:
        comparison.print_table()
    if report_file is not None and page is not None:
        write_page(report_file, page)


@main.command()
@click.option(
    "--output-dir", type=click.Path(path_type=Path), help="Where the files go; by default a new folder."
)
@backend_option
@click.pass_context
def demo(ctx: click.Context, output_dir: Path | None, backend: str | None) -> None:
    """Train a classifier of handwritten digits, write its logits, and evaluate them."""
    folder = output_dir or Path(tempfile.mkdtemp(prefix="logitloss-demo-"))
    logits, labels = map(str, digits.run(folder, backend=backend, say=click.echo))
    click.echo(f"\nheld-out logits: {logits}\nheld-out labels: {labels}\n")
    ctx.invoke(eval_command, files=(logits, labels), backend=backend)
    click.echo(f"\nnext: {shlex.join(['logitloss', 'eval', logits, labels])} --json")


@main.command()
def versions() -> None:
    """Print what this installation is made of: instruction set, OpenMP, libraries, backends."""
    logitloss.show_versions()
