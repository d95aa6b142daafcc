"""What FedStitch's claims ask of a suite's finished runs: `python -m benchmarks.stitching SUITE.toml...`.

Nothing is run. All rows are compared to the suite's baseline, which stitches; a row trains where its strategy is
another. Writes results/<suite>-costs.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

from benchmarks.stitching_runs import (
    ROOT,
    WITH_BLOCKS,
    Study,
    as_good,
    at_equal,
    dashed,
    differences,
    episode_ends,
    facts,
    finals,
    load_study,
    measured_pairs,
    missed,
    path_of,
    ratios,
    total,
    weights,
)
from flexfed.compare import Row, mean_and_deviation
from flexfed.report import scaled
from flexfed.runs import Run
from flexfed.tables import TextTable

RESULTS = ROOT / "benchmarks" / "results"
CLAIMED_POINTS, CLAIMED_SPEED, CLAIMED_SAVING = 20.93, 8.12, 0.8941  # the paper's, each "up to"
COSTS = {
    "client-seconds": "client time, measured",
    "modelled-seconds": "time, modelled",
    "modelled-seconds-training": "of it without tests, modelled",
    "joules": "energy, modelled",
    f"modelled-seconds{WITH_BLOCKS}": "time with blocks sent, modelled",
    f"joules{WITH_BLOCKS}": "energy with blocks sent, modelled",
    "macs": "multiply-adds, modelled",
    "bytes-down": "sent to clients, measured",
    "bytes-up": "sent back, measured",
    "bytes-evaluation": "for tests, both ways, measured",
}
SPENT = ("client-seconds", "modelled-seconds", "joules", f"modelled-seconds{WITH_BLOCKS}", f"joules{WITH_BLOCKS}")

# --- cells --------------------------------------------------------------------------------------------------


def spread(values: Iterable[float], show: Callable[[float], str]) -> str:
    """Mean and deviation."""
    mean, deviation = mean_and_deviation(values)
    if mean is None:
        return "-"
    return show(mean) if deviation is None else f"{show(mean)} ± {show(deviation)}"


def points(values: Sequence[float]) -> str:
    """Differences of accuracies, with the sign of each seed's."""
    plus = "+" if sum(values) > 0 else ""
    signs = "".join("+" if value > 0 else "-" if value < 0 else "0" for value in values)
    return f"{plus}{spread(values, percent)} ({signs})" if values else "-"


def percent(fraction: float) -> str:
    """Without its unit, which the heading has."""
    return f"{100 * fraction:.1f}"


def number(value: float) -> str:
    """Three digits, or all of a large number."""
    return f"{value:.3g}" if abs(value) < 999.5 else f"{value:.0f}"


def unit(key: str, value: float) -> str:
    """One of a run's totals with its unit."""
    if "seconds" in key:
        return f"{number(value)} s"
    return scaled(value, "B" if "bytes" in key else "J" if "joules" in key else "")


def total_cell(key: str, row: Row) -> str:
    """The same over the seeds."""
    known = [value for run in row.runs.values() if (value := total(run, key)) is not None]
    return spread(known, partial(unit, key))


def each(row: Row, show: Callable[[Run], object]) -> str:
    """One word for each seed."""
    return ", ".join(str(show(run)) for _, run in sorted(row.runs.items())) or "-"


def fact(key: str, run: Run) -> object:
    """What the summary says."""
    return facts(run)[key]


def equal_cell(row: Row, baseline: Row, measure: str) -> str:
    """Accuracies at equal costs, and the rounds they are of."""
    found = [at_equal(pair, measure) for pair in measured_pairs(row, baseline, measure)]
    text = spread([point.accuracy for point in found if point], percent)
    return text if text == "-" else f"{text} (round {', '.join(str(p.round) if p else '-' for p in found)})"


def lead_cell(row: Row, baseline: Row, measure: str) -> str:
    """How much better the stitched network is at equal costs."""
    found = [(pair.base, at_equal(pair, measure)) for pair in measured_pairs(row, baseline, measure)]
    return points([facts(base)["final"]["accuracy"] - point.accuracy for base, point in found if point])


def need_cell(row: Row, baseline: Row, measure: str) -> str:
    """What it takes to be as good, and the rounds."""
    found = [(pair.run, as_good(pair, measure)) for pair in measured_pairs(row, baseline, measure)]
    rounds = [str(point.round) if point else f"never in {len(run.rounds)}" for run, point in found]
    text = spread([point.spent for _, point in found if point], number)
    if text == "-":
        return f"{', '.join(sorted(set(rounds)))} rounds" if rounds else "-"
    return f"{text} (round {', '.join(rounds)})"


def weight_cell(values: Sequence[float]) -> str:
    """The first and the last."""
    return f"{values[0]:.4f}, {values[-1]:.4f}" if values else "-"


def episode_cells(run: Run) -> list[str]:
    """What each episode ended with."""
    ends = [(line.get("validation-accuracy"), line["stitching"]) for _, line in sorted(episode_ends(run).items())]
    return [f"{percent(a) if a is not None else '-'}; {s['reward']:+.3f}; {dashed(s['path'])}" for a, s in ends]


# --- tables -------------------------------------------------------------------------------------------------


def result_tables(study: Study) -> Iterator[TextTable]:
    """What came out, and of which blocks."""
    base, counts = study.baseline, ("rounds", "refused", "failed")
    body = [
        [
            row.name,
            spread(finals(row), percent),
            "-" if row is base else points(differences(row, base)),
            *(each(row, partial(fact, key)) for key in counts),
        ]
        for row in study.rows
    ]
    caption = "Accuracy of the finished network on the server's test samples; differences in points, paired by seed, "
    caption += "signs in brackets; the rest for each seed. A round of a row that stitches appends a block."
    head = ["row", "accuracy in %, measured", f"less {base.name}'s, measured", "rounds", "refused answers", "failed"]
    yield TextTable(caption, head, body)
    body = [
        [row.name, *(path_of(row.runs[s]) if s in row.runs else "-" for s in study.seeds)] for row in study.stitching
    ]
    caption = "The path of each seed: blocks of each source, from the input on, and their ids in brackets."
    yield TextTable(caption, ["row", *(f"seed {seed}" for seed in study.seeds)], body)


def cost_tables(study: Study) -> Iterator[TextTable]:
    """What a run costs, with its unit and as a multiple."""
    columns = {**COSTS, "pool-bytes": "blocks that a client holds, measured"}
    body = [[row.name, *(total_cell(key, row) for key in columns)] for row in study.rows]
    caption = "Costs of a run. Client time is processor time, summed over clients; modelled time is that of each "
    caption += "phase's slowest device, with links. Time and energy are modelled with the tests on validation samples "
    caption += "that stitching learns from; client time and multiply-adds are without. Blocks that a client holds were "
    caption += "there before; what it would have cost to send them once, to every client, is told beside."
    yield TextTable(caption, ["row", *columns.values()], body)
    body = [[row.name, *(spread(ratios(row, study.baseline, key), number) for key in COSTS)] for row in study.rows]
    yield TextTable(f"The same as multiples of {study.baseline.name}'s, by seed.", ["row", *COSTS.values()], body)


def claim_tables(study: Study) -> Iterator[TextTable]:
    """Stitching against training at equal costs, and the costs of equal accuracy."""
    base, equal = study.baseline, [f"at equal {COSTS[key]}" for key in SPENT]
    body = [
        [row.name, *(equal_cell(row, base, key) for key in SPENT), spread(finals(row), percent)]
        for row in study.training
    ]
    caption = f"Accuracy in %, measured, in the first tested round after which a run has spent what {base.name} of its "
    caption += f"seed spends in all (rounds in brackets; - where it ended before). {base.name}: "
    caption += f"{spread(finals(base), percent)}."
    yield TextTable(caption, ["row", *equal, "at its end"], body)
    body = [
        [row.name, *(lead_cell(row, base, key) for key in SPENT), points([-d for d in differences(row, base)])]
        for row in study.training
    ]
    caption = f"By how many points {base.name} is more accurate then, measured, paired by seed (signs in brackets). "
    caption += f"Claimed: up to {CLAIMED_POINTS:+}."
    yield TextTable(caption, ["row", *equal, "at its end"], body)
    body = [[row.name, *(need_cell(row, base, key) for key in SPENT)] for row in study.training]
    caption = f"What a run spends until a test first finds it as accurate as {base.name} of its seed, as a multiple of "
    caption += f"what {base.name} spends in all (rounds in brackets; means over seeds that got so far). Claimed: up to "
    caption += f"{CLAIMED_SPEED} of time; {100 * CLAIMED_SAVING:.2f} % less energy, which is "
    caption += f"{number(1 / (1 - CLAIMED_SAVING))}."
    yield TextTable(caption, ["row", *(COSTS[key] for key in SPENT)], body)


def energy_tables(study: Study) -> Iterator[TextTable]:
    """The energy optimiser, where a row differs from the baseline in nothing else."""
    base, own = study.baseline, study.configs[study.baseline.name]
    keys = ("joules", "modelled-seconds", "modelled-seconds-training")

    def line(row: Row) -> list[str]:
        saved = [] if row is base else [1 - 1 / ratio for ratio in ratios(row, base, "joules")]
        cells = [total_cell(key, row) for key in keys] + [spread(saved, percent), each(row, missed)]
        return [row.name, str(study.configs[row.name]["fedstitch.energy"]), *cells, each(row, path_of)]

    caption = "A phase's deadline is the time in which a share of its clients can be done at their fastest, here "
    caption += f"{own['fedstitch.deadline-share']:g}, plus a share of that, here {own['fedstitch.deadline-slack']:g}: "
    caption += "the same for these rows as long as their paths are. Tests have none. Links are in time and energy."
    head = ["row", "fedstitch.energy", *(COSTS[key] for key in keys), f"energy that {base.name} saves in %, modelled"]
    head += ["deadlines missed, modelled", "paths"]
    if study.other_energy:
        yield TextTable(caption, head, [line(row) for row in (base, *study.other_energy)])


def weight_tables(study: Study) -> Iterator[TextTable]:
    """What was learned of the clients, where there was more than one episode to learn in."""
    rows = [row for row in study.stitching if int(study.configs[row.name]["fedstitch.episodes"]) > 1 and row.runs]
    for row in rows:
        found = {seed: weights(run) for seed, run in sorted(row.runs.items())}
        clients = sorted({client for of_run in found.values() for client in of_run}, key=int)
        body = [[client, *(weight_cell(of_run.get(client, [])) for of_run in found.values())] for client in clients]
        caption = f"{row.name}: each client's first and last weight, as recorded: a share of its round's cohort, and "
        caption += "cohorts differ."
        yield TextTable(caption, ["client", *(f"seed {seed}" for seed in found)], body)
    body = [[f"{row.name}, seed {seed}", *episode_cells(run)] for row in rows for seed, run in sorted(row.runs.items())]
    longest = max(map(len, body), default=1)
    caption = "The last round of each episode: accuracy in % on its cohort's validation samples, measured; the last "
    caption += "block's reward; the path. The last episode takes the best blocks, those before it explore."
    head = ["row", *(f"episode {episode}" for episode in range(1, longest))]
    if body:
        yield TextTable(caption, head, [cells + ["-"] * (longest - len(cells)) for cells in body])


# --- the page -----------------------------------------------------------------------------------------------


def markdown(table: TextTable) -> str:
    """A table under its caption."""
    rule = ["---", *("---:" for _ in table.head[1:])]
    lines = [" | ".join(cell.replace("|", "\\|") for cell in cells) for cells in (table.head, rule, *table.body)]
    return "\n".join([table.caption, "", *(f"| {line} |" for line in lines)])


def report(study: Study, command: str) -> str:
    """The page of results."""
    sections = {
        "Accuracy and paths": result_tables(study),
        "Costs": cost_tables(study),
        "Against training": claim_tables(study) if study.training else (),
        "Energy optimiser": energy_tables(study),
        "Weights": weight_tables(study),
    }
    parts = [f"# {study.name}: what the claims ask", f"```\n{command}\n```", *study.notes]
    parts += ["Means over seeds ± standard deviation (n - 1)."]
    for heading, tables in sections.items():
        shown = [markdown(table) for table in tables]
        parts += [f"## {heading}", *shown] if shown else []
    return "\n\n".join(parts) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Read, write, say where."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.stitching", description=__doc__)
    parser.add_argument("suites", nargs="+", type=Path, metavar="SUITE.toml")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the pages; default: benchmarks/results")
    given = parser.parse_args(arguments)
    for path in given.suites:
        study = load_study(path)
        page = given.out / f"{study.name}-costs.md"
        page.parent.mkdir(parents=True, exist_ok=True)
        command = f"python -m benchmarks.stitching benchmarks/suites/{path.name}"
        page.write_text(report(study, command), encoding="utf-8")
        print(page)


if __name__ == "__main__":
    main()
