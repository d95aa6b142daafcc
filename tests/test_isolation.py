"""The rooms that need no Flower really need none, and importing them is light."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import flexfed

ROOM = Path(flexfed.__file__).parent
MODULES = sorted(
    ".".join(("flexfed", *path.relative_to(ROOM).with_suffix("").parts)).removesuffix(".__init__")
    for path in ROOM.rglob("*.py")
    if "flower" not in path.relative_to(ROOM).parts
)


def python(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOM.parent)
    assert done.returncode == 0, done.stderr[-2000:]


def test_everything_but_the_flower_room_imports_with_flwr_blocked() -> None:
    assert len(MODULES) > 30
    imports = "; ".join(f"import {name}" for name in MODULES)
    python(f"import sys; sys.modules['flwr'] = None; {imports}")


def test_importing_the_apps_loads_no_heavy_package_it_may_not_need() -> None:
    """In deployment each message starts a process: what a handler does not need must not be imported."""
    heavy = ("datasets", "flwr_datasets", "matplotlib", "sklearn", "torchvision", "torch_pruning", "ray")
    python(f"import sys, client_app; loaded = set({heavy!r}) & set(sys.modules); assert not loaded, loaded")
