"""Configuration as people write it."""

from pathlib import Path

import pytest

from flexfed.overrides import (
    check_known,
    defaults,
    head_supernodes,
    near_matches,
    parse_overrides,
    resolve_paths,
    with_resumed,
)

KNOWN = {
    "strategy": "flexfl",
    "seed": 1,
    "learning-rate": 0.1,
    "drop-last": True,
    "runs-dir": "~/.flexfed/runs",
    "fleet": "skewed",
    "weights": "",
    "dataset": "digits",
    "flexfl.kd-weight": -1.0,
    "flexfl.targets": "0.25, 0.5",
}


def test_pairs_are_toml(tmp_path):
    text = "strategy='heterofl' seed=2 learning-rate=1 drop-last=false flexfl.targets=\"0.1, 0.2\""
    assert parse_overrides([text], KNOWN) == {
        "strategy": "heterofl",
        "seed": 2,
        "learning-rate": 1,
        "drop-last": False,
        "flexfl.targets": "0.1, 0.2",
    }


def test_files_and_pairs_mix_and_the_later_wins(tmp_path):
    (tmp_path / "x.toml").write_text('seed = 5\nstrategy = "small"\n[flexfl]\nkd-weight = 3\n')
    values = parse_overrides(["x.toml", "seed=6"], KNOWN, tmp_path)
    assert values == {"seed": 6, "strategy": "small", "flexfl.kd-weight": 3}
    assert parse_overrides(["seed=6", str(tmp_path / "x.toml")], KNOWN)["seed"] == 5
    assert parse_overrides([], KNOWN) == {}


def test_the_pairs_agree_with_flower():
    config = pytest.importorskip("flwr.common.config")
    text = "strategy='heterofl' seed=2 flexfl.kd-weight=0.5 drop-last=false"
    assert parse_overrides([text], KNOWN) == config.parse_config_args([text])


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("strategy=flexfl", r"strings need quotes: -c \"strategy='flexfl'\""),
        ("seed = 2", 'without spaces around "="'),
        ("seed", "expected key=value pairs"),
        ("seed=1 seed=2", "seed is given twice in the configuration"),
        ("sed=2", r"unknown configuration key 'sed'; did you mean seed\?"),
        ("kd_weight=2", r"did you mean flexfl\.kd-weight\?"),
        ("xyzzy=2", r"see \[tool\.flwr\.app\.config\]"),
        ("seed='2'", r"seed must be a number \(its default is 1\), got text: '2'"),
        ("drop-last=1", "drop-last must be true or false"),
        ("strategy=3", "strategy must be text"),
        ("missing.toml", "no such file"),
    ],
)
def test_errors_say_what_to_do(text, match, tmp_path):
    with pytest.raises(ValueError, match=match):
        parse_overrides([text], KNOWN, tmp_path)


def test_a_broken_file_is_named(tmp_path):
    (tmp_path / "x.toml").write_text("seed = ")
    with pytest.raises(ValueError, match=r"x\.toml is not valid TOML"):
        parse_overrides(["x.toml"], KNOWN, tmp_path)


def test_relative_paths_start_where_they_are_written(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "x.toml").write_text('runs-dir = "runs"\n')
    assert parse_overrides(["deep/x.toml"], KNOWN, tmp_path) == {"runs-dir": str(tmp_path / "deep" / "runs")}
    assert parse_overrides(["runs-dir='runs'"], KNOWN, tmp_path) == {"runs-dir": str(tmp_path / "runs")}


def test_only_paths_are_resolved(tmp_path):
    values = {
        "runs-dir": "~/runs",
        "fleet": "skewed",
        "weights": "torchvision",
        "dataset": "some/hub-name",
        "flexfl.targets": ".25, .5",
        "seed": 1,
    }
    assert resolve_paths(values, tmp_path) == values
    paths = {"fleet": "mine.toml", "weights": "a/b.safetensors", "dataset": "./photos", "state-dir": "s"}
    expected = {key: str((tmp_path / value).resolve()) for key, value in paths.items()}
    assert resolve_paths(paths, tmp_path) == expected
    assert resolve_paths({"runs-dir": "/x"}, tmp_path) == {"runs-dir": "/x"}


def test_near_matches_know_hyphens_and_method_keys():
    assert near_matches("learning_rate", KNOWN) == ["learning-rate"]
    assert near_matches("targets", KNOWN)[0] == "flexfl.targets"
    assert near_matches("qqqq", KNOWN) == []


def test_whole_and_fractional_numbers_are_one_kind():
    check_known({"learning-rate": 1, "seed": 2}, KNOWN)


def test_defaults_are_flat(tmp_path):
    (tmp_path / "pyproject.toml").write_text("[tool.flwr.app.config]\nseed = 1\n[tool.flwr.app.config.flexfl]\nx = 2\n")
    assert defaults(tmp_path) == {"seed": 1, "flexfl.x": 2}


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("sed = 2", r"^x\.toml: unknown configuration key 'sed'; did you mean seed"),
        ("seed = '2'", r"^x\.toml: seed must be a number"),
        ("seed = [2]", r"^x\.toml: seed must be text, a number"),
        ("seed = 1\nlearning-rate = 1\nseed = 2\nstrategy = 'x'\n", "; seed is given twice"),
        ("learning-rate = 1\nseed = 1\nseed = 2\n", "; seed is given twice"),
        ("learning-rate = 1\nseed = 1\nseed = 2", "; seed is given twice"),
    ],
)
def test_mistakes_in_a_file_are_named(text, match, tmp_path):
    (tmp_path / "x.toml").write_text(text)
    with pytest.raises(ValueError, match=match):
        parse_overrides(["x.toml"], KNOWN, tmp_path)


def test_the_head_of_a_file_says_how_many_devices(tmp_path):
    (tmp_path / "a.toml").write_text("# An experiment.\n\n# supernodes = 100\nseed = 1\n")
    (tmp_path / "b.toml").write_text("seed = 1\n# supernodes = 7\n")
    (tmp_path / "c.toml").write_text("# supernodes = many\n")
    assert head_supernodes(["a.toml", "seed=2", "b.toml"], tmp_path) == 100
    assert head_supernodes(["b.toml", "seed=2"], tmp_path) is None
    with pytest.raises(ValueError, match=r"c\.toml: supernodes must be a whole number >= 1, got 'many'"):
        head_supernodes(["c.toml"], tmp_path)


# --- resume -----------------------------------------------------------------------------------------------------


def test_a_resumed_run_brings_its_own_configuration(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text('# supernodes = 7\nseed = 3\nresume = ""\n[flexfl]\nkd-weight = 2.0\n')
    resume = str(tmp_path)
    assert with_resumed({"seed": 5}) == {"seed": 5}
    assert with_resumed({"resume": ""}) == {"resume": ""}
    assert with_resumed({"resume": resume}) == {"seed": 3, "flexfl.kd-weight": 2.0, "resume": resume}
    assert with_resumed({"resume": resume, "seed": 4})["seed"] == 4  # said outright: the run will refuse it
    with pytest.raises(ValueError, match=r"no such file: .*nowhere.config\.toml"):
        with_resumed({"resume": str(tmp_path / "nowhere")})


def test_resume_is_a_path(tmp_path: Path) -> None:
    known = {"resume": "", "seed": 1}
    assert parse_overrides(["resume='runs/one'"], known, tmp_path) == {"resume": str(tmp_path / "runs" / "one")}
    assert parse_overrides(["resume='~/one'"], known, tmp_path) == {"resume": "~/one"}
