"""Runs that between them reach every line that makes a tensor: what has to work wherever networks compute."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from toy import run_toy
from toy_zoo import knobs, write_zoo

from strategies import STRATEGIES

ROUNDS = 2
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in sorted(STRATEGIES)},
    "adam and clipped": ("fedavg", {"optimizer": "adam", "clip-norm": 0.5, "learning-rate": 0.01}),
    "test batch statistics": ("fedavg", {"batch-norm": "batch"}),
    "own models": ("heterofl", {"personal": "stored-local"}),
    "autoflip, fedlex": ("autoflip", {"autoflip.fedlex": True}),
    "compressed, gradients": ("compressed", {"compressed.mode": "grad", "compressed.ladder": "full, p50, q4"}),
    "compressed, pruned and quantised": ("compressed", {"compressed.ladder": "full, p50, q4, w50"}),
    "fedlps, masks of each batch": ("fedlps", {"fedlps.mask-update": "batch", "fedlps.mask-bias": True}),
    "fedlps, near its start": ("fedlps", {"fedlps.prox": 0.01, "fedlps.importance-target": "sigmoid-zscore-l1"}),
    "fedlps, scores by SGD": ("fedlps", {"fedlps.score-optimizer": "shared-sgd", "fedlps.share-ranking": False}),
    "fedlps, by magnitude": ("fedlps", {"fedlps.pattern": "magnitude"}),
    "fiarse, votes": ("fiarse", {"fiarse.coverage": "sent"}),
    "fiarse, units": ("fiarse", {"fiarse.mode": "units"}),
    "fjord, no distillation": ("fjord", {"fjord.self-distillation": False}),
}


def run_named(folder: Path, name: str, **values: Any) -> Path:
    """One of the runs, two rounds of four clients; FedStitch's goes by a zoo of its own (`toy_zoos` must be open)."""
    strategy, own = RUNS[name]
    shared = {
        "num-server-rounds": ROUNDS,
        "fraction-evaluate": 1.0,
        "test-samples": 200,
        "proxy-fraction": 0.5,
        **{k.replace("_", "-"): v for k, v in values.items()},
    }
    if strategy == "fedstitch":
        return run_toy(
            folder, strategy, knobs(write_zoo(folder / "zoo"), **own, shared={**shared, "num-server-rounds": 8})
        )
    return run_toy(folder, strategy, {**shared, **own})
