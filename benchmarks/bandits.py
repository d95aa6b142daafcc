"""P-UCBV and its rivals on bandits whose best ratio is known: `python -m benchmarks.bandits`.

A reward is a bump over the ratios, exp(-((s - peak) / 0.15)^2), and Gaussian noise of 0.1; the peaks are 0.55, 0.65,
..., 0.95 in turn. The regret of a pull is what the bump is lower there than at its peak, as a share of the peak.
Then the time of a choice, and what a client's bandit weighs. Prints the tables and writes results/bandits.md.
"""

from __future__ import annotations

import argparse
import os
import time
import tracemalloc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np

from benchmarks.measuring import Row, in_child
from benchmarks.speed import ONE_THREAD, machine
from benchmarks.speed import table as row_table
from flexfed.bandits import Bandit, BanditConfig
from flexfed.ratios import pack_bandits, unpack_bandits
from flexfed.rivals import BANDITS

PEAKS = (0.55, 0.65, 0.75, 0.85, 0.95)
PULLS = (10, 20, 100, 200)
RUNS = 200
LAST, NEAR = 50, 0.06
DEFAULTS = BanditConfig()
RESULTS = Path(__file__).resolve().parent / "results" / "bandits.md"


@dataclass(frozen=True)
class Policy:
    """A row of the tables."""

    label: str
    name: str
    config: BanditConfig = DEFAULTS

    def bandit(self, horizon: float) -> Bandit:
        """A new one."""
        return BANDITS[self.name](self.config, horizon)


POLICIES = (
    Policy("p-ucbv, sweep", "p-ucbv"),
    Policy("p-ucbv, aligned", "p-ucbv", BanditConfig(profile="aligned")),
    *(Policy(name, name) for name in ("ucb1", "ucb-v", "epsilon-greedy", "thompson", "uniform")),
    Policy("fixed at 0.5", "fixed", BanditConfig(ratio=0.5)),
    Policy("fixed at 0.75", "fixed", BanditConfig(ratio=0.75)),
)


@dataclass(frozen=True)
class Landscape:
    """How large rewards and noise are at pull t = 0, 1, ...; indices are made for rewards of about 1."""

    title: str
    scale: Callable[[int], float]


LANDSCAPES = (
    Landscape("Rewards of about 1", lambda t: 1.0),
    Landscape(
        "Rewards and noise 30 times smaller: FedLPS's reward for five points of accuracy is about 0.03",
        lambda t: 1 / 30,
    ),
    Landscape("Rewards and noise that fade as gains do in training, as 10 / (10 + t)", lambda t: 10 / (10 + t)),
)


def ratios_of(policy: Policy, scale: Callable[[int], float], pulls: int, seed: int) -> np.ndarray:
    """What it chooses, (pulls,); everything random follows from the seed, the same for every policy."""
    rng = np.random.default_rng([seed, pulls])
    draws, noise = rng.random((pulls, 3)).tolist(), 0.1 * rng.standard_normal(pulls)
    bandit, peak, chosen = policy.bandit(pulls), PEAKS[seed % len(PEAKS)], np.empty(pulls)
    for t in range(pulls):
        pull = bandit.choose(1.0, draws[t])
        chosen[t] = pull.ratio
        bandit.observe(pull, scale(t) * float(1 - regret_of(pull.ratio, peak) + noise[t]), 0.5)
    return chosen


def regret_of(ratios: np.ndarray | float, peak: np.ndarray | float) -> np.ndarray:
    """What the bump is lower than at its peak."""
    return np.asarray(1 - np.exp(-(((ratios - peak) / 0.15) ** 2)))


@dataclass(frozen=True)
class Learned:
    """One policy's runs: pulls -> mean regret a pull of each; the share of the last pulls near the peak, of each."""

    regret: Mapping[int, np.ndarray]
    near: np.ndarray


def learn(policy: Policy, landscape: Landscape) -> Learned:
    """All runs; the horizon is the number of pulls."""
    peaks = np.resize(PEAKS, RUNS)[:, None]
    chosen = {n: np.array([ratios_of(policy, landscape.scale, n, seed) for seed in range(RUNS)]) for n in PULLS}
    regret = {n: regret_of(ratios, peaks).mean(axis=1) for n, ratios in chosen.items()}
    return Learned(regret, (np.abs(chosen[PULLS[-1]][:, -LAST:] - peaks) < NEAR).mean(axis=1))


def table(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table, columns aligned."""
    widths = [max(map(len, column)) for column in zip(head, *body, strict=True)]
    lines = [
        "| " + " | ".join(c.ljust(w) for c, w in zip(cells, widths, strict=True)) + " |" for cells in (head, *body)
    ]
    return [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]


def landscape_lines(landscape: Landscape) -> list[str]:
    """One section: the table, and who has the least regret."""
    found = {policy.label: learn(policy, landscape) for policy in POLICIES}
    head = ["policy", *(f"{n} pulls" for n in PULLS), f"last {LAST} near"]
    body = [
        [label, *(spread(learned.regret[n]) for n in PULLS), spread(learned.near)] for label, learned in found.items()
    ]
    return [f"## {landscape.title}", "", *table(head, body), "", *(winner(found, n) for n in PULLS), ""]


def spread(values: np.ndarray) -> str:
    """Mean over runs and standard deviation."""
    return f"{values.mean():.3f} ± {values.std(ddof=1):.3f}"


def winner(found: Mapping[str, Learned], pulls: int) -> str:
    """Who has the least regret, and how far the next is, paired by run."""
    first, second = sorted(found, key=lambda label: found[label].regret[pulls].mean())[:2]
    difference = found[second].regret[pulls] - found[first].regret[pulls]
    error = difference.std(ddof=1) / RUNS**0.5
    clear = "" if difference.mean() > 2 * error else ": not told apart"
    return f"- {pulls} pulls: least is {first}, then {second} (+{difference.mean():.3f} ± {error:.3f}{clear})."


def played(policy: Policy, pulls: int, seed: int = 0) -> Bandit:
    """A bandit that has seen rewards; at 200 pulls `aligned` has most arms."""
    rng = np.random.default_rng(seed)
    bandit = policy.bandit(max(pulls, 1))
    for draws in rng.random((pulls, 3)).tolist():
        pull = bandit.choose(1.0, draws)
        bandit.observe(pull, float(1 - regret_of(pull.ratio, 0.75) + 0.1 * rng.standard_normal()), 0.5)
    return bandit


def timing_rows() -> list[Row]:
    """Time of a choice and of an observation."""
    rows = []
    for policy in POLICIES[:-2]:
        times = {pulls: call_times(policy, pulls) for pulls in (20, 200)}
        rows += [
            Row(f"choose, {policy.label}, after {pulls}", choose, "us", 50, f"observe {observe:.1f} us, {arms} arms")
            for pulls, (choose, observe, arms) in times.items()
        ]
    return rows


def call_times(policy: Policy, pulls: int, calls: int = 300) -> tuple[float, float, int]:
    """Median microseconds of a choice and of its observation, and the arms; every call on the same state."""
    bandit = played(policy, pulls)
    state, choosing, observing = bandit.state(), [], []
    for draws in np.random.default_rng(1).random((calls, 3)).tolist():
        begin = time.perf_counter()
        pull = bandit.choose(1.0, draws)
        middle = time.perf_counter()
        bandit.observe(pull, 0.5, 0.5)
        choosing.append(middle - begin)
        observing.append(time.perf_counter() - middle)
        bandit.restore(state)
    return 1e6 * median(choosing), 1e6 * median(observing), bandit.arms.shape[1]


def memory_rows(clients: int = 2000) -> list[Row]:
    """What a client's bandit weighs in the server and in a checkpoint: 100,000 of them are to fit in 1 GB."""
    rows = []
    for policy in POLICIES[:2]:
        played(policy, 20)  # what is made once is not the clients'
        tracemalloc.start()
        bandits: dict[int, Bandit] = {client: played(policy, 20, client) for client in range(clients)}
        held = tracemalloc.get_traced_memory()[0] / clients
        tracemalloc.stop()
        begin = time.process_time()
        packed = pack_bandits(bandits)
        middle = time.process_time()
        unpack_bandits(policy.name, policy.config, 20, packed)
        seconds = [(middle - begin) * 1e6 / clients, (time.process_time() - middle) * 1e6 / clients]
        size = sum(array.nbytes for array in packed.values()) / clients
        detail = f"in a checkpoint {size:.0f}; packed in {seconds[0]:.1f} us, unpacked in {seconds[1]:.1f} us"
        rows.append(Row(f"a client, {policy.label}, after 20", held, "bytes", 10_000, detail))
    return rows


def report() -> str:
    """The page of results; each landscape in a process of its own."""
    parts = ["# Ratio policies", "", "Written by `python -m benchmarks.bandits`.", ""]
    parts += [
        f"Mean regret a pull over so many pulls (0 = always at the peak), mean over {RUNS} runs ± standard deviation "
        f"over them; the horizon is the number of pulls. Last: of the last {LAST} of {PULLS[-1]} pulls, the share "
        f"within {NEAR} of the peak. Peaks {', '.join(map(str, PEAKS))} in turn, accuracy constant, cap 1.",
        "",
    ]
    for i in range(len(LANDSCAPES)):
        parts += in_child(landscape_at, i)
    rows = in_child(timing_rows) + in_child(memory_rows)
    return "\n".join([*parts, "## Time and memory", "", *row_table(rows), "", machine(), ""])


def landscape_at(i: int) -> list[str]:
    """A section by number: a function that scales cannot be sent to another process."""
    return landscape_lines(LANDSCAPES[i])


def main() -> None:
    """Measure, print, write."""
    argparse.ArgumentParser(prog="python -m benchmarks.bandits", description=__doc__).parse_args()
    os.environ.update(ONE_THREAD)
    text = report()
    print(text)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(text)


if __name__ == "__main__":
    main()
