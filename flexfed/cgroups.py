"""What the cgroups that this process is in still leave of their memory: Linux's limits for services and containers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath

_LIMITS = ("memory.max", "memory.high", "memory.limit_in_bytes")
_UNLIMITED = 2**60  # v1 has no word for it: it writes the last whole page below 2^63


def cgroup_headrooms(root: Path = Path("/")) -> dict[Path, int]:
    """Folder of a cgroup -> bytes it still leaves (less than 0: above its limit); those without a limit are left out.

    All that count this process are looked at: its own and those above it, of version 1, version 2, and both at once.

    Args:
        root: where `proc/self` and the mount points are looked up.

    Raises:
        ValueError: a file holds something other than what Linux writes there.
    """
    chains = (cgroup for folder, top in _memory_cgroups(root) for cgroup in _upwards(folder, top))
    headrooms = {cgroup: headroom(cgroup) for cgroup in chains}
    return {cgroup: free for cgroup, free in headrooms.items() if free is not None}


def headroom(folder: Path) -> int | None:
    """Bytes that one cgroup's own limit still leaves; None: it has no limit, or does not exist.

    Pages of files that were read once and can be read again (inactive_file) count as free.
    """
    limits = [limit for limit in map(_number, (folder / name for name in _LIMITS)) if limit is not None]
    if not limits or min(limits) >= _UNLIMITED:
        return None
    used = _number(folder / "memory.current") or _number(folder / "memory.usage_in_bytes") or 0
    counts = _counts(folder / "memory.stat")
    # Version 1 counts the cgroups below under total_ only, version 2 under the bare name.
    reclaimable = counts.get("total_inactive_file", counts.get("inactive_file", 0))
    return min(limits) - max(0, used - reclaimable)


def _upwards(folder: Path, top: Path) -> Iterator[Path]:
    while folder != top:
        yield folder
        folder = folder.parent
    yield top


def _memory_cgroups(root: Path) -> Iterator[tuple[Path, Path]]:
    """(this process's cgroup, the top one in sight) in each hierarchy that counts memory."""
    paths = _cgroup_paths(kernel_text(root / "proc/self/cgroup") or "")
    for line in (kernel_text(root / "proc/self/mountinfo") or "").splitlines():
        mount, _, rest = line.partition(" - ")
        columns, kind = mount.split(), rest.split()
        if len(columns) < 5 or len(kind) < 3:
            continue
        controller = {"cgroup2": "", "cgroup": "memory"}.get(kind[0])
        if controller not in paths or (controller and controller not in kind[2].split(",")):
            continue
        top = root / _unescaped(columns[4]).lstrip("/")
        yield top / _below(paths[controller], _unescaped(columns[3])), top


def _cgroup_paths(text: str) -> dict[str | None, str]:
    """Controller -> path, from lines `4:memory,cpu:/a/b`; the unified hierarchy, `0::/a/b`, is named ''."""
    lines = [line.split(":", 2) for line in text.splitlines() if line.count(":") >= 2]
    return {controller: path for _, controllers, path in lines for controller in controllers.split(",")}


def _below(path: str, mounted: str) -> PurePosixPath:
    """A cgroup's place under a mount point which shows the hierarchy from `mounted` on.

    In a container the path may be the host's, which is not to be seen there: then it is the mount point itself.
    """
    place, top = PurePosixPath(path), PurePosixPath(mounted)
    inside = place.is_relative_to(top) and ".." not in place.parts
    return place.relative_to(top) if inside else PurePosixPath()


def _unescaped(field: str) -> str:
    """A field of mountinfo, where blanks are written as `\\040`."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), field)


def kernel_text(path: Path) -> str | None:
    """A file of the kernel; None where there is none, or the cgroup vanishes while it is read."""
    with suppress(OSError):
        return path.read_text(encoding="utf-8", errors="replace")
    return None


def _number(path: Path) -> int | None:
    """A file that holds a count of bytes, or `max`; None: no such file, or no limit."""
    text = kernel_text(path)
    if text is None or text.strip() == "max":
        return None
    if not text.strip().isdecimal():
        raise ValueError(f"{path} should hold a number of bytes or 'max', got {text[:40]!r}; unmount or repair it")
    return int(text)


def _counts(path: Path) -> dict[str, int]:
    pairs = [line.split() for line in (kernel_text(path) or "").splitlines()]
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdecimal()}
