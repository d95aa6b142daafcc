"""What every test runs under: one thread, no network, no telemetry, warnings as errors."""

from __future__ import annotations

import os
import sys
import tempfile
import warnings
from getpass import getuser
from pathlib import Path

os.environ.update(
    FLWR_TELEMETRY_ENABLED="0",
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    MPLBACKEND="Agg",
    OMP_NUM_THREADS="1",
)
# The self-made zoo takes half a minute to train: once for all test processes, and not in the user's own folder.
os.environ.setdefault("FLEXFED_ZOOS", str(Path(tempfile.gettempdir()) / f"flexfed-test-zoos-{getuser()}"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # client_app and server_app are no package

with warnings.catch_warnings():  # what others' packages say while they are imported is not ours to mend
    warnings.simplefilter("ignore")
    import flwr.app
    import flwr.clientapp
    import flwr.serverapp.strategy  # noqa: F401
    import torch
    import torch_pruning  # noqa: F401

torch.set_num_threads(1)  # another number of threads changes the bits, and busy cores make it slow
