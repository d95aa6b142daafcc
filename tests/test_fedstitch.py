"""FedStitch's runs: what they leave, and the laws; rounds with faults stand in test_fedstitch_rounds.py."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from flwr.app import Message
from safetensors.numpy import load_file
from test_resume import go_on, killed_run, same_run
from toy import final_model, lines, run_toy, same_bits
from toy_zoo import NUM_BLOCKS, knobs, network, toy_zoos, write_zoo

import server_app
from flexfed.checkpoint import load_checkpoint
from flexfed.data import DataConfig, load_server, normalisation, normalise
from flexfed.flower.messages import from_array
from flexfed.methods.fedstitch import pool_of
from flexfed.stitching.phases import balanced_subset
from flexfed.stitching.saved import load_stitched, read_recipe
from flexfed.training import evaluate

CLIENTS = 4
MIXED = "0-5-10-3"
"""A path with three bridges."""


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_zoo(tmp_path_factory.mktemp("zoo"))


@pytest.fixture(autouse=True)
def _zoos() -> Iterator[None]:
    with toy_zoos(), patch("flexfed.report.curves_png"):
        yield


def stitch(folder: Path, zoo: Path, alter: Any = None, clients: int = CLIENTS, **values: Any) -> Path:
    return run_toy(folder, "fedstitch", knobs(zoo, **values), clients=clients, alter=alter)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, zoo: Path) -> Path:
    """A run with every knob at its default."""
    with toy_zoos():
        return stitch(tmp_path_factory.mktemp("plain"), zoo)


def kinds(asked: list[Message]) -> list[str]:
    return [f"{m.metadata.message_type} {m.metadata.group_id}" for m in asked]


def listener(asked: list[Message]) -> Callable[[Message, Message, int], Message]:
    def listen(request: Message, reply: Message, partition: int) -> Message:
        asked.append(request)
        return reply

    return listen


def summary(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "summary.json").read_text())
    return found


def told(run: Path, key: str) -> list[Any]:
    """A fact of every round's choice."""
    return [line["stitching"][key] for line in lines(run)]


def path_of(run: Path) -> list[int]:
    found: list[int] = told(run, "path")[-1]
    return found


def saved_accuracy(run: Path) -> float:
    """Of the network in the file, on the server's samples, normalised as its recipe says."""
    file = run / "model.safetensors"
    raw = load_server(DataConfig(dataset="digits"))
    return evaluate(load_stitched(file), normalise(raw.test, *read_recipe(file).normalisation)).accuracy


# --- what a run leaves ------------------------------------------------------------------------------------------


def test_a_run_stitches_until_the_network_is_whole(plain: Path) -> None:
    depths = told(plain, "depth")
    assert depths == sorted(set(depths))
    assert depths[-1] == 1
    assert len(lines(plain)) == len(path_of(plain)) <= 4 < 8, "it stops when whole"
    assert [line["round"] for line in lines(plain)] == list(range(1, len(depths) + 1))
    pools = told(plain, "pool")
    assert pools[0] == NUM_BLOCKS
    assert all(before > after for before, after in pairwise(pools))
    assert summary(plain)["model"] == "stitched:toy:" + "-".join(map(str, path_of(plain)))
    assert summary(plain)["rounds"] == len(depths)


def test_a_round_is_told_in_full(plain: Path) -> None:
    """Weights sum to 1, and the first ones are the clients' shares of the samples; rules count what they remove."""
    for line in lines(plain):
        facts = line["stitching"]
        assert sum(facts["weights"].values()) == pytest.approx(1)
        assert len(facts["scores"]) == facts["candidates"]
        assert facts["block"] == facts["path"][-1]
        assert facts["block"] == int(max(facts["scores"], key=facts["scores"].__getitem__))
    sizes = told(plain, "pool")
    removed = [sum(line["stitching"][f"removed-r{rule}"] for rule in (1, 2, 3, 4)) for line in lines(plain)]
    assert [size - gone for size, gone in zip(sizes, removed, strict=True)][:-1] == sizes[1:]
    validation = [line["validation-accuracy"] for line in lines(plain)]
    assert told(plain, "reward") == pytest.approx(np.diff([0.1, *validation]).tolist())


@pytest.mark.parametrize("path", ["", MIXED])
def test_invariants_12_and_14_the_file_is_the_network_that_was_tested(path: str, tmp_path: Path, zoo: Path) -> None:
    before = {file.name: sha256(file.read_bytes()).hexdigest() for file in zoo.iterdir()}
    run = stitch(tmp_path, zoo, path=path)
    assert saved_accuracy(run) == lines(run)[-1]["accuracy"] == summary(run)["final"]["accuracy"]
    found = load_file(run / "model.safetensors")
    for position, block in enumerate(path_of(run), start=1):
        name, stage = ("ash", "birch", "cedar")[block // 4], f"stage{block % 4 + 1}"
        for key, array in load_file(zoo / f"{name}.safetensors").items():
            if key.startswith(stage):
                assert same_bits({"": found[f"block{position}.{key}"]}, {"": array})
    assert {file.name: sha256(file.read_bytes()).hexdigest() for file in zoo.iterdir()} == before
    assert not network("ash").state_dict().keys() & found.keys()


def test_invariant_4_a_path_of_one_source_is_that_source_without_bridges(tmp_path: Path, zoo: Path) -> None:
    asked: list[Message] = []
    run = stitch(tmp_path, zoo, listener(asked), path="4-5-6-7")
    assert not [kind for kind in kinds(asked) if "score" in kind or "stitch " in kind]
    assert not [name for name in final_model(run) if "bridge" in name]
    own = load_file(zoo / "birch.safetensors")
    blocks = {n.partition(".")[2]: a for n, a in load_file(run / "model.safetensors").items() if n.startswith("block")}
    assert same_bits(blocks, {name: array for name, array in own.items() if name.startswith("stage")})


def test_fewer_rounds_leave_a_part_that_can_be_loaded_and_gone_on_with(tmp_path: Path, zoo: Path, plain: Path) -> None:
    run = stitch(tmp_path, zoo, shared={"num-server-rounds": 2})
    assert told(run, "depth")[-1] < 1
    assert lines(run) == lines(plain)[:2]
    assert saved_accuracy(run) == lines(run)[-1]["accuracy"]
    assert go_on(run, {"num-server-rounds": 8}) == run
    assert same_run(run, plain)


def test_the_run_ends_when_it_is_good_enough(tmp_path: Path, zoo: Path, plain: Path) -> None:
    run = stitch(tmp_path, zoo, shared={"stop-at-accuracy": lines(plain)[0]["accuracy"]})
    assert lines(run) == lines(plain)[:1]


# --- the same again (law 8, invariant 11) -----------------------------------------------------------------------


def test_law_8_the_same_seed_gives_the_same_bytes(tmp_path: Path, zoo: Path, plain: Path) -> None:
    assert same_run(stitch(tmp_path / "same", zoo), plain)
    other = stitch(tmp_path / "other", zoo, shared={"seed": 2})
    assert lines(other)[0]["stitching"]["scores"] != lines(plain)[0]["stitching"]["scores"]


def test_clients_score_on_the_same_samples_in_every_round(tmp_path: Path, zoo: Path) -> None:
    seen: list[tuple[int, ...]] = []

    def subset(*args: Any) -> np.ndarray:
        seen.append(tuple(balanced_subset(*args).tolist()))
        return np.array(seen[-1])

    with patch("flexfed.methods.fedstitch_client.balanced_subset", subset):
        run = stitch(tmp_path, zoo, shared={"num-server-rounds": 2})
    assert len(lines(run)) == 2
    assert seen[:CLIENTS] == seen[CLIENTS:]
    assert len(set(seen)) == CLIENTS


@pytest.mark.parametrize("batch", [1, 16, 1000])
def test_invariant_11_the_batch_changes_no_score(batch: int, tmp_path: Path, zoo: Path, plain: Path) -> None:
    run = stitch(tmp_path, zoo, batch_size=batch)
    assert [line["stitching"] for line in lines(run)] == [line["stitching"] for line in lines(plain)]
    assert [line["accuracy"] for line in lines(run)] == [line["accuracy"] for line in lines(plain)]


def test_law_8_run_in_process_with_a_cohort(tmp_path: Path, zoo: Path) -> None:
    shared = {"strategy": "fedstitch", "runs-dir": str(tmp_path), "fraction-train": 0.5}
    runs = [server_app.run_in_process(knobs(zoo, shared=shared), 6, f"{n:08d}") for n in range(2)]
    assert same_run(*runs)
    assert [len(line["cohort"]) for line in lines(runs[0])] == [3] * len(lines(runs[0]))
    assert len({tuple(line["cohort"]) for line in lines(runs[0])}) > 1


# --- law 9: killed and resumed ----------------------------------------------------------------------------------

EXPLORED: dict[str, Any] = {"episodes": 2, "block_temperature": 5.0, "shared": {"num-server-rounds": 12}}
RUNS: dict[str, dict[str, Any]] = {
    "plain": {},
    "fixed": {"path": MIXED},
    "random": {"path": "random"},
    "episodes": EXPLORED,
    "linear, disturbed": {"policy": "linear", "slowdown": 0.5, "shared": {"fraction-train": 0.5}},
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, zoo: Path) -> Callable[[str], Path]:
    """A run that nobody killed."""
    found: dict[str, Path] = {}

    def get(case: str) -> Path:
        if case not in found:
            found[case] = stitch(tmp_path_factory.mktemp("whole"), zoo, **RUNS[case])
        return found[case]

    return get


@pytest.mark.parametrize("case", list(RUNS))
@pytest.mark.parametrize(("where", "server_round"), [("before its checkpoint", 2), ("after it", 3)])
def test_law_9_killed_and_resumed_is_never_killed(
    case: str, where: str, server_round: int, tmp_path: Path, zoo: Path, whole: Callable[[str], Path]
) -> None:
    left = killed_run(tmp_path, {"strategy": "fedstitch", **knobs(zoo, **RUNS[case])}, where, server_round)
    assert go_on(left) == left
    assert same_run(left, whole(case))


@pytest.mark.parametrize("nth", [1, -2, -1])
def test_law_9_between_episodes_and_after_the_last_round(
    nth: int, tmp_path: Path, zoo: Path, whole: Callable[[str], Path]
) -> None:
    """In front of the first round of episode 2, in front of the last one, and behind it."""
    ends = [number for number, depth in enumerate(told(whole("episodes"), "depth"), start=1) if depth == 1]
    server_round = ends[0] if nth == 1 else len(lines(whole("episodes"))) + 1 + nth
    values = {"strategy": "fedstitch", **knobs(zoo, **EXPLORED)}
    left = killed_run(tmp_path, values, "after it", server_round)
    go_on(left)
    assert same_run(left, whole("episodes"))


def test_a_finished_run_only_shows_its_result(plain: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = {path: path.stat().st_mtime_ns for path in plain.rglob("*")}
    with caplog.at_level(logging.INFO, "flwr"):
        assert go_on(plain) == plain
    assert "accuracy" in caplog.text
    assert {path: path.stat().st_mtime_ns for path in plain.rglob("*")} == before


def test_another_zoo_is_refused(tmp_path: Path) -> None:
    zoo = write_zoo(tmp_path / "zoo")
    run = stitch(tmp_path / "runs", zoo, shared={"num-server-rounds": 1})
    write_zoo(zoo, seed=1)
    pool_of.cache_clear()
    with pytest.raises(ValueError, match="the run had other blocks: its zoo 'toy' has changed; start the run anew"):
        go_on(run, {"num-server-rounds": 2})


def test_a_device_with_other_weights_says_so(tmp_path: Path, zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = pool_of.__wrapped__(_config(write_zoo(tmp_path / "other", seed=1)), (1, 8, 8))
    monkeypatch.setattr("flexfed.methods.fedstitch_client.pool_of", lambda *_: other)
    with pytest.raises(RuntimeError, match=r"no valid reply .* this device's zoo 'toy' holds other blocks \(digest"):
        stitch(tmp_path / "runs", zoo)


def _config(folder: Path) -> Any:
    from flexfed.config import Experiment

    return Experiment.read({"strategy": "fedstitch", **knobs(folder)}).method


# --- clients with little to say ---------------------------------------------------------------------------------


def test_clients_of_one_class_score_0_and_the_smallest_id_wins(tmp_path: Path, zoo: Path) -> None:
    shared = {"partition": "pathological", "classes-per-client": 1, "num-server-rounds": 2}
    run = stitch(tmp_path, zoo, clients=5, shared=shared)
    assert told(run, "scores")[0] == {"0": 0, "4": 0, "8": 0}
    assert told(run, "block")[0] == 0
    first, second = told(run, "weights")
    assert first == pytest.approx(second), "they said nothing, so nothing is learned"


def test_clients_with_one_sample_each(tmp_path: Path, zoo: Path, caplog: pytest.LogCaptureFixture) -> None:
    shared = {"partition": "shards", "shard-size": 1, "shards-per-client": 1}
    run = stitch(tmp_path, zoo, clients=3, shared=shared)
    assert "round 1: no validation samples; nothing is learned of the weights" in caplog.text
    assert told(run, "depth")[-1] == 1
    assert set(told(run, "reward")) == {0}
    assert all(line["refused"] == line["failed"] == [] for line in lines(run))


def test_without_validation_samples_nothing_is_learned(tmp_path: Path, zoo: Path, plain: Path) -> None:
    run = stitch(tmp_path, zoo, shared={"validation-fraction": 0.0})
    assert set(told(run, "reward")) == {0}
    assert not any("validation-accuracy" in line for line in lines(run))
    weights = [list(found.values()) for found in told(run, "weights")]
    np.testing.assert_allclose(weights, [weights[0]] * len(weights))
    assert any(told(plain, "weights")[0] != found for found in told(plain, "weights"))


# --- which blocks are scored ------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [MIXED, "random"])
def test_paths_that_are_not_chosen_are_not_scored(path: str, tmp_path: Path, zoo: Path) -> None:
    asked: list[Message] = []
    run = stitch(tmp_path, zoo, listener(asked), path=path)
    assert not [kind for kind in kinds(asked) if "score" in kind]
    assert told(run, "depth")[-1] == 1
    if path == MIXED:
        assert path_of(run) == [0, 5, 10, 3]
    else:
        paths = {tuple(path_of(stitch(tmp_path / str(n), zoo, path=path, shared={"seed": n}))) for n in range(2, 5)}
        assert len({tuple(path_of(run)), *paths}) > 1


def test_one_candidate_is_not_scored(tmp_path: Path, zoo: Path) -> None:
    """Of one source there is one start block."""
    asked: list[Message] = []
    run = stitch(tmp_path, zoo, listener(asked), sources="cedar")
    assert not [kind for kind in kinds(asked) if kind == "train.score 1"]
    assert [kind for kind in kinds(asked) if kind == "train.score 2"]
    assert told(run, "scores")[0] == told(run, "weights")[0] == {}
    assert told(run, "candidates")[:2] == [1, 2]
    assert told(run, "reward")[0] != 0


def test_the_last_round_there_may_be_takes_blocks_that_end_a_source(tmp_path: Path, zoo: Path) -> None:
    run = stitch(tmp_path, zoo, max_blocks=2)
    assert [len(path_of(run)), told(run, "depth")[-1]] == [2, 1]
    assert sorted(told(run, "scores")[1]) == ["11", "3", "7"]


def test_native_successors_can_be_excluded(tmp_path: Path, zoo: Path) -> None:
    run = stitch(tmp_path, zoo, native_policy="exclude")
    found = path_of(run)
    assert not [a for a, b in pairwise(found) if b == a + 1 and b % 4]


def test_without_the_search_space_only_what_is_out_of_reach_goes(tmp_path: Path, zoo: Path) -> None:
    run = stitch(tmp_path, zoo, search_space=False)
    assert set(told(run, "removed-r3")) == set(told(run, "removed-r4")) == {0}


# --- whose word counts ------------------------------------------------------------------------------------------


def test_weights_differ_by_their_rule(tmp_path: Path, zoo: Path) -> None:
    runs = {rule: stitch(tmp_path / rule, zoo, weights=rule) for rule in ("rl", "samples", "uniform")}
    found = {rule: told(run, "weights") for rule, run in runs.items()}
    assert found["rl"][0] == pytest.approx(found["samples"][0])
    assert found["rl"][1] != pytest.approx(found["samples"][1])
    assert found["samples"][1] == found["samples"][0]
    assert set(found["uniform"][0].values()) == {0.25}


def test_votes_count_favourites(tmp_path: Path, zoo: Path) -> None:
    """The block with the most weight behind it, by what clients answered."""
    scores: dict[tuple[int, int], np.ndarray] = {}

    def listen(request: Message, reply: Message, partition: int) -> Message:
        if request.metadata.message_type == "train.score":
            array = reply.content.array_records["arrays"]["scores"]
            scores[int(request.metadata.group_id), partition] = np.frombuffer(array.data)
        return reply

    run = stitch(tmp_path, zoo, listen, aggregate="vote")
    for line in lines(run):
        facts = line["stitching"]
        votes = dict.fromkeys(sorted(map(int, facts["scores"])), 0.0)
        for partition, weight in facts["weights"].items():
            own = scores[line["round"], int(partition)]
            votes[list(votes)[int(own.argmax())]] += weight
        assert votes[facts["block"]] == max(votes.values())


def test_episodes_explore_remember_and_end_greedily(whole: Callable[[str], Path], plain: Path) -> None:
    run = whole("episodes")
    episodes = told(run, "episode")
    assert set(episodes) == {1, 2}
    second = episodes.index(2)
    assert told(run, "weights")[second] != pytest.approx(told(run, "weights")[0]), "what was learned stays"
    assert told(run, "pool")[second] == NUM_BLOCKS, "the pool is whole again"
    for line in lines(run)[second:]:
        scores = line["stitching"]["scores"]
        assert line["stitching"]["block"] == int(max(scores, key=scores.__getitem__))
    assert summary(run)["path"] == [
        f"{('ash', 'birch', 'cedar')[block // 4]}.{block % 4 + 1}" for block in path_of(run)
    ]
    assert saved_accuracy(run) == lines(run)[-1]["accuracy"]
    found = load_checkpoint(run / "checkpoint")
    assert found is not None
    assert found.state["votes/baseline"].item() != 0
    assert told(run, "path")[: len(path_of(plain))] != told(plain, "path"), "another block was drawn"


def test_a_run_that_ends_within_an_episode_leaves_the_last_whole_network(
    tmp_path: Path, zoo: Path, whole: Callable[[str], Path]
) -> None:
    """And reports that one's accuracy."""
    ends = told(whole("episodes"), "depth").index(1) + 1
    run = stitch(tmp_path, zoo, **{**EXPLORED, "shared": {"num-server-rounds": ends + 1}})
    assert told(run, "depth")[-1] < 1
    assert len(summary(run)["path"]) == len(told(run, "path")[ends - 1])
    assert saved_accuracy(run) == lines(run)[-1]["accuracy"] == lines(run)[-2]["accuracy"]


def test_other_rewards_and_scores_run(tmp_path: Path, zoo: Path) -> None:
    favor = stitch(tmp_path / "favor", zoo, reward="favor", target_accuracy=0.5)
    accuracy = lines(favor)[0]["validation-accuracy"]
    assert told(favor, "reward")[0] == pytest.approx(64 ** (accuracy - 0.5) - 1)
    ahead = stitch(tmp_path / "ahead", zoo, score="lookahead")
    assert told(ahead, "depth")[-1] == 1


def test_the_finished_networks_head_may_follow_from_all_clients(tmp_path: Path, zoo: Path) -> None:
    """The last one; those before it follow from their cohorts."""
    sums: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = {}

    def listen(request: Message, reply: Message, partition: int) -> Message:
        if request.metadata.message_type == "train.head":
            found = reply.content.array_records["arrays"]
            sums[int(request.metadata.group_id), partition] = from_array(found["gram"]), from_array(found["cross"])
        return reply

    shared = {"fraction-train": 0.5}
    run = stitch(tmp_path, zoo, listen, clients=6, path=MIXED, last_head="all", shared=shared)
    asked = {number: sorted(p for r, p in sums if r == number) for number in range(1, 5)}
    assert [asked[number] for number in (1, 2, 3)] == [line["cohort"] for line in lines(run)[:3]]
    assert asked[4] == list(range(6))
    assert len(lines(run)[3]["cohort"]) == 3
    gram, cross = (sum(sums[4, partition][n] for partition in range(6)) for n in (0, 1))
    theta = np.linalg.solve(gram + 0.01 * gram[-1, -1] * np.eye(len(gram)), cross)
    np.testing.assert_allclose(final_model(run)["head.weight"], theta[:-1].T, rtol=1e-4, atol=1e-6)


def test_data_are_normalised_as_the_server_does(plain: Path) -> None:
    raw = load_server(DataConfig(dataset="digits"))
    mean, deviation = read_recipe(plain / "model.safetensors").normalisation
    assert (tuple(mean), tuple(deviation)) == normalisation(raw.proxy)
