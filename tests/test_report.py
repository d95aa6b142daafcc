"""What people see of a run: lines, the final table, the picture, events."""

from pathlib import Path

import pytest

from flexfed.curves import curves
from flexfed.report import (
    curves_png,
    duration,
    final_table,
    level_names,
    percent,
    points,
    round_line,
    scaled,
)
from flexfed.runs import Run, summarise

ROUNDS = [
    {
        "round": k,
        "cohort": [1, 3, 5],
        "trained": {"L": 1, "S": 2},
        "accuracy": 0.5 + k / 10,
        "accuracy-S": 0.4 + k / 10,
        "accuracy-L": 0.5 + k / 10,
        "accuracy-levels": 0.45 + k / 10,
        "accuracy-worst-tenth": 0.25,
        "loss": 1.0,
        "bytes-down": 2_000_000,
        "bytes-up": 1_000_000,
        "macs": 3_000_000_000,
        "modelled-seconds": 30.0,
        "joules": 1500.0,
        "refused": [],
        "failed": [],
    }
    for k in (1, 2, 3)
]
FACTS = {"strategy": "flexfl", "model": "cnn", "dataset": "digits", "seed": 1, "wall-seconds": 4.0}


def test_round_line_says_all_of_it():
    line = round_line({**ROUNDS[0], "failed": [{}]}, 30, 2.34, 400)
    assert line == (
        "round  1/30  cohort  3  S:2 L:1  accuracy 60.0 %  loss 1.000  worst tenth 25.0 %  failed 1  2.3 s  7 min left"
    )


def test_round_line_of_an_empty_round():
    assert round_line({"round": 2, "cohort": []}, 5, 0.1) == "round 2/5  cohort  0  accuracy      -  loss -  100 ms"
    assert "loss 0.700" in round_line({"round": 2, "train-loss": 0.7}, 5, 0.1)
    assert "loss -" in round_line({"round": 2, "loss": None}, 5, 0.1)


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0 B"), (999, "999 B"), (12345678, "12.3 MB"), (1_000_000, "1 MB"), (999_600, "1.00 MB"), (1.5e18, "1500 PB")],
)
def test_scaled(number, text):
    assert scaled(number, "B") == text


def test_small_formats():
    assert [duration(x) for x in (4.24, 45, 720, 12600)] == ["4.2 s", "45 s", "12 min", "3.5 h"]
    assert [duration(x) for x in (0.302, 0.00424, 0.0, 0.999)] == ["302 ms", "4.24 ms", "0.0 s", "1.0 s"]
    assert [percent(0.9125), percent(None), points(-0.021), points(None)] == ["91.2 %", "-", "-2.1", "-"]
    assert [duration(None), scaled(None)] == ["-", "-"]


def test_levels_are_in_order_of_size():
    names = ["accuracy", "accuracy-L", "accuracy-M-", "accuracy-S", "accuracy-M", "accuracy-levels", "loss"]
    assert level_names(names) == ["S", "M-", "M", "L"]
    assert level_names(["accuracy-a", "accuracy-c", "accuracy-b", "accuracy-personal"]) == ["c", "b", "a"]


def test_final_table_alone():
    table = final_table(summarise(ROUNDS, FACTS), ROUNDS, path=Path("/runs/x"))
    assert "flexfl · digits · cnn · seed 1 · 3 rounds" in table
    assert table.splitlines()[-1] == "run folder: /runs/x"
    row = next(line for line in table.splitlines() if line.startswith("level S"))
    assert row.split() == ["level", "S", "70.0", "%", "60.0", "%", "70.0", "%"]
    assert "sent to devices" in table
    assert "6 MB" in table
    assert "left out" not in table
    assert "measured client time" not in table, "a run of older code has none"
    measured = final_table(summarise(ROUNDS, {**FACTS, "client-seconds": 45.0}), ROUNDS)
    line = next(line for line in measured.splitlines() if line.startswith("measured client"))
    assert line.split()[-2:] == ["45", "s"]


def other(**facts):
    metrics = {"accuracy": 0.65, "accuracy-worst-tenth": 0.9, "bytes-down": 9_000_000}
    summary = summarise([{"round": 1, **metrics}], {"clients": 20, "clients-testing": 2, **facts})
    return Run(Path("o"), {"strategy": "exclusive"}, [], {}, summary)


def test_final_table_against_weak_devices_left_out():
    table = final_table(summarise(ROUNDS, FACTS), ROUNDS, other())
    assert "left out" in table
    whole = next(line for line in table.splitlines() if line.startswith("largest"))
    assert whole.split()[-3:] == ["65.0", "%", "+5.0"]
    level = next(line for line in table.splitlines() if line.startswith("level S"))
    assert level.split()[-2:] == ["-", "-"]
    # It tests only the devices that it did not leave out, so its worst tenth is another one.
    worst = next(line for line in table.splitlines() if line.startswith("worst"))
    assert worst.split()[-2:] == ["-", "-"]
    assert next(line for line in table.splitlines() if line.startswith("sent to")).split()[-2:] == ["9", "MB"]


def test_final_table_fits_and_ignores_the_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "30")
    monkeypatch.setenv("FORCE_COLOR", "1")
    table = final_table(summarise(ROUNDS, FACTS), ROUNDS, other())
    assert max(map(len, table.splitlines())) <= 100
    assert "\x1b" not in table


def lines_of(rounds, **facts):
    return [" ".join(line.split()) for line in final_table(summarise(rounds, {**FACTS, **facts}), rounds).splitlines()]


PERSONAL = {
    "clients-personal": 4,
    "accuracy-personal": 0.71,
    "accuracy-personal-worst-tenth": 0.31,
    "accuracy-personal-weak": 0.61,
    "accuracy-personal-0.25": 0.51,
    "modelled-seconds-training": 20.0,
}


def test_personal_models_are_rows_and_no_levels():
    rounds = [{**line, **PERSONAL} for line in ROUNDS]
    assert level_names(rounds[0]) == ["S", "L"]
    lines = lines_of(rounds)
    assert any(line.startswith("personal models 71.0 % 71.0 % 71.0 %") for line in lines)
    assert not any(line.startswith(("level personal", "level 0.25", "level weak")) for line in lines)
    assert any(line.startswith("level S 70.0 %") for line in lines)
    assert any(line.startswith("of it, training 60 s") for line in lines)
    assert not any(line.startswith("personal") for line in lines_of(ROUNDS))
    assert [curve.label for curve in curves(rounds)][:2] == ["level S", "level L"]


def test_exits_of_the_largest_level_are_rows_in_the_order_of_depth():
    exits = {f"exit-accuracy-{level}-{exit}": exit / 100 for level in "LS" for exit in range(1, 12)}
    rounds = [{**line, **exits} for line in ROUNDS]
    assert level_names(rounds[0]) == ["S", "L"]
    rows = [line for line in lines_of(rounds) if " exit " in line]
    assert rows == [f"level L, exit {n} {n}.0 % {n}.0 % {n}.0 %" for n in range(1, 12)]


def test_rows_of_personal_models_follow_the_means():
    lines = lines_of([{**line, **PERSONAL} for line in ROUNDS])
    rows = [line.split(" %")[0].rsplit(" ", 1)[0] for line in lines if line.count(" %") == 3]
    assert rows[:3] == ["largest model reported", "level S", "level L"]
    assert rows[-4:] == ["personal models", "worst tenth of them", "personal, 0.25", "personal, weak"]


def test_round_lines_do_not_mind_personal_models():
    assert round_line({**ROUNDS[0], **PERSONAL}, 30, 2.34) == round_line(ROUNDS[0], 30, 2.34)
    ratios = {"0.50": 1, "0.75": 2, "0.9": 1}
    line = round_line({"round": 1, "cohort": [0, 1, 2, 3], "trained": ratios, **PERSONAL}, 5, 0.1)
    assert "0.9:1 0.75:2 0.50:1" in line


def test_final_table_says_which_model_and_how_large():
    lines = lines_of(ROUNDS, parameters=57706)
    assert "flexfl · digits · cnn · seed 1 · 3 rounds · 57,706 parameters" in lines
    assert any(line.startswith("largest model reported 80.0 %") for line in lines)
    assert any(line.startswith("mean over the levels 75.0 %") for line in lines)
    assert any(
        line.startswith("mean of S, M, L 75.0 %") for line in lines_of(ROUNDS, **{"headline-levels": list("SML")})
    )


def test_one_level_makes_one_row():
    rounds = [{"round": 1, "accuracy": 0.5, "accuracy-S": 0.5, "accuracy-levels": 0.5}]
    assert not [line for line in lines_of(rounds) if line.startswith(("level S", "mean over"))]
    other_numbers = [{**rounds[0], "accuracy-S": 0.25}]
    assert any(line.startswith("level S 25.0 %") for line in lines_of(other_numbers))


def test_the_mean_says_over_how_many_rounds():
    rounds = [{"round": k, "accuracy": 0.5} for k in range(1, 11)]
    assert "accuracy final all best" in lines_of(rounds[:9])
    assert "accuracy final last 10 best" in lines_of(rounds)


def test_final_table_of_a_run_without_rounds():
    assert "0 rounds" in final_table(summarise([], FACTS), [])


# --- picture ------------------------------------------------------------------------------------------------


def test_curves_hold_levels_by_size_and_drop_the_double():
    found = curves(ROUNDS)
    assert [curve.label for curve in found] == ["level S", "level L"]
    assert found[0].sent == (3e6, 6e6, 9e6)
    assert found[0].values == pytest.approx((50, 60, 70))


def test_curves_keep_a_full_model_of_its_own_and_count_bytes_of_rounds_without_evaluation():
    rounds = [{"round": 1, "bytes-up": 5}, {"round": 2, "bytes-up": 5, "accuracy": 0.5, "accuracy-S": None}]
    (whole,) = curves(rounds)
    assert (whole.label, whole.rounds, whole.sent) == ("full model", (2,), (10,))


@pytest.mark.parametrize("rounds", [[], ROUNDS[:1], ROUNDS, [{"round": 1}]], ids=["none", "one", "three", "empty"])
def test_curves_png_is_a_picture(tmp_path, rounds):
    curves_png(rounds, tmp_path / "curves.png", "title")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["curves.png"]


def test_curves_png_leaves_pyplot_alone(tmp_path):
    from matplotlib import pyplot

    curves_png(ROUNDS, tmp_path / "curves.png", "title")
    assert pyplot.get_fignums() == []
