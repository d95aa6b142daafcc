"""Configuration as people write it: TOML tables, `key=value` overrides, and the flat keys inside."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

Scalar = str | int | float | bool

# Flower's own pattern (`flwr run -c`), so that both commands read the same overrides.
_PAIR = re.compile(r"(\S+?)=('[^']*'|\"[^\"]*\"|\S+)")


def flatten(table: Mapping[str, Any], prefix: str = "") -> dict[str, Scalar]:
    """Nested tables as one flat mapping with dotted keys.

    Raises:
        ValueError: a value is no text, number or true/false (Flower's configuration holds no lists).
    """
    flat: dict[str, Scalar] = {}
    for key, value in table.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        elif isinstance(value, str | int | float):
            flat[prefix + key] = value
        else:
            raise ValueError(
                f"{prefix}{key} must be text, a number or true/false, got {value!r}; "
                'write a list as one string, such as "0.25, 0.5"'
            )
    return flat


def nest(flat: Mapping[str, Scalar]) -> dict[str, Any]:
    """The inverse of `flatten`: dotted keys become tables, so that the result reads well as TOML.

    Raises:
        ValueError: one key is both a value and a table ("a" and "a.b").
    """
    tables: dict[str, Any] = {}
    # Plain keys first: TOML wants a table's own values before its sub-tables.
    for key in sorted(flat, key=lambda name: (name.count("."), name)):
        *parents, name = key.split(".")
        table = tables
        for parent in parents:
            table = table.setdefault(parent, {})
            if not isinstance(table, dict):
                raise ValueError(f"configuration key {key!r} needs {parent!r} to be a table, but it has a value")
        table[name] = flat[key]
    return tables


def read_toml(path: Path) -> dict[str, Any]:
    """A TOML file's content.

    Raises:
        ValueError: no such file, or not valid TOML; names the file, and a key that is given twice.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"no such file: {path}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid TOML: {error}{_doubled_key(path, str(error))}") from error


def _doubled_key(path: Path, error: str) -> str:
    """Which key a file gives twice; tomllib names only the line."""
    where = re.search(r"overwrite a value \(at (?:line (\d+)|end of document)", error)
    if not where:
        return ""
    lines = path.read_text(encoding="utf-8").splitlines()
    line = lines[int(where[1]) - 1 if where[1] else -1]
    return f"; {line.partition('=')[0].strip()} is given twice"


def defaults(app_dir: Path) -> dict[str, Scalar]:
    """Every knob of the app with its default: [tool.flwr.app.config] of its pyproject.toml, flat."""
    project = read_toml(app_dir / "pyproject.toml")
    return flatten(project.get("tool", {}).get("flwr", {}).get("app", {}).get("config", {}))


def parse_overrides(texts: Iterable[str], known: Mapping[str, Scalar], folder: Path | None = None) -> dict[str, Scalar]:
    """What the `-c` options say, as flat keys; later ones win.

    Reads what `flwr run -c` reads: `key=value` pairs with quoted strings, or the path of a TOML
    file. Differences: files and pairs may be mixed, text that Flower would silently drop is an error, values
    must have the kind (text, number, true/false) of the key's default, and relative paths are resolved.

    Args:
        texts: one entry per `-c`.
        known: every key there is, with its default.
        folder: relative paths in pairs start here (default: the current directory); those in a file start at
            the file's own folder.

    Raises:
        ValueError: malformed text, unknown key (with near matches), or a value of the wrong kind.
    """
    here = folder or Path.cwd()
    values: dict[str, Scalar] = {}
    for text in texts:
        if _is_file(text):
            values.update(_read_file(here / Path(text.strip()).expanduser(), known))
        else:
            pairs = resolve_paths(_parse_pairs(text), here)
            check_known(pairs, known)
            values.update(pairs)
    return values


def with_resumed(values: Mapping[str, Scalar]) -> dict[str, Scalar]:
    """The overrides and, below them, the configuration of the run that they resume; nothing changes without one.

    Raises:
        ValueError: `resume` names no run folder.
    """
    if not values.get("resume"):
        return dict(values)
    return {**flatten(read_toml(_resumed_config(values))), **values}


def resumed_supernodes(values: Mapping[str, Scalar]) -> int | None:
    """How many clients the run has that is resumed; None without one, or where it is not known."""
    return _head_number(_resumed_config(values)) if values.get("resume") else None


def _resumed_config(values: Mapping[str, Scalar]) -> Path:
    return Path(str(values["resume"])).expanduser() / "config.toml"


def _is_file(text: str) -> bool:
    name = text.strip()
    return name.endswith(".toml") and ("=" not in name or Path(name).expanduser().is_file())


def _read_file(path: Path, known: Mapping[str, Scalar]) -> dict[str, Scalar]:
    """The overrides in a TOML file; errors name it."""
    table = read_toml(path)
    try:
        values = flatten(table)
        check_known(values, known)
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from error
    if path.name == "resume.toml" and (path.parent / "config.toml").is_file():
        values["resume"] = str(path.parent.resolve())  # the run beside it, wherever the folder is now
    return resolve_paths(values, path.parent)


def head_supernodes(texts: Iterable[str], folder: Path | None = None) -> int | None:
    """The number of a line `# supernodes = 100` in the comment at the head of a TOML file; the last file wins.

    It is no key of the configuration, because the federation decides it, but belongs to the experiment.

    Args:
        texts: one entry per `-c`.
        folder: relative paths start here (default: the current directory).

    Raises:
        ValueError: no such file, or no whole number >= 1.
    """
    here = folder or Path.cwd()
    paths = [here / Path(text.strip()).expanduser() for text in texts if _is_file(text)]
    found = [number for path in paths if (number := _head_number(path)) is not None]
    return found[-1] if found else None


def _head_number(path: Path) -> int | None:
    read_toml(path)  # says what is wrong with the file
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.strip() and not line.startswith("#"):
            break
        if said := re.fullmatch(r"#\s*supernodes\s*=\s*(.*?)\s*", line):
            if not re.fullmatch(r"[1-9]\d*", said[1]):
                raise ValueError(f"{path.name}: supernodes must be a whole number >= 1, got {said[1]!r}")
            return int(said[1])
    return None


def _parse_pairs(text: str) -> dict[str, Scalar]:
    """`a=1 b.c="x"` -> {"a": 1, "b.c": "x"}."""
    rest = _PAIR.sub("", text).split()
    if rest:
        raise ValueError(
            f"cannot read {' '.join(rest)!r} in the configuration {text!r}; expected key=value pairs without "
            'spaces around "=", strings in quotes: -c "strategy=\'flexfl\' seed=2"'
        )
    pairs = _PAIR.findall(text)
    keys = [key for key, _ in pairs]
    if doubled := sorted({key for key in keys if keys.count(key) > 1}):
        raise ValueError(f"{', '.join(doubled)} is given twice in the configuration {text!r}")
    lines = [f"{key} = {value}" for key, value in pairs]
    for line in lines:
        _check_line(line)
    try:
        return flatten(tomllib.loads("\n".join(lines)))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"cannot read the configuration {text!r}: {error}") from error


def _check_line(line: str) -> None:
    """Point at the one pair that is no TOML: nearly always a string without quotes."""
    try:
        tomllib.loads(line)
    except tomllib.TOMLDecodeError as error:
        key, _, value = line.partition(" = ")
        raise ValueError(
            f"cannot read {key}={value}; strings need quotes: -c \"{key}='{value.strip(chr(39) + chr(34))}'\""
        ) from error


def check_known(values: Mapping[str, Scalar], known: Mapping[str, Scalar]) -> None:
    """Refuse what the configuration does not have.

    Raises:
        ValueError: a key that does not exist, with those that look alike, or a value of another kind than its default.
    """
    for key, value in values.items():
        if key not in known:
            near = near_matches(key, known)
            hint = f"did you mean {', '.join(near)}?" if near else "see [tool.flwr.app.config] in pyproject.toml"
            raise ValueError(f"unknown configuration key {key!r}; {hint}")
        if _kind(value) != _kind(known[key]):
            raise ValueError(
                f"{key} must be {_kind(known[key])} (its default is {known[key]!r}), got {_kind(value)}: {value!r}"
            )


def near_matches(name: str, known: Iterable[str]) -> list[str]:
    """At most three known names that look like this one, or end with it ("kd-weight": "flexfl.kd-weight")."""
    names = list(known)
    wanted = name.replace("_", "-").lower()
    endings = [key for key in names if key.endswith("." + wanted)]
    return endings[:3] or get_close_matches(wanted, names, n=3)


def _kind(value: Scalar) -> str:
    """What a person would call this value; whole and fractional numbers are one kind."""
    if isinstance(value, bool):
        return "true or false"
    return "text" if isinstance(value, str) else "a number"


def resolve_paths(values: Mapping[str, Scalar], folder: Path) -> dict[str, Scalar]:
    """Values with relative paths made absolute, from `folder` on.

    The server's working directory is not the user's, so a relative path would mean another place there.
    Paths are: every "*-dir"; `resume`; `fleet` and `weights` where they look like a file; any text that starts with
    "./" or "../", such as `dataset="./photos"`.
    """
    return {key: _resolve(key, value, folder) for key, value in values.items()}


def _resolve(key: str, value: Scalar, folder: Path) -> Scalar:
    if not isinstance(value, str) or not value or value.startswith("~"):
        return value
    is_file = key in ("fleet", "weights") and ("/" in value or value.endswith((".toml", ".safetensors")))
    is_path = (
        is_file or key == "resume" or key.endswith("-dir") or value in (".", "..") or value.startswith(("./", "../"))
    )
    return str((folder / value).resolve()) if is_path else value
