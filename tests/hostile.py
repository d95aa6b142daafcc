"""Replies that lie: an honest one of a real round, changed in every way that a message can be changed in."""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from torch import Tensor, nn
from toy import random_units

from flexfed.codecs import PLAIN
from flexfed.flower.messages import encoded
from flexfed.jobs import Assignment
from flexfed.submodel import CUTS, Submodel, narrow_shapes, narrow_sizes, pack, unpack
from flexfed.units import Layout

HUGE = (10**400, -(10**400), 2**63, 10**30)
NOT_UTF8 = b"\xff\xfe\x80"
NAMES = ("", "extra", "arrays ", "Arrays", "../../etc", "\x1b[2J", "\ud800", "part" * 50, "units", "metrics")
"""Of records, arrays and keys that nobody asked for."""


class Tiny(nn.Module):
    """Three groups that can be cut, norms, and 2,800 parameters; digits in."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(8, track_running_stats=False)
        self.conv2 = nn.Conv2d(8, 12, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(12, track_running_stats=False)
        self.fc = nn.Linear(12 * 4, 16)
        self.classifier = nn.Linear(16, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.max_pool2d(self.norm1(self.conv1(x)).relu(), 2)
        x = nn.functional.max_pool2d(self.norm2(self.conv2(x)).relu(), 2)
        return self.classifier(self.fc(x.flatten(1)).relu())


@dataclass(frozen=True)
class Victim:
    """Whose reply is changed.

    Attributes:
        layout: of the network.
        asked: what the client was sent.
        content: its honest reply; never written to.
        others: the honest replies of the rest.
        num_examples: that it has told of.
        chooses: its method lets clients train fewer units.
        levels: keys of the submodels that it may choose.
    """

    layout: Layout
    asked: Assignment
    content: RecordDict
    others: tuple[RecordDict, ...]
    num_examples: int
    chooses: bool
    levels: frozenset[bytes] = frozenset()

    @property
    def codec(self) -> str:
        return self.asked.reply_codec or PLAIN

    def fresh(self) -> dict[str, Any]:
        """The records of the reply, to be changed."""
        return {name: type(record)(dict(record)) for name, record in self.content.items()}  # type: ignore[arg-type]

    def held(self, content: RecordDict | None = None) -> Submodel:
        """What a reply holds."""
        return unpack(self.layout, dict((content or self.content)["submodel"]), self.asked.submodel)  # type: ignore

    def claiming(self, submodel: Submodel, values: float = 0.01) -> dict[str, Any]:
        """The reply with another submodel, and with numbers that fit it."""
        flat = np.full(sum(narrow_sizes(self.layout, submodel).values()), values, dtype=np.float32)
        arrays = encoded(self.codec, self.layout, submodel, flat)
        packed: Any = pack(submodel, self.asked.submodel.masks_key)
        return {**self.fresh(), "arrays": ArrayRecord(arrays), "submodel": ConfigRecord(packed)}


Change = Callable[[Victim, np.random.Generator], "dict[str, Any] | None"]
"""Records of a hostile reply; None = this change says nothing that is wrong of this victim's."""


def pick(rng: np.random.Generator, values: Any) -> Any:
    """One of some values, whatever they are."""
    values = list(values)
    return values[int(rng.integers(len(values)))]


# --- records ----------------------------------------------------------------------------------------------------


def missing_record(v: Victim, rng: np.random.Generator) -> dict[str, Any]:
    records = v.fresh()
    for name in rng.permutation(["arrays", "submodel", "metrics"])[: rng.integers(1, 4)]:
        del records[str(name)]
    return records


def extra_record(v: Victim, rng: np.random.Generator) -> dict[str, Any]:
    junk: Any = pick(
        rng,
        [
            ConfigRecord(),
            ConfigRecord({"empty": []}),
            ConfigRecord({"empty": b""}),
            ConfigRecord({"empty": ""}),
            MetricRecord({"many": [1] * 1000}),
            MetricRecord({"none": []}),
            ArrayRecord(),
            ArrayRecord({"part": Array("float32", (1,), "flexfed.raw", bytes(4))}),
        ],
    )
    return {**v.fresh(), pick(rng, [name for name in NAMES if name not in v.content]): junk}


def renamed_record(v: Victim, rng: np.random.Generator) -> dict[str, Any]:
    records = v.fresh()
    record = records.pop(pick(rng, ["arrays", "submodel", "metrics"]))
    return {**records, pick(rng, [name for name in NAMES if name not in v.content]): record}


def record_of_another_kind(v: Victim, rng: np.random.Generator) -> dict[str, Any]:
    records = v.fresh()
    name = pick(rng, ["arrays", "submodel", "metrics"])
    kinds: list[Any] = [ArrayRecord(), ConfigRecord({"weight": 1.0}), MetricRecord({"weight": 1.0, "units": 3})]
    return {**records, name: pick(rng, [kind for kind in kinds if type(kind) is not type(records[name])])}


def nothing(v: Victim, rng: np.random.Generator) -> dict[str, Any]:
    return pick(rng, [{}, {"arrays": ArrayRecord()}, {"metrics": MetricRecord({"weight": 1.0})}])


# --- arrays -----------------------------------------------------------------------------------------------------


def one_array(v: Victim, rng: np.random.Generator, **changes: Any) -> dict[str, Any]:
    """The reply with one of its arrays changed; those of a masked or empty kind that hold nothing stay."""
    records = v.fresh()
    name = pick(rng, [n for n, a in records["arrays"].items() if a.data])
    old = records["arrays"][name]
    records["arrays"][name] = Array(
        changes.get("dtype", old.dtype),
        changes.get("shape", old.shape),
        changes.get("stype", old.stype),
        changes.get("data", old.data),
    )
    return records


def missing_array(v: Victim, rng: np.random.Generator) -> dict[str, Any]:
    records = v.fresh()
    del records["arrays"][pick(rng, records["arrays"])]
    return records


def renamed_array(v: Victim, rng: np.random.Generator) -> dict[str, Any]:
    records = v.fresh()
    array = records["arrays"].pop(pick(rng, records["arrays"]))
    records["arrays"][pick(rng, [*NAMES, "conv1.weight", "parts", "Part"])] = array
    return records


def extra_array(v: Victim, rng: np.random.Generator) -> dict[str, Any]:
    records = v.fresh()
    size = int(rng.integers(0, 2000))
    records["arrays"][pick(rng, [*NAMES, "conv1.weight"])] = Array("float32", (size,), "flexfed.raw", bytes(4 * size))
    return records


def other_length(v: Victim, rng: np.random.Generator) -> dict[str, Any]:
    old = pick(rng, [a for a in v.content["arrays"].values() if a.data])  # type: ignore[union-attr]
    step = np.dtype(old.dtype).itemsize
    more = int(pick(rng, [-1, 1, 7, 1000, -(len(old.data) // step)]))
    size = max(0, len(old.data) // step + more)
    name = next(n for n, a in v.content["arrays"].items() if a is old)
    records = v.fresh()
    records["arrays"][name] = Array(old.dtype, (size,), old.stype, (old.data + bytes(4000))[: size * step])
    return records


def other_shape(v: Victim, rng: np.random.Generator) -> dict[str, Any]:
    records = v.fresh()
    name = pick(rng, [n for n, a in records["arrays"].items() if a.shape[0] > 1])
    old = records["arrays"][name]
    shape = pick(rng, [(1, *old.shape), (*old.shape, 1), (1, 1, *old.shape, 1), (*[1] * 30, *old.shape)])
    records["arrays"][name] = Array(old.dtype, shape, old.stype, old.data)
    return records


def absurd_shape(v: Victim, rng: np.random.Generator) -> dict[str, Any]:
    size = int(rng.integers(2, 100))
    shapes: list[tuple[int, ...]] = [
        (10**12,), (2**62,), (2**63,), (2**64 + size,), (10**400,), (2**40, 2**40), (10**9, 10**9, 10**9),
        (0, 10**12), (0, 10**400), (0, 2**40, 2**40, 2**40), (2**32, 2**32), (1,) * 70, (2,) * 64, (10**30,) * 1000,
        (-1,), (-size,), (-2, -2), (-(10**400),), (-1, 0), (0,), (0, 0), (),
    ]  # fmt: skip
    return one_array(v, rng, shape=pick(rng, shapes))


def other_dtype(v: Victim, rng: np.random.Generator) -> dict[str, Any] | None:
    dtypes = [
        *("object", "O", "float64", "float16", "int32", "int64", "bool", "complex64", "<U4", "V4", "S4", "datetime64"),
        *(">f4", "float32 ", "", "nonsense", "f4, f4", "\x00", "float128", "d" * 10_000, "uint8", "int8"),
    ]
    records = one_array(v, rng, dtype=pick(rng, dtypes))
    return None if records["arrays"] == v.content["arrays"] else records


def pickled(v: Victim, rng: np.random.Generator) -> dict[str, Any]:
    file = io.BytesIO()
    np.save(file, np.array([print, v.num_examples], dtype=object), allow_pickle=True)
    data = pick(rng, [file.getvalue(), pickle.dumps(print), b"\x93NUMPY", b"PK\x03\x04"])
    stype = pick(rng, ["numpy.ndarray", "pickle", "flexfed.raw", "", "FLEXFED.RAW", "\ud800"])
    return one_array(v, rng, dtype=pick(rng, ["object", "float32"]), shape=(2,), stype=stype, data=data)


def cut_bytes(v: Victim, rng: np.random.Generator) -> dict[str, Any]:
    old = pick(rng, [a for a in v.content["arrays"].values() if a.data])  # type: ignore[union-attr]
    name = next(n for n, a in v.content["arrays"].items() if a is old)
    cut = int(rng.integers(0, len(old.data)))
    data = pick(rng, [old.data[:cut], old.data + bytes(cut + 1), rng.bytes(len(old.data) + cut + 1), b""])
    records = v.fresh()
    records["arrays"][name] = Array(old.dtype, old.shape, old.stype, data)
    return records


def oversized(v: Victim, rng: np.random.Generator) -> dict[str, Any]:
    """A consistent array, far larger than what was asked for."""
    size = int(rng.integers(40_000, 100_000))
    return one_array(v, rng, shape=(size,), dtype="float32", data=bytes(4 * size))


def bad_numbers(v: Victim, rng: np.random.Generator) -> dict[str, Any]:
    """NaN, infinities, and finite numbers that no sum would survive."""
    records = v.fresh()
    name = pick(rng, [n for n, a in records["arrays"].items() if a.dtype == "float32" and a.data])
    old = records["arrays"][name]
    values = np.frombuffer(old.data, np.float32).copy()
    bad = np.float32(pick(rng, [np.nan, np.inf, -np.inf, 1e20, -1e20, 3.4e38, -3.4e38, 1e30]))
    if name == "scales" and np.isfinite(bad):
        bad = np.float32(pick(rng, [0.0, -0.0, -1.0, 3e38, -1e-45]))
    places = rng.permutation(len(values))[: pick(rng, [1, 2, len(values)])]
    values[places] = bad
    records["arrays"][name] = Array("float32", old.shape, old.stype, values.tobytes())
    return records


def garbage_numbers(v: Victim, rng: np.random.Generator) -> dict[str, Any] | None:
    """Bytes of the right length that mean nothing; as float32 a fourth of them are beyond 1e18."""
    records = v.fresh()
    name = pick(rng, [n for n, a in records["arrays"].items() if a.dtype == "float32" and len(a.data) >= 400] or [""])
    if not name:
        return None
    old = records["arrays"][name]
    records["arrays"][name] = Array(old.dtype, old.shape, old.stype, rng.bytes(len(old.data)))
    return records


def bad_codes(v: Victim, rng: np.random.Generator) -> dict[str, Any] | None:
    """Codes that no encoder writes: the lowest of all, of which there is no positive twin."""
    if "codes" not in v.content["arrays"]:
        return None
    records = v.fresh()
    old = records["arrays"]["codes"]
    data = bytearray(old.data)
    data[int(rng.integers(len(data)))] = 0x80 if v.codec == "int8" else pick(rng, [0x88, 0x08, 0x80])
    records["arrays"]["codes"] = Array(old.dtype, old.shape, old.stype, bytes(data))
    return records


# --- the submodel -----------------------------------------------------------------------------------------------


def units_never_sent(v: Victim, rng: np.random.Generator) -> dict[str, Any] | None:
    absent = np.flatnonzero(~v.asked.submodel.units)
    if not len(absent) or v.asked.submodel.masks:
        return None
    held = v.held()
    units = held.units.copy()
    units[rng.permutation(absent)[: rng.integers(1, len(absent) + 1)]] = True
    claimed = Submodel(units, held.keys, cut=held.cut)
    records = v.claiming(claimed)
    return records if rng.random() < 0.7 else {**v.fresh(), "submodel": records["submodel"]}


def no_unit_of_a_group(v: Victim, rng: np.random.Generator) -> dict[str, Any] | None:
    held, span = v.held(), v.layout.groups[pick(rng, v.layout.groups)]
    if held.masks:
        return None
    units = held.units.copy()
    units[span.start : span.stop] = False
    return v.claiming(Submodel(units, held.keys, cut=held.cut))


def a_hidden_unit_less(v: Victim, rng: np.random.Generator) -> dict[str, Any] | None:
    held = v.held()
    hidden = np.flatnonzero(held.units & ~v.layout.fixed_units)
    if held.masks or len(hidden) < 2:
        return None
    units = held.units.copy()
    units[pick(rng, hidden)] = False
    less = Submodel(units, held.keys, cut=held.cut)
    return None if less.key in v.levels else v.claiming(less)


def random_claim(v: Victim, rng: np.random.Generator) -> dict[str, Any] | None:
    """Any units, with numbers that fit them: never those that were asked for."""
    units, held = random_units(v.layout, rng), v.held()
    hidden = ~v.layout.fixed_units
    if held.masks or v.chooses or (units[hidden] == v.asked.submodel.units[hidden]).all():
        return None
    return v.claiming(Submodel(units, held.keys))


def another_clients_part(v: Victim, rng: np.random.Generator) -> dict[str, Any] | None:
    """What another client was asked for, where that is not this one's as well."""
    theirs = [other for other in v.others if _is_anothers(v, other)]
    if not theirs:
        return None
    return {name: type(record)(dict(record)) for name, record in pick(rng, theirs).items()}


def _is_anothers(v: Victim, other: RecordDict) -> bool:
    try:
        held = unpack(v.layout, dict(other["submodel"]))  # type: ignore[arg-type]
    except ValueError:  # masks that both know
        return False
    hidden = ~v.layout.fixed_units
    same = (held.units[hidden] == v.asked.submodel.units[hidden]).all()
    inside = not (held.units & ~v.asked.submodel.units).any()
    return not same and not (inside and v.chooses)


def damaged_bits(v: Victim, rng: np.random.Generator) -> dict[str, Any]:
    records = v.fresh()
    bits = records["submodel"]["units"]
    behind = bytearray(bits)
    spare = 8 * len(bits) - v.layout.num_units
    behind[-1] |= 1 << int(rng.integers(max(1, spare)))
    options = [bits[:-1], b"", bits + b"\0", bits * 3, rng.bytes(len(bits) + 1 + int(rng.integers(500)))]
    records["submodel"]["units"] = pick(rng, [*options, bytes(behind)] if spare else options)
    return records


def other_values_than_bytes(v: Victim, rng: np.random.Generator) -> dict[str, Any]:
    records = v.fresh()
    value = pick(rng, ["all", 5, 2.5, True, [], [1, 2], [b"a", b"b"], ["x"], 10**400])
    records["submodel"][pick(rng, ["units", "keys", "cut", "mask:conv1.weight", "masks", "more"])] = value
    return records


def tensors_never_sent(v: Victim, rng: np.random.Generator) -> dict[str, Any] | None:
    """Names of tensors: unknown ones, too few, or all of them, which nobody was asked to name."""
    records, names = v.fresh(), list(v.layout.shapes)
    few = "\n".join(names[: rng.integers(1, len(names))]).encode()
    options = [
        b"no.such",
        NOT_UTF8,
        b"conv1.weight\nno.such",
        few,
        b"",
        b"\n\n",
        "\n".join(names).encode(),
        rng.bytes(50),
    ]
    records["submodel"]["keys"] = pick(rng, options)
    return records


def fitting_tensors(v: Victim, rng: np.random.Generator) -> dict[str, Any] | None:
    """Some tensors only, with numbers that fit them."""
    held, names = v.held(), list(v.layout.shapes)
    if held.masks:
        return None
    keys = frozenset(str(n) for n in rng.permutation(names)[: rng.integers(1, len(names) + 1)])
    return v.claiming(Submodel(held.units, keys, cut=held.cut))


def other_cut(v: Victim, rng: np.random.Generator) -> dict[str, Any] | None:
    """Another choice of axes, with numbers that fit it where it is one."""
    held = v.held()
    if held.masks:
        return None
    cut = pick(rng, [b"none", b"", NOT_UTF8, b"ALL", rng.bytes(3), *(c.encode() for c in CUTS if c != held.cut)])
    if cut.decode(errors="replace") in CUTS:
        return v.claiming(replace(held, cut=cut.decode()))  # type: ignore[arg-type]
    records = v.fresh()
    records["submodel"]["cut"] = cut
    return records


def masks_never_sent(v: Victim, rng: np.random.Generator) -> dict[str, Any] | None:
    records = v.fresh()
    held = v.held()
    shapes = narrow_shapes(v.layout, held)
    name = pick(rng, shapes)
    shape = shapes[name]
    size = -(-math.prod(shape) // 8)
    kind = pick(rng, ["key", "short", "unknown", "fitting", "both"])
    if kind == "key":
        records["submodel"]["masks"] = pick(rng, [b"", rng.bytes(16), rng.bytes(int(rng.integers(1, 40)))])
    elif kind == "both":
        records["submodel"]["masks"] = v.asked.submodel.masks_key or b"x"
        records["submodel"][f"mask:{name}"] = bytes(size)
    elif kind == "short":
        records["submodel"].pop("masks", None)
        records["submodel"][f"mask:{name}"] = rng.bytes(size + int(pick(rng, [-1, 1, 100])))
    elif kind == "unknown":
        records["submodel"].pop("masks", None)
        records["submodel"][f"mask:{pick(rng, [*NAMES, 'no.such'])}"] = b"\xff"
    else:
        mask = rng.random(shape) < 0.5
        return v.claiming(Submodel(held.units, held.keys, {name: mask}, held.cut))
    return records


def damaged_masks(v: Victim, rng: np.random.Generator) -> dict[str, Any] | None:
    """Less, or more, of the masks that were sent than can be."""
    sent, records = v.asked.submodel, v.fresh()
    names = [name for name, mask in sent.masks.items() if mask.any() and not mask.all()]
    if not names:
        return None
    name = pick(rng, names)
    num = int(sent.masks[name].sum())
    size, packed = -(-num // 8), {k: b for k, b in records["submodel"].items() if not k.startswith(("mask", "kept:"))}
    records["submodel"] = ConfigRecord(packed)
    told = {"masks": sent.masks_key}
    kind = pick(rng, ["length", "behind", "unknown", "of nothing", "other numbers", "more"])
    if kind == "more":
        mask = sent.masks[name].copy()
        mask[tuple(pick(rng, np.argwhere(~mask)))] = True
        return v.claiming(replace(sent, masks={**sent.masks, name: mask}))
    if kind == "unknown":
        told[f"kept:{pick(rng, [*NAMES, 'no.such'])}"] = b"\xff"
    elif kind == "of nothing":
        told = {f"kept:{name}": bytes(size)}
    elif kind == "other numbers":
        told |= {f"kept:{other}": bytes(-(-int(mask.sum()) // 8)) for other, mask in sent.masks.items()}
    elif kind == "behind" and num % 8:
        told[f"kept:{name}"] = b"\xff" * size
    else:
        told[f"kept:{name}"] = rng.bytes(size + int(pick(rng, [-1, 1, 100])))
    records["submodel"].update(told)
    return records


def unknown_keys(v: Victim, rng: np.random.Generator) -> dict[str, Any]:
    records = v.fresh()
    records["submodel"][pick(rng, ["", "unit", "Units", "extra", "mask", "\ud800"])] = rng.bytes(int(rng.integers(40)))
    return records


# --- numbers that it tells --------------------------------------------------------------------------------------


def absurd_weight(v: Victim, rng: np.random.Generator) -> dict[str, Any]:
    records = v.fresh()
    weights = [-1.0, 0.0, -0.0, math.nan, math.inf, -math.inf, 1e300, 1e39, -1e-300, v.num_examples + 0.5, 10**12]
    records["metrics"]["weight"] = pick(rng, [*weights, v.num_examples + 1, [1.0], [], [1, 2], 0, -5, *HUGE])
    return records


def no_weight(v: Victim, rng: np.random.Generator) -> dict[str, Any]:
    records = v.fresh()
    weight = records["metrics"].pop("weight")
    records["metrics"][pick(rng, ["Weight", "weight ", "examples"])] = weight
    return records


def absurd_metrics(v: Victim, rng: np.random.Generator) -> dict[str, Any]:
    records = v.fresh()
    bad = [math.nan, math.inf, -math.inf, 1e300, -1e300, [], [1.0], [math.nan], 10**19, *HUGE]
    key = pick(rng, ["train-loss", "train-accuracy", "macs", "seconds", "steps", "kept-state", "anything", "\ud800"])
    records["metrics"][key] = pick(rng, bad)
    return records


def impossible_work(v: Victim, rng: np.random.Generator) -> dict[str, Any]:
    records = v.fresh()
    records["metrics"].update(pick(rng, [{"macs": -1.0}, {"macs": 1.1e18}, {"seconds": -1.0}, {"macs": -(2**40)}]))
    return records


def told_unasked(v: Victim, rng: np.random.Generator) -> dict[str, Any]:
    records = v.fresh()
    told = dict(records.get("told", {}))
    key = pick(rng, ["score", "ratio", "", "rankings", "\ud800", "x" * 1000])
    records["told"] = ConfigRecord({**told, key: pick(rng, [b"", b"\1\2", rng.bytes(300)])})
    return records


def told_wrongly(v: Victim, rng: np.random.Generator) -> dict[str, Any]:
    records = v.fresh()
    told = dict(records.get("told", {}))
    wrong: list[Any] = [MetricRecord({"ranking": 1}), ArrayRecord()]
    wrong += [ConfigRecord({**told, "ranking": value}) for value in ("text", 5, [1, 2], [], True, [b"a"])]
    records["told"] = pick(rng, wrong)
    return records


def bad_ranking(v: Victim, rng: np.random.Generator) -> dict[str, Any] | None:
    if "told" not in v.content:
        return None
    records = v.fresh()
    good = records["told"]["ranking"]
    order = np.frombuffer(good, "<u2").copy()
    order[int(rng.integers(len(order)))] = pick(rng, [65535, 40_000, 30_000])
    options = [
        good[:-1],
        good[:-2],
        b"",
        good + b"\0\0",
        good[::-1],
        rng.bytes(len(good)),
        order.tobytes(),
        bytes(len(good)),
    ]
    records["told"]["ranking"] = pick(rng, options)
    return records if rng.random() < 0.9 else {n: r for n, r in records.items() if n != "told"}


def bad_steps(v: Victim, rng: np.random.Generator) -> dict[str, Any] | None:
    """Of compressed's clients, from which pseudo-gradients follow."""
    if "steps" not in v.content["metrics"]:
        return None
    records = v.fresh()
    records["metrics"]["steps"] = pick(rng, [0, -1, 0.5, 1.5, 1e9, 10**6, 1e17])
    return records


def bad_accuracy(v: Victim, rng: np.random.Generator) -> dict[str, Any] | None:
    """Of clients from which a bandit learns; of the others nobody reads it."""
    records = v.fresh()
    if "told" not in v.content:
        return None
    records["metrics"].update({"train-accuracy": pick(rng, [-0.1, 1.1, 50.0, -1, 2])})
    if rng.random() < 0.2:
        del records["metrics"]["train-accuracy"]
    return records


def many_metrics(v: Victim, rng: np.random.Generator) -> dict[str, Any]:
    """More names than any method has: larger than what was asked for."""
    records = v.fresh()
    num = int(rng.integers(6000, 9000))
    records["metrics"] = MetricRecord({**dict(records["metrics"]), **{f"metric{i:04d}": 1.0 for i in range(num)}})
    return records


CHANGES: dict[str, Change] = {
    change.__name__.replace("_", " "): change
    for change in (
        *(missing_record, extra_record, renamed_record, record_of_another_kind, nothing),
        *(missing_array, renamed_array, extra_array, other_length, other_shape, absurd_shape, other_dtype, pickled),
        *(cut_bytes, oversized, bad_numbers, garbage_numbers, bad_codes),
        *(units_never_sent, no_unit_of_a_group, a_hidden_unit_less, random_claim, another_clients_part, damaged_bits),
        *(other_values_than_bytes, tensors_never_sent, fitting_tensors, other_cut, masks_never_sent, unknown_keys),
        *(damaged_masks,),
        *(absurd_weight, no_weight, absurd_metrics, impossible_work, told_unasked, told_wrongly, bad_ranking),
        *(bad_steps, bad_accuracy, many_metrics),
    )
}
"""Kind of lie -> how it is told."""


# --- answers to questions: arrays and numbers, without a submodel ------------------------------------------------


def corrupted(content: RecordDict, rng: np.random.Generator) -> tuple[str, dict[str, Any]]:
    """What was done to an answer, and its records; nothing of it can be what was asked for."""
    records: dict[str, Any] = {name: type(record)(dict(record)) for name, record in content.items()}  # type: ignore
    name = pick(rng, records)
    record = records[name]
    kind = pick(rng, ["gone", "renamed", "extra", "another kind", "inside", "inside", "inside"])
    if kind == "gone":
        del records[name]
    elif kind == "renamed":
        del records[name]
        records[pick(rng, [n for n in NAMES if n not in content])] = record
    elif kind == "extra":
        junk = [ConfigRecord({"empty": []}), ConfigRecord({"empty": b""}), MetricRecord({"none": []}), ArrayRecord()]
        records[pick(rng, [n for n in NAMES if n not in content])] = pick(rng, junk)
    elif kind == "another kind":
        kinds: list[Any] = [ArrayRecord(), ConfigRecord({"x": b""}), MetricRecord({"correct": 1})]
        records[name] = pick(rng, [other for other in kinds if type(other) is not type(record)])
    elif isinstance(record, ArrayRecord):
        kind = _corrupt_arrays(record, rng)
    else:
        record[pick(rng, record)] = pick(rng, [math.nan, math.inf, -math.inf, [], [1.0], [math.nan], *HUGE[:2]])
        kind = "no number"
    return kind, records


def _corrupt_arrays(record: ArrayRecord, rng: np.random.Generator) -> str:
    """Change one array so that it is none; tells how."""
    name = pick(rng, record) if record else ""
    kind = pick(rng, ["drop", "rename", "more", "dtype", "stype", "shape", "bytes", "numbers", "large"]) if name else ""
    old = record.get(name)
    if kind in ("more", ""):
        record[pick(rng, [n for n in (*NAMES, "levels ") if n not in record])] = Array("float64", (1,), _RAW, bytes(8))
    elif kind == "drop":
        del record[name]
    elif kind == "rename":
        record[pick(rng, [n for n in NAMES if n not in record])] = record.pop(name)
    elif kind == "dtype":
        dtypes = ["object", "float16", "int64", "complex128", "bool", "nonsense", "<f8", "int8", "float32"]
        record[name] = Array(pick(rng, dtypes), old.shape, old.stype, old.data)
    elif kind == "stype":
        record[name] = Array(old.dtype, old.shape, pick(rng, ["numpy.ndarray", "pickle", ""]), pickle.dumps(print))
    elif kind == "shape":
        shapes = [(10**12,), (-1,), (10**400,), (0, 10**30), (2**32, 2**32), (*old.shape, 2), (1,) * 70]
        record[name] = Array(old.dtype, pick(rng, shapes), old.stype, old.data)
    elif kind == "bytes":
        data = pick(rng, [old.data[: len(old.data) // 2], old.data + b"\0", old.data[:-1]])
        record[name] = Array(old.dtype, old.shape, old.stype, data if data != old.data else b"\0")
    elif kind == "large":
        record[name] = Array(old.dtype, (30_000,), old.stype, bytes(30_000 * np.dtype(old.dtype).itemsize))
    elif old.dtype == "float64" and old.data:
        values = np.frombuffer(old.data).copy()
        values[int(rng.integers(len(values)))] = pick(rng, [math.nan, math.inf, -math.inf, 1e300, -1e300])
        record[name] = Array(old.dtype, old.shape, old.stype, values.tobytes())
    else:
        record[name] = Array("float64", old.shape, old.stype, old.data + b"\0")
    return kind or "more"


_RAW = "flexfed.raw"


# --- profiles ---------------------------------------------------------------------------------------------------

IMPOSSIBLE: dict[str, list[Any]] = {
    "partition": [-1, -(10**9), 10**18, 2**70, 1.5, "1", True, [1], math.nan, 4, 1000],
    "kind": [5, "", "x" * 65, "a\nb", "\x1b[2J", b"kind", ["a"], True],
    "capacity": [0.0, -1.0, math.nan, math.inf, 1e300, 1e-300, "1", True, [1.0], 10**400],
    "width": [0.0, -1.0, math.nan, -math.inf, 1e300, 1e-300, "wide", False],
    "capacity-spread": [-0.1, math.nan, math.inf, 1e300, "0", True],
    "memory-bytes": [0, -1, math.nan, -math.inf, 1e-300, 1e300, "4GB", True, [1]],
    "memory-spread-bytes": [-1.0, math.nan, math.inf, 1e19],
    "measure-memory": [1, 0, "yes", 1.0, b"1"],
    "availability": [[0.0], [-1.0], [math.nan], [1.5], [1e-300], ["a"], [True], 0.5, "0.5", [0.5] * 1001, [10**400]],
    "speed-macs-s": [0.0, -1.0, math.nan, math.inf, 1e-300, 1e300, "fast", True, 10**400],
    "link-bytes-s": [0, -1.0, math.nan, math.inf, 1e-300, 1e19],
    "download-bytes-s": [-1.0, math.nan, math.inf, 1e300],
    "compute-watts": [-1.0, math.nan, math.inf, 1e300],
    "radio-watts": [-1.0, math.nan, math.inf, "1"],
    "num-examples": [-1, 10**10, 10**18, 2**63, 1.5, 1e300, math.nan, "5", True],
    "labels": [[-1], [2**40], [1.5], ["1"], "123", 5, [True], [0] * 100_001, [10**400]],
}
"""Key of a device's profile -> what it can never be."""


def impossible_profile(content: RecordDict, rng: np.random.Generator) -> tuple[str, dict[str, Any]]:
    """What is wrong with a profile, and its records."""
    records: dict[str, Any] = {name: type(record)(dict(record)) for name, record in content.items()}  # type: ignore
    kind = pick(rng, ["value"] * 20 + ["partitions", "no key", "more keys", "gone", "kind", "extra", "large"])
    if kind == "value":
        kind = pick(rng, IMPOSSIBLE)
        records["device"][kind] = pick(rng, IMPOSSIBLE[kind])
    elif kind == "partitions":
        absurd = [0, -1, 10**18, 10**7, 2**64, 1.5, math.inf, math.nan, "4", True, [4], 1, 10**400]
        records["config"]["num-partitions"] = pick(rng, absurd)
    elif kind == "no key":
        record = pick(rng, [records["device"], records["config"]])
        del record[pick(rng, [key for key in record if key != "code"])]
    elif kind == "more keys":
        records["device"][pick(rng, [*NAMES, "colour"])] = pick(rng, [1, b"", [], "x"])
    elif kind == "gone":
        del records[pick(rng, records)]
    elif kind == "kind":
        records[pick(rng, records)] = pick(rng, [ArrayRecord(), MetricRecord({"partition": 1})])
    elif kind == "extra":
        records[pick(rng, NAMES)] = ConfigRecord({"empty": []})
    else:
        records["config"]["code"] = "x" * 2_000_000
    return kind, records
