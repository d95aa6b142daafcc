"""Compressed local models as a server runs them: who gets which tier, what travels, what is refused and reported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message
from safetensors.numpy import load_file
from test_resume import go_on, killed_run, run, same_run
from toy import (
    AVERAGING,
    Reply,
    as_message,
    dense_mean,
    failure,
    final_model,
    initial_model,
    lines,
    random_arrays,
    run_toy,
    same_bits,
    toy_task,
)

from flexfed.codecs import CODECS, PLAIN, pieces
from flexfed.config import Experiment
from flexfed.cost import message_bytes, modelled_seconds, round_macs
from flexfed.devices import Device
from flexfed.flower.messages import num_bytes
from flexfed.jobs import Assignment, Task, Update
from flexfed.methods.compressed import CompressedConfig, memory_to_train
from flexfed.methods.compressed_tiers import compress, parse_tier, tier_cost
from flexfed.methods.fedlps import model_norms
from flexfed.networks import build_on_meta
from flexfed.select import prefix_ratio, top, window
from flexfed.submodel import Submodel, full, unpack
from strategies.compressed import Compressed
from strategies.record import RoundRecord

LADDER = {"compressed.ladder": "full, q8, p50q8, w25, q4, p90", "fraction-train": 1.0}
MIXED = {**LADDER, "compressed.ladder": "full, p50, p50q8"}  # strong, medium and weak devices


@cache
def task() -> Task:
    return toy_task("compressed")


def server(devices: Mapping[int, Device] | None = None, **values: Any) -> Compressed:
    """A server in round 1; keys as in the configuration, with _ for -, without the method's prefix."""
    own = {f.name for f in fields(CompressedConfig)}
    given = {f"compressed.{k}" if k in own else k: v for k, v in values.items()}
    experiment = Experiment.read({"strategy": "compressed", **{k.replace("_", "-"): v for k, v in given.items()}})
    made = Compressed(experiment, replace(task(), method=experiment.method, training=experiment.training), None)  # type: ignore[arg-type]
    made._arrays = random_arrays(task().layout, np.random.default_rng(9))
    made.federation.devices = made.devices = dict(devices or {p: Device(p, num_examples=20) for p in range(8)})
    made.record = RoundRecord(1)
    return made


def tier_of(device: Device, **values: Any) -> str | None:
    found = server(**values).tier_of(device)
    return found and found.name


# --- who gets which tier --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("capacity", "tier"),
    [(1.5, "full"), (1.0, "full"), (0.99, "w50"), (0.2, "p50q8"), (0.15, "w25"), (0.05, None)],
)
def test_a_device_gets_the_first_tier_whose_bytes_it_holds(capacity: float, tier: str | None) -> None:
    assert tier_of(Device(0, capacity=capacity)) == tier


def test_the_order_is_the_ladders_own() -> None:
    for ladder, tier in (("full, q8, w50", "q8"), ("full, w50, q8", "w50"), ("q4, full", "q4"), ("p90, q4", "p90")):
        assert tier_of(Device(0, capacity=0.4), ladder=ladder) == tier


def test_law_11_nobody_is_sent_more_bytes_than_it_holds() -> None:
    layout, rng = task().layout, np.random.default_rng(0)
    dense = 4 * sum(int(np.prod(shape)) for shape in layout.shapes.values())
    made = server(width_selection="random")
    for server_round in range(1, 6):
        devices = {p: Device(p, capacity=float(rng.uniform(0.001, 1.3)), num_examples=9) for p in range(12)}
        made.federation.devices = made.devices = devices
        for partition, assignment in made.assign(server_round, devices, rng).items():
            codec = CODECS[assignment.codec or "float32"]
            masks = sum(len(np.packbits(mask)) for mask in assignment.submodel.masks.values())
            size = codec.num_bytes(pieces(layout, assignment.submodel)) + masks
            assert size <= devices[partition].capacity * dense + 1e-6


def test_a_device_that_tells_its_memory_must_have_what_torch_needs() -> None:
    layout = task().layout
    for name in ("full", "w50", "p50", "q8"):
        tier, part = parse_tier(name), prefix_ratio(layout, parse_tier(name).ratio)
        cost = tier_cost(layout, tier)
        need = cost.down_bytes + cost.decoded_bytes + memory_to_train(task(), part, tier)
        assert tier_of(Device(0, memory_bytes=need), ladder=name) == name
        assert tier_of(Device(0, memory_bytes=need - 1), ladder=name) is None
    enough = tier_cost(layout, parse_tier("p90")).train_bytes
    assert tier_of(Device(0, memory_bytes=enough)) is None
    assert tier_of(Device(0, memory_bytes=enough), memory="model", ladder="full, p90") == "p90"
    assert tier_of(Device(0, memory_bytes=enough - 1), memory="model", ladder="p90") is None


def test_the_deadline_counts_the_bytes_that_really_travel() -> None:
    layout, device = task().layout, Device(0, num_examples=64, speed_macs_s=1e8, link_bytes_s=1e5)
    macs = round_macs(task().macs(full(layout)), 64, task().training)
    cost = tier_cost(layout, parse_tier("q8"), reply_codec="int8")
    beside = 256 * len(layout.shapes)
    seconds = modelled_seconds(
        device, macs, *(int(np.ceil(1.02 * n)) + beside for n in (cost.down_bytes, cost.up_bytes))
    )
    assert tier_of(device, ladder="full, q8", round_deadline=seconds) == "q8"
    assert tier_of(device, ladder="full, q8", round_deadline=0.999 * seconds) is None
    assert tier_of(device, ladder="full, q8", round_deadline=seconds, reply_codec="float32") is None
    assert tier_of(device, ladder="full", round_deadline=seconds, codec="int8") == "full"


def test_the_deadline_counts_one_pass_where_a_reply_is_one_gradient() -> None:
    device = Device(0, num_examples=64, speed_macs_s=1e8)
    once = task().macs(full(task().layout)) * 3 * 64 / 1e8
    values: dict[str, Any] = {"ladder": "full", "round_deadline": 1.5 * once, "local_epochs": 3}
    assert tier_of(device, mode="grad", **values) == "full"
    assert tier_of(device, mode="delta", **values) is None


def test_a_device_that_keeps_half_of_the_units_gets_no_wider_tier() -> None:
    assert tier_of(Device(0, width=0.5)) == "w50"
    assert tier_of(Device(0, width=0.5), ladder="full, q8, p50, w25") == "w25"


def test_who_can_hold_no_tier_is_never_sampled() -> None:
    devices = {0: Device(0, capacity=0.01, num_examples=9), 1: Device(1, num_examples=9)}
    made = server(devices, fraction_train=1.0)
    assert [made.can_train(device) for device in devices.values()] == [False, True]
    for server_round in range(1, 5):
        assert set(made.assign(server_round, devices, np.random.default_rng(server_round))) == {1}
    with pytest.raises(ValueError, match=r"partition 0 .device. cannot train any tier of the ladder"):
        made.part_of(devices[0], 1)


def test_starvation_is_told(caplog: pytest.LogCaptureFixture) -> None:
    weak = {p: Device(p, capacity=0.4, num_examples=9) for p in range(3)}
    for values, warned in (
        ({}, True),
        ({"width_selection": "l1"}, True),
        ({"width_selection": "rolling"}, False),
        ({"ladder": "full, q8"}, False),
        ({"ladder": "full, p90"}, True),
    ):
        caplog.clear()
        server(weak, **values).prepare(None)  # type: ignore[arg-type]
        assert ("weights that are small or last may never learn" in caplog.text) == warned, values


# --- which part -----------------------------------------------------------------------------------------------------


def test_which_units_a_width_keeps() -> None:
    layout, device = task().layout, Device(3, capacity=0.4)
    made = server()
    assert made.part_of(device, 2).submodel == prefix_ratio(layout, 0.5)
    assert server(width_selection="rolling").part_of(device, 3).submodel == window(layout, 0.5, 2)
    norms = model_norms(layout, build_on_meta(task().factory), made.arrays)
    assert server(width_selection="l1").part_of(device, 1).submodel == top(layout, norms, 0.5)
    drawn = server(width_selection="random")
    one, again, later = (drawn.part_of(device, t).submodel for t in (1, 1, 2))
    other = drawn.part_of(replace(device, partition=4), 1).submodel
    assert one == again == server(width_selection="random").part_of(device, 1).submodel
    assert one not in (later, other)
    assert one.units.sum() == prefix_ratio(layout, 0.5).units.sum()
    assert drawn.part_of(replace(device, capacity=1.0), 1).submodel == full(layout)


def test_an_evaluated_width_rolls_as_the_dispatched_one_does() -> None:
    weak = {p: Device(p, capacity=0.4, num_examples=9) for p in range(3)}
    made = server(weak, width_selection="rolling")
    for server_round in (1, 2, 5):
        made.record = RoundRecord(server_round)
        assert made.levels()["w50"] == window(task().layout, 0.5, server_round - 1)
        assert made.levels()["w50"] == made.part_of(weak[0], server_round).submodel


def test_devices_test_a_quantised_level_as_they_would_hold_it(monkeypatch: pytest.MonkeyPatch) -> None:
    made = server({0: Device(0), 1: Device(1, capacity=0.3)}, ladder="full, q8", codec="int4", fraction_evaluate=1.0)
    monkeypatch.setattr(made.federation, "message", lambda partition, content, *_: as_message(content))
    assert list(made.levels()) == ["q8", "full"]
    jobs = list(made.tests.messages(1, dict.fromkeys(made.levels())))
    assert sorted(str(job.content.config_records["config"]["codec"]) for job in jobs) == ["int4", "int8"]


def test_masks_are_of_the_newest_global_model() -> None:
    made, layout = server(ladder="p50"), task().layout
    first = made.part_of(Device(0), 1).submodel
    assert made.part_of(Device(1), 2).submodel is first
    made._arrays = random_arrays(layout, np.random.default_rng(10))
    second = made.part_of(Device(0), 2).submodel
    assert second != first
    expected = compress(layout, full(layout), parse_tier("p50"), made.arrays).submodel
    assert second == expected
    both = made.levels()["p50"]
    assert both == expected


def test_only_quantised_tiers_have_a_codec_of_their_own() -> None:
    for name, codecs in (("full", ("", "")), ("p50", ("", "")), ("q4", ("int4", "int8")), ("p50q8", ("int8", "int8"))):
        found = server(ladder=name).part_of(Device(0), 1)
        assert (found.codec, found.reply_codec) == codecs
        assert found.config == {"tier": name}
    assert server(ladder="q8", reply_codec="float32").part_of(Device(0), 1).reply_codec == "float32"


# --- replies --------------------------------------------------------------------------------------------------------


def reply_to(assignment: Assignment, **metrics: float) -> Update:
    return Update(assignment.submodel, np.zeros(1, np.float32), 20.0, {"steps": 2.0, **metrics})


def assigned(**values: Any) -> tuple[Compressed, Assignment]:
    made = server(**values)
    return made, next(iter(made.assign(1, made.devices, np.random.default_rng(0)).values()))


@pytest.mark.parametrize("steps", [0.0, -1.0, 1.5, 5.0, 1e9])
def test_steps_that_cannot_be_are_refused(steps: float) -> None:
    made, assignment = assigned()
    made.check(assignment, reply_to(assignment, steps=4.0))  # 20 examples, batches of 16, two epochs
    with pytest.raises(ValueError, match=rf"should tell its steps, a whole number in 1..4, got {steps}"):
        made.check(assignment, reply_to(assignment, steps=steps))
    untold = replace(reply_to(assignment), metrics={})
    with pytest.raises(ValueError, match="should tell its steps"):
        made.check(assignment, untold)


def test_another_part_is_refused() -> None:
    made, assignment = assigned(ladder="p50")
    other = {name: np.roll(mask, 1) for name, mask in assignment.submodel.masks.items()}
    for held in (Submodel(assignment.submodel.units), replace(assignment.submodel, masks=other)):
        with pytest.raises(ValueError, match=r"leaves out whole tensors, or single entries|another part"):
            made.check(assignment, replace(reply_to(assignment), submodel=held))
    units = assignment.submodel.units.copy()
    units[0] = False
    made, assignment = assigned(ladder="full")
    with pytest.raises(ValueError, match="leaves out units that it was asked to train"):
        made.check(assignment, replace(reply_to(assignment), submodel=Submodel(units)))


def test_replies_weigh_by_how_near_their_model_was() -> None:
    made, assignment = assigned(ladder="q4", alpha=2.0)
    made.check(assignment, reply_to(assignment))
    part = compress(task().layout, full(task().layout), parse_tier("q4"), made.arrays)
    missed = sum(float(((made.arrays[n].astype(float) - a) ** 2).sum()) for n, a in part.arrays.items())
    error = missed / sum(float((a.astype(float) ** 2).sum()) for a in made.arrays.values())
    assert made.weigh(reply_to(assignment)) == pytest.approx(20 * (1 - error) ** 2, rel=1e-6)
    assert made.round_facts()["delta2-q4"] == pytest.approx(error, rel=1e-6)
    assert assigned(ladder="q4")[0].weigh(reply_to(assignment)) == 20


def test_each_reply_weighs_by_the_error_of_its_own_tier() -> None:
    devices = {p: Device(p, capacity=c, num_examples=9) for p, c in enumerate((1.0, 0.3, 0.15))}
    made = server(devices, ladder="full, q8, q4", alpha=2.0, fraction_train=1.0)
    weights = []
    for _, job in sorted(made.assign(1, devices, np.random.default_rng(0)).items()):
        update = Update(job.submodel, np.zeros(1, np.float32), 9.0, {"steps": 1.0})
        made.check(job, update)
        weights.append(made.weigh(update))
    assert weights[0] == 9 > weights[1] > weights[2] > 0


def test_nobody_is_sent_a_quantised_tier_dense_to_test_it() -> None:
    made, device = server(ladder="full, p50, q4"), Device(0, num_examples=9)
    for capacity, level in ((1.0, "full"), (0.6, "p50"), (0.2, None)):
        part = made.largest_part(replace(device, capacity=capacity), 1)
        assert (part and part.level) == level


def test_the_error_of_what_the_runs_codec_rounds_counts_too() -> None:
    made, _ = assigned(ladder="full", codec="int8")
    assert made.round_facts()["delta2-full"] == pytest.approx(assigned(ladder="q8")[0].round_facts()["delta2-q8"])
    assert assigned(ladder="full")[0].round_facts()["delta2-full"] == 0


@pytest.mark.parametrize(
    ("values", "rate"),
    [
        ({}, 1.0),
        ({"mode": "pseudo", "momentum": 0.0}, 0.1 * 0.998 * (20 * 2 + 60 * 4) / 80),
        ({"mode": "pseudo", "momentum": 0.0, "server_learning_rate": 0.5}, 0.5 * 0.1 * 0.998 * 3.5),
        ({"mode": "delta", "server_learning_rate": 0.3}, 0.3),
        ({"mode": "grad"}, 0.1 * 0.998),
        ({"mode": "grad", "server_learning_rate": 0.3}, 0.3),
    ],
)
def test_the_servers_rate_follows_what_replies_hold(values: dict[str, Any], rate: float) -> None:
    made = server(**values)
    made.record = RoundRecord(2)
    for partition, (weight, steps) in enumerate([(20.0, 2.0), (60.0, 4.0)]):
        made.observe(2, partition, Update(full(task().layout), np.zeros(1, np.float32), weight, {"steps": steps}))
    old = {name: np.asarray(array) for name, array in made.arrays.items()}
    new = made.finish(old, {name: array - 1 for name, array in old.items()})
    for name, array in old.items():
        np.testing.assert_allclose(array - new[name], rate, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("freeze", [False, True])
def test_momentum_moves_what_nobody_covers_unless_it_is_frozen(freeze: bool) -> None:
    made, layout = server(ladder="p50", server_momentum=0.5, freeze_uncovered=freeze), task().layout
    old = {name: np.asarray(array) for name, array in made.arrays.items()}
    made.observe(1, 0, Update(full(layout), np.zeros(1, np.float32), 20.0, {"steps": 2.0}))
    made.finish(old, {name: array - 1 for name, array in old.items()})
    (assignment,) = list(made.assign(2, made.devices, np.random.default_rng(0)).values())[:1]
    made.observe(2, 0, reply_to(assignment))
    new = made.finish(old, old)
    for name, mask in assignment.submodel.masks.items():
        moved = old[name] - new[name]
        np.testing.assert_allclose(moved[mask], 0.5, atol=1e-6)
        np.testing.assert_allclose(moved[~mask], 0.0 if freeze else 0.5, atol=1e-6)


def test_pseudo_needs_plain_sgd_and_masked_models_their_own_place() -> None:
    with pytest.raises(ValueError, match="mode='pseudo' divides by learning rate and steps"):
        server(mode="pseudo")
    assert server(mode="pseudo", momentum=0.0)._mode == "pseudo"
    with pytest.raises(ValueError, match="personal='global-masked' sends the units of a client's model dense"):
        server(personal="global-masked")
    server(personal="global-masked", ladder="full, w50")


# --- rounds ---------------------------------------------------------------------------------------------------------


def listening(heard: list[tuple[str, int, int, Submodel]], layout: Any) -> Any:
    """Notes (codec, bytes down, bytes up, part) of every job of training."""

    def listen(request: Message, reply: Message, _: int) -> Message:
        if request.metadata.message_type == "train":
            packed: Any = dict(request.content.config_records["submodel"])
            config = request.content.config_records["config"]
            part = unpack(layout, packed) if "masks" not in packed else full(layout)
            heard.append((str(config.get("codec", "float32")), num_bytes(request), num_bytes(reply), part))
        return reply

    return listen


def test_messages_are_as_large_as_their_tier_says(tmp_path: Path) -> None:
    heard: list[tuple[str, int, int, Submodel]] = []
    layout = task().layout
    found = run_toy(tmp_path, "compressed", {**MIXED, "num-server-rounds": 2}, alter=listening(heard, layout))
    assert {codec for codec, *_ in heard} == {"float32", "int8"}
    kinds = {(codec, bool(part.masks)) for codec, _, _, part in heard}
    assert len(kinds) == 3
    dense = next(down for codec, down, _, part in heard if codec == "float32" and not part.masks)
    for codec, down, up, part in heard:
        here = pieces(layout, part)
        masks = sum(len(np.packbits(mask)) for mask in part.masks.values())
        for size, told in ((down, CODECS[codec].num_bytes(here) + masks), (up, CODECS[codec].num_bytes(here))):
            assert told < size <= 1.02 * told + 256 * len(layout.shapes)
        if codec == "int8":
            assert up <= 0.16 * dense  # half of the weights, a byte each
    assert lines(found)[0]["bytes-up"] + lines(found)[1]["bytes-up"] == sum(up for _, _, up, _ in heard)


@pytest.mark.parametrize(("codec", "share"), [("int8", 0.29), ("int4", 0.18)])
@pytest.mark.parametrize("strategy", AVERAGING)
def test_a_codec_shrinks_the_messages_of_any_strategy(strategy: str, codec: str, share: float, tmp_path: Path) -> None:
    sizes: dict[str, list[tuple[int, int]]] = {}
    for name in ("float32", codec):
        heard: list[tuple[str, int, int, Submodel]] = []
        listen = listening(heard, toy_task(strategy).layout)
        found = run_toy(tmp_path, strategy, {"codec": name, "fleet": "equal"}, alter=listen)
        sizes[name] = [(down, up) for _, down, up, _ in heard]  # masks and rankings travel beside the numbers
        assert lines(found)[0]["refused"] == lines(found)[0]["failed"] == []
    for (down, up), (dense_down, dense_up) in zip(sizes[codec], sizes["float32"], strict=True):
        assert down <= share * dense_down
        assert up <= share * dense_up


def test_an_eight_bit_reply_is_a_quarter_of_a_dense_one(tmp_path: Path) -> None:
    heard: list[tuple[str, int, int, Submodel]] = []
    run_toy(tmp_path, "compressed", {"compressed.ladder": "full, q8"}, alter=listening(heard, task().layout))
    sizes = {codec: (down, up) for codec, down, up, _ in heard}
    assert all(small <= 0.27 * large for small, large in zip(sizes["int8"], sizes["float32"], strict=True))


def test_clients_keep_no_masks_that_never_come_again(tmp_path: Path) -> None:
    values = {**MIXED, "num-server-rounds": 2}
    assert not (run_toy(tmp_path, "compressed", values) / "clients").exists()
    found = run_toy(tmp_path, "compressed", {**values, "personal": "stored-local"})
    assert not lines(found)[1]["failed"]
    assert {name.partition("/")[0] for path in found.glob("clients/*/*") for name in load_file(path)} == {"model"}


def test_a_round_trip_of_a_run_stays_near_that_of_float32(tmp_path: Path) -> None:
    values = {"num-server-rounds": 3, "fleet": "equal"}
    accuracy = {
        codec: lines(run_toy(tmp_path, "fedavg", {**values, "codec": codec}))[-1]["loss"]
        for codec in ("float32", "int8")
    }
    assert accuracy["int8"] == pytest.approx(accuracy["float32"], rel=0.05)
    assert accuracy["int8"] != accuracy["float32"]


def test_the_reported_levels_are_what_devices_would_deploy_and_the_last_is_dense(tmp_path: Path) -> None:
    line = lines(run_toy(tmp_path, "compressed", MIXED))[0]
    assert {"accuracy-p50q8", "accuracy-p50", "accuracy-full"} < line.keys()
    assert line["accuracy"] == line["accuracy-full"]
    assert line["dispatched"] == {"full": 1, "p50": 1, "p50q8": 2}
    made, layout = server(ladder="full, p50q8"), task().layout
    made.federation.devices = {0: Device(0, capacity=0.3), 1: Device(1)}
    expected = compress(layout, full(layout), parse_tier("p50q8"), made.arrays)
    assert list(made.levels()) == ["p50q8", "full"]
    assert same_bits(made.deployed("p50q8", made.arrays), expected.arrays)
    assert same_bits(made.deployed("full", made.arrays), made.arrays)
    assert made.level_for_evaluation(Device(0, capacity=0.3)) == "p50q8"
    assert made.level_for_evaluation(Device(0, capacity=0.01)) is None


def test_the_line_tells_errors_and_coverage(tmp_path: Path) -> None:
    def lost(request: Message, reply: Message, partition: int) -> Message:
        gone = partition == victim and request.metadata.message_type == "train"
        return failure(request) if gone else reply

    line = lines(run_toy(tmp_path, "compressed", MIXED))[0]
    assert line["delta2-full"] == 0 < line["delta2-p50"] < line["delta2-p50q8"] < 1
    assert line["gamma-min"] == 1
    half = [line["covered-by-1"], line["covered-by-4"]]  # all pruned tiers keep the same half
    assert half == pytest.approx([0.5, 0.5], abs=0.01)
    assert line["coverage-mean"] == pytest.approx(half[0] + 4 * half[1])
    victim = 3  # the strong one
    line = lines(run_toy(tmp_path, "compressed", MIXED, alter=lost))[0]
    assert line["gamma-min"] == 0
    assert line["covered-by-0"] == pytest.approx(half[0])


def test_what_nobody_covered_keeps_its_bytes(tmp_path: Path) -> None:
    run_folder = run_toy(tmp_path, "compressed", {"compressed.ladder": "p50"})
    before, after = initial_model(run_folder), final_model(run_folder)
    part = compress(task().layout, full(task().layout), parse_tier("p50"), before).submodel
    for name, mask in part.masks.items():
        assert after[name][~mask].tobytes() == before[name][~mask].tobytes()
        assert (after[name][mask] != before[name][mask]).mean() > 0.9


def test_the_global_model_stays_dense(tmp_path: Path) -> None:
    values = {"compressed.ladder": "p90, p50q8, q4", "fleet": "equal", "num-server-rounds": 4}
    run_folder = run_toy(tmp_path, "compressed", {**values, "compressed.server-momentum": 0.9})
    before, after = initial_model(run_folder), final_model(run_folder)
    zeros = {n: (int((before[n] == 0).sum()), int((after[n] == 0).sum())) for n in after if after[n].ndim > 1}
    assert all(late <= early for early, late in zeros.values())
    assert all(array.dtype == np.float32 for array in after.values())


def test_full_devices_are_fedavg(tmp_path: Path) -> None:
    values = {"fleet": "equal", "num-server-rounds": 2}
    theirs = final_model(run_toy(tmp_path, "fedavg", values))
    ours = final_model(run_toy(tmp_path, "compressed", values))
    assert same_bits(ours, theirs)
    plain = {**values, "momentum": 0.0, "partition": "iid", "num-server-rounds": 1}
    theirs = final_model(run_toy(tmp_path, "fedavg", plain))
    pseudo = {**plain, "compressed.mode": "pseudo"}
    ours = final_model(run_toy(tmp_path, "compressed", pseudo))  # equal where steps are
    for name in theirs:
        np.testing.assert_allclose(ours[name], theirs[name], atol=2e-6)


@pytest.mark.parametrize("mode", ["pseudo", "delta", "grad"])
def test_it_learns_with_every_tier(mode: str, tmp_path: Path) -> None:
    rounds = 12 if mode == "grad" else 4  # a step a round
    values = {**LADDER, "num-server-rounds": rounds, "momentum": 0.0, "compressed.mode": mode, "evaluate-every": rounds}
    found = lines(run_toy(tmp_path, "compressed", values, clients=6))
    assert found[-1]["train-loss"] < 0.9 * found[0]["train-loss"]
    assert found[-1]["refused"] == found[-1]["failed"] == []


FULL_HOUSE = {
    **LADDER,
    "compressed.server-momentum": 0.5,
    "compressed.width-selection": "random",
    "compressed.alpha": 1.0,
    "compressed.freeze-uncovered": True,
    "personal": "stored-local",
    "strategy": "compressed",
    "fraction-train": 0.7,
}


def test_law_9_with_momentum_masks_and_models_of_the_clients_own(tmp_path: Path) -> None:
    never = run(tmp_path / "never", FULL_HOUSE)
    left = killed_run(tmp_path / "killed", FULL_HOUSE, "after it", 2)
    go_on(left)
    assert same_run(left, never)
    assert 0 <= lines(never)[-1]["accuracy-personal"] <= 1


def test_law_2_late_replies_give_the_same_bits_with_every_option(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    prompt = run_toy(tmp_path, "compressed", FULL_HOUSE)
    late = run_toy(tmp_path, "compressed", {**FULL_HOUSE, "replies-in-flight": 3}, delay=lambda: int(rng.integers(3)))
    assert same_bits(final_model(late), final_model(prompt))


@pytest.mark.parametrize(("aggregate", "per"), [("coverage", "coverage"), ("zero-fill", "total")])
def test_the_mean_of_the_replies_is_what_scattering_them_gives(aggregate: str, per: str, tmp_path: Path) -> None:
    layout = task().layout
    values = {**MIXED, "compressed.reply-codec": "float32", "compressed.aggregate": aggregate, "evaluate-every": 5}
    replies: list[Reply] = []

    def listen(request: Message, reply: Message, _: int) -> Message:
        if request.metadata.message_type == "train":
            packed: Any = dict(request.content.config_records["submodel"])
            flat = np.frombuffer(reply.content.array_records["arrays"]["part"].data, np.float32)
            weight: Any = reply.content.metric_records["metrics"]["weight"]
            replies.append((unpack(layout, packed), flat, weight))
        return reply

    run_folder = run_toy(tmp_path, "compressed", values, alter=listen)
    before, after = initial_model(run_folder), final_model(run_folder)
    expected, covered = dense_mean(layout, before, replies, per)
    assert any(part.masks for part, *_ in replies)
    assert len({part.key for part, *_ in replies}) > 1
    for name in after:
        np.testing.assert_allclose(after[name], expected[name], atol=1e-6)
        assert np.array_equal(after[name][~covered[name]], before[name][~covered[name]])


@pytest.mark.parametrize("name", ["full", "p90", "q8", "p50q8", "w50q4"])
def test_no_message_is_larger_than_the_most_that_is_told(name: str) -> None:
    layout, tier, beside = task().layout, parse_tier(name), 256 * len(task().layout.shapes)
    part = compress(layout, prefix_ratio(layout, tier.ratio), tier, server().arrays).submodel
    travels = tier_cost(layout, tier).down_bytes
    assert travels + beside <= message_bytes(layout, part, tier.codec or PLAIN) <= 1.02 * travels + beside + 1


def test_tiers_that_measuring_devices_would_refuse_are_refused_at_once() -> None:
    made = server({0: Device(0), 3: Device(3, measure_memory=True)}, memory="model")
    with pytest.raises(ValueError, match=r"partitions \[3\] measure their memory .*leave compressed.memory='training'"):
        made.prepare(None)


def test_a_codec_coarser_than_a_tier_is_told(caplog: pytest.LogCaptureFixture) -> None:
    made = server({0: Device(0)}, codec="int4", ladder="q8")
    with caplog.at_level("WARNING", "flwr"):
        made.prepare(None)
    assert "codec=int4 is coarser than tiers ['q8']" in caplog.text
