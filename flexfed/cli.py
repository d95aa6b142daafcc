"""The `flexfed` command: run an experiment, compare several, list what was run."""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from flexfed.overrides import Scalar, defaults, head_supernodes, parse_overrides, resumed_supernodes, with_resumed

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__, pretty_exceptions_show_locals=False)

APP_DIR = Path(__file__).resolve().parent.parent
RUNS_DIR = "~/.flexfed/runs"
SUPERNODES = 20

Config = Annotated[
    list[str] | None,
    typer.Option(
        "--config", "-c", help="Overrides, as after `flwr run -c`: \"strategy='flexfl' seed=2\" or FILE.toml."
    ),
]
Supernodes = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Simulated devices; default: what a line `# supernodes = 100` in the comment at the head of a "
        "-c FILE.toml says, else 20.",
    ),
]
Cpus = Annotated[
    int | None,
    typer.Option(min=1, help="Clients that work at the same time, one CPU each; default: all CPUs."),
]
GpusPerClient = Annotated[
    float,
    typer.Option(min=0, help="Share of a GPU for each client that works: with 0.25 four at a time train on each."),
]
InputSize = Annotated[
    str | None, typer.Option("--input", help="One sample, such as 3x32x32; default: what suits the network.")
]
InProcess = Annotated[
    bool,
    typer.Option("--in-process", help="Without Flower's runtime and Ray: the same numbers, much sooner."),
]


@app.command()
def run(
    config: Config = None,
    supernodes: Supernodes = None,
    cpus: Cpus = None,
    gpus_per_client: GpusPerClient = 0.0,
    in_process: InProcess = False,
) -> None:
    """Run one experiment; exits with 1 when it failed."""
    with _errors():
        app_dir, texts = require_app(APP_DIR), config or []
        if in_process and cpus is not None:
            raise ValueError("--cpus has no effect with --in-process, which trains one client after the other")
        if in_process and gpus_per_client:
            raise ValueError("--gpus-per-client has no effect with --in-process; say where with torch-device")
        known = defaults(app_dir)
        values = with_resumed(parse_overrides(texts, known))
        devices = supernodes or head_supernodes(texts) or resumed_supernodes(values) or SUPERNODES
        # Before torch is imported: another number of threads changes the bits.
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        whole = {**known, **values}
        check_configuration(whole)
        _check_spreading(str(whole.get("torch-device", "cpu")), gpus_per_client)
        if in_process or _is_finished(whole):  # for a table alone no Flower need start
            raise typer.Exit(_run_in_process(app_dir, values, devices))
        from flexfed.launch import run_simulation

        raise typer.Exit(run_simulation(app_dir, texts, devices, cpus, gpus_per_client))


def _check_spreading(torch_device: str, gpus_per_client: float) -> None:
    """Refuse to spread clients over GPUs that they are told not to use, or that they are told to choose themselves.

    Raises:
        ValueError: says what to do instead.
    """
    if gpus_per_client and torch_device not in ("auto", "cuda"):
        raise ValueError(
            f"--gpus-per-client {gpus_per_client:g} gives each client a GPU of its own choice, torch-device is "
            f"{torch_device!r}; set torch-device='cuda' or 'auto'"
        )


def _is_finished(values: Mapping[str, Scalar]) -> bool:
    """Whether the run that is resumed has nothing left to do; refuses one that cannot go on so."""
    from flexfed.config import Experiment
    from flexfed.resume import open_run

    settings = Experiment.read(values).settings
    return bool(settings.resume) and open_run(settings.resume, values).is_finished


def check_configuration(values: Mapping[str, Scalar]) -> None:
    """Refuse an impossible configuration here, so that no Flower starts for it.

    Raises:
        ValueError: an unknown name or an impossible value; says which.
    """
    from flexfed.config import Experiment
    from flexfed.devices import load_fleet

    load_fleet(Experiment.read(values).settings.fleet)


def _run_in_process(app_dir: Path, overrides: Mapping[str, Scalar], supernodes: int) -> int:
    folder = load_runner(app_dir)(overrides, supernodes)
    if (folder / "summary.json").is_file():
        return 0
    typer.echo(f"the run ended without a summary.json in {folder}", err=True)
    return 1


def require_app(app_dir: Path) -> Path:
    """The app's folder, if it is one.

    Raises:
        ValueError: it holds no app; says how to get one.
    """
    missing = [name for name in ("pyproject.toml", "server_app.py") if not (app_dir / name).is_file()]
    if missing:
        raise ValueError(
            f"no app in {app_dir} ({', '.join(missing)} missing): `flexfed run` and `flexfed compare` need "
            "the source tree, of which an installed package is only a part; clone the repository and install "
            "it in place with `pip install -e .`"
        )
    return app_dir


def load_runner(app_dir: Path) -> Callable[[Mapping[str, Scalar], int], Path]:
    """`run_in_process` of the app's server_app.py."""
    sys.path.insert(0, str(app_dir))
    module = importlib.import_module("server_app")
    found = Path(str(module.__file__)).resolve().parent
    if found != app_dir.resolve():
        raise ValueError(f"expected server_app from {app_dir}, got the one in {found}; start Python without it")
    runner: Callable[[Mapping[str, Scalar], int], Path] = module.run_in_process
    return runner


@app.command()
def compare(
    targets: Annotated[list[str], typer.Argument(metavar="SUITE.toml... | RUN...", help="Suites, or run folders.")],
    workers: Annotated[
        int | None, typer.Option(min=1, help="Runs of a suite at the same time; default: all CPUs.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="FILE.md for tables, FILE.png and FILE.html beside it; of several suites a folder for them."),
    ] = None,
    baseline: Annotated[str | None, typer.Option(help="Row to measure the others against.")] = None,
) -> None:
    """Compare runs: of suites, running what is missing, or of the given folders; a killed comparison goes on."""
    from flexfed import comparing

    with _errors():
        if len({target.endswith(".toml") for target in targets}) > 1:
            raise ValueError("give suites or run folders, not both")
        is_folder = len(targets) > 1 and targets[0].endswith(".toml")
        if out is not None:  # fails now, not after hours of runs
            (out if is_folder else out.parent).mkdir(parents=True, exist_ok=True)
        if not targets[0].endswith(".toml"):
            comparing.tell(comparing.compare_folders(targets, baseline), APP_DIR, targets, baseline, out)
            return
        app_dir, failed = require_app(APP_DIR), 0
        for target, suite in [(target, comparing.read_suite(target, baseline, app_dir)) for target in targets]:
            comparison, lost = comparing.compare_suite(suite, workers or _num_cpus(), app_dir)
            place = out / f"{Path(target).stem}.md" if out and is_folder else out
            comparing.tell(comparison, app_dir, [target], baseline, place or suite.folder / "comparison.md")
            failed += lost
        raise typer.Exit(1 if failed else 0)


def _num_cpus() -> int:
    from flexfed.measure import num_cpus

    return num_cpus()


@app.command()
def runs(
    runs_dir: Annotated[str | None, typer.Option(help=f"Where to look; default: runs-dir, else {RUNS_DIR}.")] = None,
) -> None:
    """List run folders, those of suites included: time, strategy, data set, seed, final accuracy, path."""
    from flexfed.report import aligned
    from flexfed.runs import find_runs

    with _errors():
        root = Path(runs_dir or _default_runs_dir()).expanduser()
        folders = sorted(find_runs(root) + [path for suite in root.glob("*/*/") for path in find_runs(suite)])
        if not folders:
            raise ValueError(f"no runs in {root}")
        lines = [("time", "strategy", "data set", "seed", "accuracy", "path"), *map(_describe, folders)]
        typer.echo("\n".join(aligned(lines)))


def _default_runs_dir() -> str:
    if not (APP_DIR / "pyproject.toml").is_file():
        return RUNS_DIR
    return str(defaults(APP_DIR).get("runs-dir", RUNS_DIR))


def _describe(folder: Path) -> tuple[str, ...]:
    """One line of the list; a damaged run is named, not hidden."""
    from flexfed.report import percent
    from flexfed.runs import load_run

    day, _, clock = folder.name[:15].partition("-")
    when = f"{day[:4]}-{day[4:6]}-{day[6:]} {clock[:2]}:{clock[2:4]}"
    try:
        found = load_run(folder)
    except ValueError as error:
        return (when, "?", "?", "?", "damaged", str(error))
    words = tuple(str(found.config.get(key, "?")) for key in ("strategy", "dataset", "seed"))
    reached = f"unfinished, {len(found.rounds)} rounds"
    return (
        when,
        *words,
        percent(found.summary["final"].get("accuracy")) if found.summary else reached,
        str(folder),
    )


@app.command()
def profile(
    partition_id: Annotated[int, typer.Option(min=0, help="This device's share of the data.")] = 0,
    num_partitions: Annotated[int, typer.Option(min=1, help="Number of devices.")] = 1,
    kind: Annotated[str | None, typer.Option(help="Name of its class; default: the board's or the CPU's.")] = None,
    link_bytes_s: Annotated[float | None, typer.Option(help="Bytes a second to and from the server.")] = None,
    threads: Annotated[int, typer.Option(min=1, help="Of torch: the run's torch-threads.")] = 1,
    model: Annotated[str | None, typer.Option("--model", "-m", help="See which widths of this network fit.")] = None,
    classes: Annotated[int, typer.Option(min=1, help="Of that network.")] = 10,
    input_size: InputSize = None,
    batch_size: Annotated[int, typer.Option(min=2, help="Of its training.")] = 16,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure this device: memory free for training, speed; prints the node-config of its SuperNode."""
    with _errors():
        from flexfed.levels import natural_input
        from flexfed.measure import check_declared, measure_device
        from flexfed.models import check_model
        from flexfed.profile import fitting_widths, parse_shape, to_json, to_text

        shape = parse_shape(input_size) if input_size else natural_input(model or "cnn")[0]
        check_declared(partition_id, num_partitions, kind, link_bytes_s)
        if model:
            check_model(model, classes, shape)
        measured = measure_device(threads=threads)
        fitting = fitting_widths(model, classes, shape, batch_size, measured.memory_bytes) if model else None
        node_config = measured.node_config(partition_id, num_partitions, kind, link_bytes_s)
        if as_json:
            typer.echo(json.dumps(to_json(measured, node_config, fitting), indent=2))
        else:
            typer.echo(to_text(measured, node_config, link_bytes_s is not None, fitting))


@app.command()
def levels(
    model: Annotated[str, typer.Argument(metavar="MODEL | RUN", help="A network's name, or a run folder.")],
    classes: Annotated[int | None, typer.Option(min=1, help="Of the network; default: 10.")] = None,
    input_size: InputSize = None,
    batch_size: Annotated[int | None, typer.Option(min=2, help="Of training; default: batch-size.")] = None,
    ratios: Annotated[
        str | None, typer.Option(help='Kept fractions, "1, 0.5", largest first; default: heterofl.ratios.')
    ] = None,
    config: Config = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show which units of a network are tied, and what each level of it costs; of a run: its own levels."""
    with _errors():
        from flexfed.levels import overview_of_model, overview_of_run
        from flexfed.profile import parse_shape

        if "/" in model or (Path(model) / "config.toml").is_file():
            told = {"--classes": classes, "--input": input_size, "--batch-size": batch_size, "--ratios": ratios}
            if given := [name for name, value in {**told, "-c": config}.items() if value]:
                raise ValueError(f"{', '.join(given)}: a run has its own; give the name of a network to choose")
            found = overview_of_run(model)
        else:
            values = {"batch-size": batch_size, "heterofl.ratios": ratios}
            settings = {**_settings(config), **{key: value for key, value in values.items() if value is not None}}
            shape = parse_shape(input_size) if input_size else None
            found = overview_of_model(model, classes or 10, shape, settings)
        typer.echo(json.dumps(found.to_json(), indent=2) if as_json else found.to_text())


def _settings(config: Sequence[str] | None) -> dict[str, Scalar]:
    """The app's defaults under the overrides; without an app and without overrides, the package's own."""
    if not config and not (APP_DIR / "pyproject.toml").is_file():
        return {}
    known = defaults(require_app(APP_DIR))
    return {**known, **parse_overrides(config or [], known)}


@app.command()
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder; the run may be unfinished.")],
    level: Annotated[str | None, typer.Option(help="Which one; default: the one that the run reports.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the files; default: RUN/export.")] = None,
    no_onnx: Annotated[bool, typer.Option("--no-onnx", help="Only the .safetensors file.")] = False,
) -> None:
    """Write one level of a run as a plain narrow network: .safetensors with its metadata, and .onnx."""
    from flexfed.export import export_level

    with _errors():
        written = export_level(run, level, out, with_onnx=not no_onnx)
        typer.echo(written.to_text())
        for note in written.notes:
            typer.secho(f"note: {note}", fg=typer.colors.YELLOW, err=True)


@contextmanager
def _errors() -> Iterator[None]:
    """Say what is wrong in one line and exit with 1; bugs keep their traceback."""
    from flexfed.launch import LaunchError

    try:
        yield
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    except typer.Exit:  # a RuntimeError, too
        raise
    except (ValueError, RuntimeError, OSError) as error:
        if not isinstance(error, LaunchError | OSError) and not _is_ours(error):
            raise
        typer.secho(f"error: {error}", fg=typer.colors.RED, err=True)
        raise typer.Exit(1) from None


def _is_ours(error: BaseException) -> bool:
    """Whether a `raise` of ours made it, so that its text is for people; else it is a bug: keep the traceback."""
    last: Any = traceback.extract_tb(error.__traceback__)[-1]
    path = Path(last.filename).resolve()
    rooms = (Path(__file__).resolve().parent, APP_DIR / "strategies")
    ours = path.parent == APP_DIR or any(path.is_relative_to(room) for room in rooms)
    return ours and str(last.line).startswith("raise ")


def main() -> None:
    """Entry point of the `flexfed` command."""
    app()


if __name__ == "__main__":
    main()
