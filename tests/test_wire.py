"""What travels: numbers as the run's codec has them, masks once."""

from __future__ import annotations

import json
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message
from test_messages import LAYOUT, part, update
from torch import nn
from toy import DIGITS, lines, random_arrays, run_toy

from flexfed.checkpoint import load_checkpoint
from flexfed.client_state import known_masks, with_masks
from flexfed.codecs import CODECS, pieces
from flexfed.cost import decoded_bytes, num_parameters
from flexfed.devices import Device
from flexfed.flower.messages import encoded, job_content, num_bytes, read_job, read_update, update_content
from flexfed.jobs import Assignment, Job
from flexfed.models import model_factory
from flexfed.submodel import Submodel, extract, flatten, full, narrow_shapes, pack, split_flat, unflatten, unpack
from flexfed.units import trace_layout

DEVICE = Device(0)


def masked(seed: int = 0) -> Submodel:
    """A part with gaps, three of its tensors with single entries left out."""
    rng, submodel = np.random.default_rng(seed), part()
    names = ["stem.weight", "fc.weight", "fc.bias"]
    shapes = narrow_shapes(LAYOUT, submodel)
    return replace(submodel, masks={n: np.asarray(rng.uniform(size=shapes[n]) < 0.6) for n in names})


def job(submodel: Submodel, state: dict[str, np.ndarray] | None = None, **changes: Any) -> Job:
    return replace(Job(submodel, {}, DEVICE, {}, 5, 1, state or {}), **changes)


# --- masks -----------------------------------------------------------------------------------------------------


def test_of_a_masked_tensor_only_the_kept_entries_travel() -> None:
    submodel = masked()
    arrays = random_arrays(LAYOUT, np.random.default_rng(1))
    kept = extract(LAYOUT, submodel, arrays)
    flat = flatten(LAYOUT, submodel, kept)
    dropped = sum(int((~mask).sum()) for mask in submodel.masks.values())
    assert len(flat) == num_parameters(LAYOUT, submodel) == num_parameters(LAYOUT, part()) - dropped
    back = unflatten(LAYOUT, submodel, flat)
    assert all(np.array_equal(back[name], values) for name, values in kept.items())
    assert not back["fc.weight"][~submodel.masks["fc.weight"]].any()
    assert len(split_flat(LAYOUT, submodel, flat)["fc.weight"]) == submodel.masks["fc.weight"].sum()


def test_masks_that_the_receiver_knows_travel_as_their_key() -> None:
    submodel = masked()
    packed = pack(submodel, submodel.masks_key)
    assert set(packed) == {"units", "masks"}
    assert len(packed["masks"]) == 16
    assert unpack(LAYOUT, packed, submodel) == submodel
    assert unpack(LAYOUT, pack(submodel, masked(1).masks_key)) == submodel  # others are known: these travel
    for known in (None, masked(1), part()):
        with pytest.raises(ValueError, match="masks that are not known here"):
            unpack(LAYOUT, packed, known)


def test_known_masks_are_those_of_the_same_units() -> None:
    submodel = masked()
    other = submodel.units.copy()
    other[np.flatnonzero(~LAYOUT.fixed_units)[0]] ^= True
    forged = {**pack(submodel, submodel.masks_key), "units": np.packbits(other).tobytes()}
    with pytest.raises(ValueError, match="not known here"):
        unpack(LAYOUT, forged, submodel)


def test_equal_masks_of_other_units_have_another_key() -> None:
    submodel, moved = masked(), np.zeros(LAYOUT.num_units, dtype=bool)
    moved[: submodel.units.sum()] = True
    assert not np.array_equal(moved, submodel.units)
    assert replace(submodel, units=moved).masks_key != submodel.masks_key != b""


def test_a_client_remembers_the_masks_it_was_sent() -> None:
    first = with_masks({}, job(masked()))
    assert known_masks(LAYOUT, first) == masked()
    assert with_masks({}, job(masked(), first)) == {}  # nothing new
    second = with_masks({}, job(masked(1), {**first, "seen": np.ones(2)}))
    assert known_masks(LAYOUT, second) == masked(1)
    assert np.array_equal(second["seen"], np.ones(2))  # the method's own stays
    fewer = replace(masked(), masks={"fc.bias": masked().masks["fc.bias"]})
    assert known_masks(LAYOUT, with_masks({}, job(fewer, first))) == fewer  # none of the others stays
    own = with_masks({"seen": np.zeros(2)}, job(masked(1), second))
    assert known_masks(LAYOUT, own) == masked(1)
    assert not own["seen"].any()
    assert known_masks(LAYOUT, with_masks({"seen": np.zeros(2)}, job(part(), second))) is None


def test_a_job_names_masks_that_its_client_holds_and_the_reply_does_not_repeat_them() -> None:
    submodel = masked()
    asked = Assignment(submodel, "full")
    flat = np.ones(num_parameters(LAYOUT, submodel), dtype=np.float32)
    numbers = encoded("float32", LAYOUT, submodel, flat)
    content = job_content(numbers, asked, 5, 1, {}, submodel.masks_key)
    read = read_job(content, LAYOUT, DEVICE, submodel)
    assert read.submodel == submodel
    reply = update_content(update(submodel=submodel, difference=flat), LAYOUT, read)
    assert set(reply.config_records["submodel"]) == {"units", "masks"}
    assert read_update(reply, LAYOUT, asked).submodel == submodel
    with pytest.raises(ValueError, match="not known here"):
        read_update(reply, LAYOUT, Assignment(masked(1), "full"))


# --- codecs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", ["int8", "int4"])
def test_jobs_and_replies_travel_as_the_assignment_says(codec: str) -> None:
    submodel = masked()
    asked = Assignment(submodel, "full", codec=codec, reply_codec=codec)
    flat = np.random.default_rng(2).standard_normal(num_parameters(LAYOUT, submodel)).astype(np.float32)
    tensors = pieces(LAYOUT, submodel)
    read = read_job(job_content(encoded(codec, LAYOUT, submodel, flat), asked, 5, 1, {}), LAYOUT, DEVICE)
    assert (read.codec, read.reply_codec) == (codec, codec)
    nearest = CODECS[codec].decode(CODECS[codec].encode(flat, tensors), tensors)
    assert np.array_equal(flatten(LAYOUT, submodel, read.arrays), nearest)
    reply = update_content(update(submodel=submodel, difference=flat), LAYOUT, read)
    again = update_content(update(submodel=submodel, difference=flat), LAYOUT, replace(read, seed=6))
    first, second = (read_update(content, LAYOUT, asked).difference for content in (reply, again))
    assert not np.array_equal(first, second)  # rounded at random, by the job's seed
    assert np.abs(first - flat).max() < 2 * np.abs(flat).max() / (2 ** (CODECS[codec].bits - 1) - 1)
    with pytest.raises(ValueError, match="a part as float32 has the arrays part; got codes, floats, scales"):
        read_update(reply, LAYOUT, Assignment(submodel, "full"))


@pytest.mark.parametrize("with_masks", [False, True])
@pytest.mark.parametrize("codec", list(CODECS))
def test_what_a_device_holds_beside_the_message_it_has_read(codec: str, with_masks: bool) -> None:
    layout = trace_layout(lambda: nn.Sequential(nn.Linear(1000, 400), nn.ReLU(), nn.Linear(400, 10)), (1000,))
    submodel, rng = full(layout), np.random.default_rng(0)
    if with_masks:
        submodel = replace(submodel, masks={"0.weight": rng.uniform(size=layout.shapes["0.weight"]) < 0.3})
    flat = np.asarray(rng.standard_normal(num_parameters(layout, submodel)), dtype=np.float32)
    content = job_content(encoded(codec, layout, submodel, flat), Assignment(submodel, "full", {}, codec), 5, 1, {})
    tracemalloc.start()
    read = read_job(content, layout, DEVICE)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held == pytest.approx(decoded_bytes(layout, submodel, codec), rel=0.02, abs=50_000)
    assert read.submodel == submodel


def test_the_reason_of_a_refusal_does_not_depend_on_the_clock() -> None:
    content = update_content(update(metrics={"train-loss": float("nan"), "seconds": 0.123}), LAYOUT)
    with pytest.raises(ValueError, match=r"got \{'train-loss': nan\}$"):
        read_update(content, LAYOUT)


def test_a_reply_cannot_choose_its_codec() -> None:
    reply = update_content(update(), LAYOUT, job(part(), reply_codec="int8"))
    with pytest.raises(ValueError, match=r"codec int4|as int4"):
        read_update(reply, LAYOUT, Assignment(part(), "full", reply_codec="int4"))


@pytest.mark.parametrize("strategy", ["fedavg", "heterofl", "fedrolex", "fjord", "flexfl", "fedlps"])
def test_any_method_runs_with_bytes_for_numbers(strategy: str, tmp_path: Path) -> None:
    runs = {codec: run_toy(tmp_path / codec, strategy, {"codec": codec}) for codec in ("float32", "int8")}
    plain, coded = (lines(folder)[0] for folder in runs.values())
    assert (coded["refused"], coded["failed"]) == ([], [])
    assert coded["trained"] == plain["trained"]
    for key in ("bytes-down", "bytes-up"):
        assert coded[key] < 0.32 * plain[key]
    assert coded["loss"] == pytest.approx(plain["loss"], rel=0.25)


def test_law_1_a_coded_reply_that_changes_nothing_changes_nothing() -> None:
    layout = trace_layout(model_factory("cnn", 10, DIGITS), DIGITS)
    submodel = Submodel(np.ones(layout.num_units, dtype=bool))
    still = np.zeros(num_parameters(layout, submodel), dtype=np.float32)
    content = update_content(update(submodel=submodel, difference=still), layout, job(submodel, reply_codec="int4"))
    found = read_update(content, layout, Assignment(submodel, "full", reply_codec="int4"))
    assert not found.difference.any()
    assert content.array_records["arrays"]["codes"].shape == (
        (num_matrix := sum(size for size, plain in zip(*pieces(layout, submodel), strict=True) if not plain)) // 2
        + num_matrix % 2,
    )


def test_a_checkpoint_knows_which_masks_clients_hold(tmp_path: Path) -> None:
    folder = run_toy(tmp_path, "autoflip", {"autoflip.explore-epochs": 1, "autoflip.mask-mode": "static"})
    found = load_checkpoint(folder / "checkpoint")
    assert found is not None
    held = set(found.facts["masks-held"].values())
    assert len(held) == 1
    assert held != {""}
    assert found.facts["preparation"]["bytes_up"] > 0
    line = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])
    assert line["bytes-preparation"] == sum(found.facts["preparation"][k] for k in ("bytes_up", "bytes_down"))


def test_unknown_codecs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown codec 'int7'; known: float32, int4, int8"):
        run_toy(tmp_path, "fedavg", {"codec": "int7"})
    content = job_content({}, Assignment(part(), "full"), 5, 1, {})
    content["config"] = ConfigRecord({**content.config_records["config"], "codec": "int7"})
    with pytest.raises(KeyError, match="int7"):
        read_job(content, LAYOUT, DEVICE)


def test_bytes_of_a_coded_message_are_counted_as_they_are() -> None:
    from test_laws import as_message

    flat = np.ones(num_parameters(LAYOUT, part()), dtype=np.float32)
    contents = {
        c: job_content(encoded(c, LAYOUT, part(), flat), Assignment(part(), "a", codec=c), 5, 1, {}) for c in CODECS
    }
    sizes = {name: num_bytes(as_message(content)) for name, content in contents.items()}
    tensors = pieces(LAYOUT, part())
    for name in ("int8", "int4"):
        beside = sizes["float32"] - CODECS["float32"].num_bytes(tensors)
        assert sizes[name] - CODECS[name].num_bytes(tensors) == pytest.approx(beside, abs=300)


def test_a_client_that_lost_its_masks_is_sent_them_again(tmp_path: Path) -> None:
    asked: list[set[str]] = []

    def listen(request: Message, reply: Message, partition: int) -> Message:
        if request.metadata.message_type == "train" and partition == 0:
            asked.append({key.partition(":")[0] for key in request.content.config_records["submodel"]})
            if len(asked) == 1:
                for path in tmp_path.glob("*/clients/000000/*"):
                    path.unlink()
        return reply

    values = {"autoflip.explore-epochs": 1, "autoflip.mask-mode": "static", "num-server-rounds": 4}
    folder = run_toy(tmp_path, "autoflip", values, alter=listen)
    assert asked == [{"units", "mask"}, {"units", "masks"}, {"units", "mask"}, {"units", "masks"}]
    failed = [[entry["partition"] for entry in line["failed"]] for line in lines(folder)]
    assert failed == [[], [0], [], []]
