"""FedStitch's knobs: what is refused before round 1, energy, devices, and the run that fine-tunes the result."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from safetensors.numpy import load_file
from test_actuators import clock as _clock
from test_fedstitch import CLIENTS, MIXED, lines, listener, stitch, told
from test_resume import Killed, go_on, same_run
from toy import ScriptedGrid, as_message, failure, toy_config
from toy_zoo import knobs, toy_zoos, write_zoo

import client_app
import server_app
from flexfed import diary
from flexfed.checkpoint import load_checkpoint
from flexfed.config import Experiment
from flexfed.cost import memory_budget
from flexfed.flower.messages import CHANGED
from flexfed.stitching import actuators, phases
from flexfed.stitching.clocks import WallClock
from flexfed.stitching.phases import GROUP, Work, modelled_peak_bytes
from flexfed.stitching.zoos import open_pool


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_zoo(tmp_path_factory.mktemp("zoo"))


@pytest.fixture(autouse=True)
def _zoos() -> Iterator[None]:
    with toy_zoos(), patch("flexfed.report.curves_png"):
        yield


# --- before round 1 ---------------------------------------------------------------------------------------------

IMPOSSIBLE: dict[str, tuple[dict[str, Any], str]] = {
    "zoo": ({"zoo": "ark"}, "unknown zoo 'ark'; known: shapes, shapes-poisoned"),
    "source": ({"sources": "oak"}, "zoo 'toy' has no source 'oak'; known: ash, birch, cedar"),
    "weights": ({"zoo_folder": "/nowhere"}, "/nowhere/ash.safetensors does not exist"),
    "clock": ({"clock": "sun"}, "fedstitch.clock must be one of modelled, measured, got 'sun'"),
    "actuator": ({"actuator": "hand"}, "fedstitch.actuator must be one of record, cpufreq, got 'hand'"),
    "score-images": ({"score_images": 0}, "fedstitch.score-images must be at least 1, got 0"),
    "batch-size": ({"batch_size": 0}, "fedstitch.batch-size must be at least 1"),
    "episodes": ({"episodes": 0}, "fedstitch.episodes must be at least 1"),
    "finetune-rounds": ({"finetune_rounds": 0}, "fedstitch.finetune-rounds must be at least 1"),
    "bridge-ridge": ({"bridge_ridge": -1.0}, "fedstitch.bridge-ridge must be >= 0"),
    "bridge-rows": ({"bridge_rows": -1}, "fedstitch.bridge-rows must be >= 0"),
    "head-ridge": ({"head_ridge": float("nan")}, "fedstitch.head-ridge must be >= 0, got nan"),
    "slack": ({"deadline_slack": -0.1}, "fedstitch.deadline-slack must be >= 0"),
    "slowdown": ({"slowdown": float("inf")}, "fedstitch.slowdown must be >= 0"),
    "share": ({"deadline_share": 0.0}, r"fedstitch.deadline-share must be in \(0, 1\], got 0"),
    "score": ({"score": "taste"}, "unknown score mode 'taste'; known: product, lookahead"),
    "alpha": ({"alpha": -1.0}, "alpha of a score rule must be >= 0"),
    "aggregate": ({"aggregate": "shout"}, "mode of the votes must be one of score, vote"),
    "votes": ({"weights": "equal"}, "weights of the votes must be one of rl, samples, uniform"),
    "policy": ({"policy": "deep"}, "policy of the votes must be one of preferences, linear"),
    "temperature": ({"temperature": 0.0}, "tau of the votes must be > 0"),
    "block temperature": ({"block_temperature": -1.0}, "tau-b of the votes must be > 0"),
    "baseline": ({"baseline_rate": 2.0}, r"baseline-rate of the votes must be in \[0, 1\]"),
    "reward": ({"reward": "praise"}, "reward of the votes must be one of difference, favor"),
    "target": ({"target_accuracy": 90.0}, "accuracy-target of the votes must be a fraction"),
    "reach": ({"reach": -0.1}, "delta of the search must be >= 0"),
    "no blocks": ({"max_blocks": 0}, "t-max of the search must be at least 1"),
    "keep-score": ({"keep_score": 1.5}, "r3 of the search must be a share"),
    "keep-sources": ({"keep_sources": 0.0}, "r4 of the search must be a share"),
    "native": ({"native_policy": "maybe"}, "native-policy of the search must be allow or exclude"),
    "energy": ({"energy": "off"}, "energy policy must be one of on, max"),
    "window": ({"energy_window": "open"}, "energy window must be one of busy, deadline"),
    "feedback": ({"feedback": 0.0}, r"energy gain must lie in \(0, 1\]"),
    "idle": ({"idle_watts": -1.0}, "energy idle-watts must be >= 0"),
    "path text": ({"path": "0,5"}, "a path is block ids like '0-1-6', got '0,5'"),
    "path start": ({"path": "1-2"}, "a path begins with a start block"),
    "path back": ({"path": "0-5-1"}, "a path begins with a start block, its depths rise"),
    "path twice": ({"path": "0-0"}, "a path begins with a start block, its depths rise"),
    "path beyond": ({"path": "0-99"}, r"no block 99 in zoo 'toy'; it has blocks 0\.\.11"),
    "one block": ({"max_blocks": 1}, "no block can come first: with fedstitch.max-blocks=1"),
    "finetune": (
        {"finetune": "fedprox"},
        "fedstitch.finetune='fedprox' trains no network; expected none or one of auto",
    ),
    "itself": ({"finetune": "fedstitch"}, "fedstitch.finetune='fedstitch' trains no network"),
    "finetune's own": (
        {"finetune": "flexfl", "shared": {"flexfl.kd-weight": -2.0}},
        "the run that fedstitch.finetune='flexfl' asks for cannot be: ",
    ),
    "untraceable": (
        {"finetune": "flexfl", "shared": {"fedstitch.zoo": "toy-padded"}},
        r"fedstitch.finetune='flexfl' cuts .* zoo 'toy-padded' has sources that cannot be cut \(ash: .*; "
        "name others as fedstitch.sources, or fine-tune with exclusive, fedavg",
    ),
    "data": ({"shared": {"dataset": "nowhere/nothing"}}, "nothing"),
}


@pytest.mark.parametrize("case", list(IMPOSSIBLE))
def test_impossible_runs_stop_before_round_1(case: str, tmp_path: Path, zoo: Path) -> None:
    values, reason = IMPOSSIBLE[case]
    config = toy_config(tmp_path, "fedstitch", knobs(zoo, **values))
    grid = ScriptedGrid(client_app.app, 2, config)
    with pytest.raises(ValueError, match=reason):
        server_app.run(grid, config, "never")
    assert not [m for m in grid.requests.values() if m.metadata.message_type != "query.profile"]
    assert not list(tmp_path.rglob("summary.json"))


# --- devices ----------------------------------------------------------------------------------------------------


def need(zoo: Path, images: int) -> float:
    """Memory that every block of the zoo needs for a batch."""
    pool = open_pool("toy", (1, 8, 8), folder=str(zoo))
    return memory_budget(modelled_peak_bytes(pool, Work(1, GROUP, 0, tuple(range(12)), 0), images))


def fleet(folder: Path, *classes: str) -> str:
    rows = [f'[[class]]\nkind = "c{n}"\nshare = {1 / len(classes)!r}\n{row}\n' for n, row in enumerate(classes)]
    (folder / "fleet.toml").write_text("\n".join(rows))
    return str(folder / "fleet.toml")


def test_devices_too_small_for_any_block_are_left_out(
    tmp_path: Path, zoo: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "flwr")
    own = fleet(tmp_path, f"memory-bytes = {need(zoo, GROUP) - 1}", f"memory-bytes = {need(zoo, GROUP)}")
    run = stitch(tmp_path / "runs", zoo, shared={"fleet": own, "num-server-rounds": 1})
    assert lines(run)[0]["cohort"] == [2, 3]
    assert "2 devices cannot run every block: partitions [0, 1]" in caplog.text


def test_a_fleet_without_room_for_a_block_stops_before_round_1(tmp_path: Path, zoo: Path) -> None:
    own = fleet(tmp_path, f"memory-bytes = {need(zoo, GROUP) - 1}")
    with pytest.raises(ValueError, match="no device can run every block; see memory-bytes of the fleet"):
        stitch(tmp_path / "runs", zoo, shared={"fleet": own})


def test_less_memory_makes_the_batch_smaller_and_changes_no_result(tmp_path: Path, zoo: Path) -> None:
    batches: list[int] = []

    def listen(request: Message, reply: Message, _: int) -> Message:
        if request.metadata.message_type == "train.head":
            batches.append(len(reply.content.array_records["arrays"]["levels"].data))
        return reply

    found = []
    for name, images in (("little", GROUP), ("plenty", 512)):
        (tmp_path / name).mkdir()
        own = fleet(tmp_path / name, f"memory-bytes = {need(zoo, images) + 2e4}")
        shared = {"fleet": own, "num-server-rounds": 1}
        found.append(lines(stitch(tmp_path / name / "runs", zoo, listen, batch_size=256, shared=shared))[0])
    assert all(little > plenty for little, plenty in zip(batches[:CLIENTS], batches[CLIENTS:], strict=True))
    assert found[0]["stitching"]["scores"] == found[1]["stitching"]["scores"]
    assert found[0]["accuracy"] == found[1]["accuracy"]


def test_a_device_whose_memory_is_taken_says_so_and_the_run_goes_on(tmp_path: Path, zoo: Path) -> None:
    spread = need(zoo, 64) - need(zoo, GROUP)
    own = fleet(tmp_path, f"memory-bytes = {need(zoo, 64)}\nmemory-spread-bytes = {spread}")
    run = stitch(tmp_path / "runs", zoo, clients=8, shared={"fleet": own, "num-server-rounds": 3})
    reasons = [told["reason"] for line in lines(run) for told in line["failed"]]
    assert reasons
    assert all("out of memory: the phase needs" in reason for reason in reasons)


def test_a_round_for_which_nobody_has_the_memory_passes(tmp_path: Path, zoo: Path) -> None:
    own = fleet(tmp_path, f"memory-bytes = {2 * need(zoo, GROUP)}\navailability = [0.4, 1.0]")
    run = stitch(tmp_path / "runs", zoo, clients=1, shared={"fleet": own})
    empty = [line for line in lines(run) if not line["cohort"]]
    assert empty
    assert told_depth(run) == 1


def told_depth(run: Path) -> float:
    return float([line["stitching"]["depth"] for line in lines(run) if line["cohort"]][-1])


# --- energy -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fleet_name", ["tiers", "skewed"])
def test_choosing_frequencies_saves_energy_and_no_time(fleet_name: str, tmp_path: Path, zoo: Path) -> None:
    """With q = 1, within the phases that have a deadline; tests of an unknown number of samples take a hair longer."""
    runs = {
        policy: stitch(tmp_path / policy, zoo, clients=6, energy=policy, shared={"fleet": fleet_name})
        for policy in ("on", "max")
    }
    for on, most in zip(lines(runs["on"]), lines(runs["max"]), strict=True):
        assert on["joules"] < most["joules"]
        assert on["modelled-seconds-training"] == pytest.approx(most["modelled-seconds-training"], rel=1e-9)
        assert on["modelled-seconds"] <= 1.2 * most["modelled-seconds"]
        assert on["stitching"] == most["stitching"]
        assert on["stitching"]["missed"] == 0
        assert on["accuracy"] == most["accuracy"]


def test_a_deadline_that_not_all_can_meet_is_missed_or_drops_the_late(tmp_path: Path, zoo: Path) -> None:
    shared = {"fleet": "tiers", "num-server-rounds": 2}
    late = stitch(tmp_path / "late", zoo, clients=6, deadline_share=0.5, shared=shared)
    assert all(line["refused"] == [] and line["stitching"]["missed"] > 0 for line in lines(late))
    dropped = stitch(tmp_path / "dropped", zoo, clients=6, deadline_share=0.5, drop_late=True, shared=shared)
    reasons = [told["reason"] for line in lines(dropped) for told in line["refused"]]
    assert len(reasons) == sum(told(dropped, "missed")) > 0
    assert all("it missed the deadline of" in reason for reason in reasons)
    slack = stitch(tmp_path / "slack", zoo, clients=6, deadline_share=0.5, deadline_slack=1e3, shared=shared)
    assert told(slack, "missed") == [0, 0]


def test_disturbed_devices_are_the_same_for_a_seed_and_remembered(tmp_path: Path, zoo: Path) -> None:
    sent: dict[tuple[int, int], float] = {}
    answered: dict[tuple[int, int], float] = {}

    def listen(request: Message, reply: Message, partition: int) -> Message:
        key = int(request.metadata.group_id or 0), partition
        if request.metadata.message_type == "evaluate.stitched":
            answered[key] = float(reply.content.metric_records["metrics"]["correction"])  # type: ignore[arg-type]
        if request.metadata.message_type == "train.score":
            sent[key] = float(request.content.config_records["config"]["method.correction"])  # type: ignore[arg-type]
        return reply

    shared = {"num-server-rounds": 2}
    runs = [stitch(tmp_path / str(n), zoo, listen, slowdown=0.3, shared=shared) for n in range(2)]
    assert same_run(*runs)
    assert [sent[1, p] for p in range(CLIENTS)] == [1.0] * CLIENTS
    assert [sent[2, p] for p in range(CLIENTS)] == [answered[1, p] for p in range(CLIENTS)]
    assert all(answered[1, p] != 1 for p in range(CLIENTS))
    found = load_checkpoint(runs[0] / "checkpoint")
    assert found is not None
    assert found.state["corrections"] == {str(p): answered[2, p] for p in range(CLIENTS)}
    other = stitch(tmp_path / "other", zoo, shared=shared)
    assert [line["stitching"]["scores"] for line in lines(other)] == told(runs[0], "scores")


def test_who_is_late_and_dropped_has_more_time_in_the_next_phase(tmp_path: Path, zoo: Path) -> None:
    """So that devices slower than modelled do not miss every deadline."""
    with patch("flexfed.methods.fedstitch_client.ModelledClock", lambda *_: _Slow()):
        run = stitch(tmp_path, zoo, clients=1, drop_late=True, feedback=1.0)
    assert told(run, "depth")[-1] == 1
    assert told(run, "missed") == [1] + [0] * (len(lines(run)) - 1)


class _Slow:
    """A clock of a device that is half as fast as its model."""

    def begin(self) -> None:
        pass

    def observe(self, planned_seconds: float) -> float:
        return 2 * planned_seconds


def test_deadlines_are_for_what_clients_do_not_know_yet(tmp_path: Path, zoo: Path) -> None:
    """Behind a bridge nothing is found out of a block's native output, which a second episode may ask for."""
    deadlines: list[tuple[str, float, float]] = []

    def listen(request: Message, reply: Message, partition: int) -> Message:
        kind = request.metadata.message_type
        if kind.startswith("train."):
            limit = float(request.content.config_records["config"]["method.deadline"])  # type: ignore[arg-type]
            seconds = float(reply.content.metric_records["metrics"]["modelled-seconds"])  # type: ignore[arg-type]
            deadlines.append((kind, limit, seconds))
        return reply

    own: dict[str, Any] = {"score": "lookahead", "episodes": 4, "block_temperature": 5.0, "reach": 0.0}
    shared = {"num-server-rounds": 16, "fleet": "equal", "validation-fraction": 0.0}
    run = stitch(tmp_path, zoo, listen, clients=1, energy="max", **own, shared=shared)
    assert told(run, "episode")[-1] == 4
    assert len({path[0] for path in told(run, "path")}) > 1
    for kind, limit, seconds in deadlines:
        assert seconds == pytest.approx(limit, rel=1e-9) or (seconds, limit) == (0, float("inf")), kind


# --- real clocks and meters ---------------------------------------------------------------------------------------


class _Meter:
    """A counter that rises by half a joule between two looks."""

    def joules(self) -> float:
        return 0.5


def test_measured_joules_stand_beside_the_rounds_time_and_not_in_its_line(tmp_path: Path, zoo: Path) -> None:
    batches: list[int] = []

    def listen(request: Message, reply: Message, _: int) -> Message:
        if "arrays" in reply.content and request.metadata.message_type != "query.profile":
            batches.append(len(reply.content.array_records["arrays"]["levels"].data))
        return reply

    ticks = itertools.count()
    with (
        patch("flexfed.methods.fedstitch_client.Rapl", _Meter),
        patch("flexfed.methods.fedstitch_client.WallClock", lambda: WallClock(lambda: float(next(ticks)))),
    ):
        run = stitch(tmp_path, zoo, listen, clock="measured", shared={"num-server-rounds": 1})
    (timing,) = [json.loads(line) for line in (run / "timing.jsonl").read_text().splitlines()]
    assert timing["client-joules"] == 0.5 * sum(batches) > 0
    assert "client-joules" not in lines(run)[0]
    assert lines(run)[0]["modelled-seconds"] > 3, "a second a batch, by this clock"


def _caps(root: Path) -> list[int]:
    return [int(path.read_text()) for path in sorted(root.glob("cpu*/cpufreq/scaling_max_freq"))]


@pytest.mark.parametrize("breaks", [False, True])
def test_clocks_are_set_while_a_phase_runs_and_put_back_even_if_it_breaks(
    breaks: bool, tmp_path: Path, zoo: Path
) -> None:
    _clock(tmp_path / "cpu0/cpufreq", 600000, 2400000, "600000 1200000 2400000")
    during: list[list[int]] = []

    def predict(head: np.ndarray, features: Any) -> Any:
        during.append(_caps(tmp_path))
        if breaks:
            raise RuntimeError("out of luck")
        return actual(head, features)

    def make() -> actuators.Cpufreq:
        made.append(actuators.Cpufreq(tmp_path))
        return made[-1]

    actual, made = phases.predict, list[actuators.Cpufreq]()
    with (
        patch.dict(actuators.ACTUATORS, {"cpufreq": make}),
        patch("flexfed.stitching.phases.predict", predict),
    ):
        shared = {"fleet": "tiers", "num-server-rounds": 1}
        run = stitch(tmp_path / "runs", zoo, actuator="cpufreq", deadline_slack=5.0, shared=shared)
    assert any(found < [2400000] for found in during)
    assert {ghz for actuator in made for level in actuator.applied for ghz in level} <= {0.6, 1.2, 2.4}
    assert _caps(tmp_path) == [2400000]
    assert len(lines(run)[0]["failed"]) == breaks * CLIENTS


# --- fine-tuning ------------------------------------------------------------------------------------------------


def tuned(folder: Path, zoo: Path, alter: Any = None, **values: Any) -> tuple[Path, Path]:
    """The stitched run, and the one that followed it."""
    own = {"path": MIXED, "finetune_rounds": 2, **values}
    last = stitch(folder, zoo, alter, **own)
    (first,) = [run for run in folder.iterdir() if run.name.endswith("fedstitch-" + run.name[-8:])]
    assert first != last
    return first, last


@pytest.mark.parametrize("strategy", ["fedavg", "flexfl", "fedlps"])
def test_the_network_is_fine_tuned_in_a_run_of_its_own(strategy: str, tmp_path: Path, zoo: Path) -> None:
    asked: list[Message] = []
    first, last = tuned(tmp_path, zoo, listener(asked), finetune=strategy)
    assert [line["round"] for line in lines(last)] == [1, 2]
    training = [m for m in asked if m.metadata.message_type == "train"]
    assert training
    for message in training:
        changed = str(message.content.config_records["config"][CHANGED])
        assert f'"strategy": "{strategy}"' in changed
        assert '"model": "stitched:toy:0-5-10-3"' in changed
        assert str(first / "model.safetensors") in changed
    stitching = [m for m in asked if "." in m.metadata.message_type and "query" not in m.metadata.message_type]
    assert not any(CHANGED in m.content.config_records["config"] for m in stitching)
    before, after = load_file(first / "model.safetensors"), load_file(last / "model.safetensors")
    assert all(np.isfinite(array).all() for array in after.values())
    assert before["head.weight"].shape == after["head.weight"].shape
    assert not np.array_equal(before["head.weight"], after["head.weight"])


def test_a_first_round_that_changes_nothing_is_as_good_as_the_stitched_network(tmp_path: Path, zoo: Path) -> None:
    """So the weights are taken over, and the data normalised alike."""
    first, last = tuned(
        tmp_path,
        zoo,
        lambda request, reply, p: failure(request) if request.metadata.message_type == "train" and p else reply,
        finetune="fedavg",
        shared={"learning-rate": 1e-9, "weight-decay": 0.0},
    )
    assert lines(last)[0]["accuracy"] == pytest.approx(lines(first)[-1]["accuracy"], abs=0.06)


@pytest.mark.parametrize("strategy", ["fedavg", "fedlps"])
def test_law_9_the_run_that_follows_goes_on_by_itself(strategy: str, tmp_path: Path, zoo: Path) -> None:
    shared = {"runs-dir": str(tmp_path / "runs")}
    _, last = tuned(tmp_path / "runs", zoo, finetune=strategy, finetune_rounds=3, shared=shared)
    whole = {path.name: path.read_bytes() for path in last.iterdir() if path.is_file()}
    _forget(tmp_path / "runs", tmp_path / "kept")
    save = diary.save_checkpoint

    def kill(path: Path, checkpoint: Any) -> None:
        save(path, checkpoint)
        if checkpoint.server_round == 2 and strategy in path.parent.name:
            raise Killed

    with patch.object(diary, "save_checkpoint", kill), pytest.raises(Killed):
        tuned(tmp_path / "runs", zoo, finetune=strategy, finetune_rounds=3, shared=shared)
    (left,) = [run for run in (tmp_path / "runs").iterdir() if f"-{strategy}-" in run.name]
    assert go_on(left) == left
    for name in ("metrics.jsonl", "model.safetensors"):
        assert (left / name).read_bytes() == whole[name]


def _forget(runs: Path, kept: Path) -> None:
    """Move runs away, so that those of the same second may have their names."""
    runs.rename(kept)
    runs.mkdir()


def test_a_stitched_run_that_was_resumed_is_followed_too(tmp_path: Path, zoo: Path) -> None:
    """Clients of the run that follows keep their state in its folder, not in the one that was resumed."""
    own = {"path": MIXED, "finetune": "fedlps", "finetune_rounds": 2}
    save = diary.save_checkpoint

    def kill(path: Path, checkpoint: Any) -> None:
        save(path, checkpoint)
        if checkpoint.server_round == 2:
            raise Killed

    with patch.object(diary, "save_checkpoint", kill), pytest.raises(Killed):
        stitch(tmp_path, zoo, **own)
    (first,) = tmp_path.iterdir()
    last = go_on(first)
    assert last != first
    assert "-fedlps-" in last.name
    assert list((last / "clients").rglob("*.safetensors"))
    assert all(line["failed"] == [] for line in lines(last))


def test_a_network_that_cannot_be_traced_is_fine_tuned_whole(tmp_path: Path) -> None:
    zoo = write_zoo(tmp_path / "zoo", padded=True)
    runs = tmp_path / "runs"
    padded = {"fedstitch.zoo": "toy-padded"}
    _, last = tuned(runs, zoo, finetune="fedavg", shared=padded)
    assert lines(last)[-1]["trained"] == {"full": CLIENTS}
    own = {"path": MIXED, "finetune": "flexfl", "finetune_rounds": 1, "shared": padded}
    with (
        patch("strategies.stitch_run.refuse_uncut"),
        pytest.raises(ValueError, match=r"the run in .*fedstitch.* is finished and stays, .* cannot be cut.*fedavg"),
    ):
        stitch(tmp_path / "late", zoo, **own)


# --- the mod ----------------------------------------------------------------------------------------------------


def through_the_mod(config: dict[str, Any], run_config: dict[str, Any]) -> dict[str, Any]:
    """The run configuration that the client's functions see."""
    seen: list[Context] = []

    def call(message: Message, context: Context) -> Message:
        seen.append(context)
        return message

    message = as_message(RecordDict({"config": ConfigRecord(config)} if config else {}))
    client_app.with_changes(message, Context(1, 1, {"partition-id": 0}, RecordDict(), run_config), call)  # type: ignore[arg-type]
    assert seen[0].node_config == {"partition-id": 0}
    return dict(seen[0].run_config)


def test_messages_change_the_configuration_of_clients() -> None:
    own = {"strategy": "fedstitch", "seed": 3, "resume": "/runs/stitched"}
    assert through_the_mod({}, own) == own
    assert through_the_mod({"round": 1}, own) == own
    changed = {CHANGED: '{"strategy": "fedavg"}'}
    assert through_the_mod(changed, own) == {"strategy": "fedavg", "seed": 3, "resume": ""}
    follows = {"strategy": "fedavg", "seed": 3, "resume": "/runs/tuned"}
    assert through_the_mod(changed, follows) == follows, "resumed by itself"


def test_every_strategy_that_trains_may_follow() -> None:
    for name in ("fedavg", "flexfl", "heterofl", "fedlps", "autoflip", "compressed", "small", "exclusive"):
        method: Any = Experiment.read({"strategy": "fedstitch", "fedstitch.finetune": name}).method
        assert method.finetune == name


def test_the_toy_zoo_is_one_of_its_own(zoo: Path, tmp_path: Path) -> None:
    """Runs of different zoos differ, those of equal ones do not."""
    shared = {"num-server-rounds": 1}
    same, other = write_zoo(tmp_path / "same"), write_zoo(tmp_path / "other", seed=5)
    runs = [stitch(tmp_path / f"r{n}", folder, shared=shared) for n, folder in enumerate((zoo, same, other))]
    assert same_run(runs[0], runs[1])
    assert not same_run(runs[0], runs[2])
