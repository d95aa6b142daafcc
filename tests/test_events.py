"""TensorBoard events: their groups, and that a run needs no TensorBoard."""

import builtins
from importlib.util import find_spec

import pytest

from flexfed.events import EventWriter


def test_nothing_happens_without_tensorboard(tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("torch.utils.tensorboard"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    writer = EventWriter(tmp_path)
    writer.add({"round": 1, "accuracy": 0.5})
    writer.close()
    writer.close()
    assert list(tmp_path.iterdir()) == []


def test_they_hold_the_numbers_in_groups():
    class Recorder:
        def __init__(self, folder):
            self.scalars = []

        def add_scalar(self, key, value, step):
            self.scalars.append((key, value, step))

        def flush(self):
            pass

    writer = EventWriter.__new__(EventWriter)
    writer._writer = Recorder("x")
    told = {"accuracy-a": 0.1, "accuracy-clients": 0.2, "clients-accuracy-weak": 0.3, "accuracy-personal-0.5": 0.4}
    more = {"exit-accuracy-a-1": 0.6, "bytes-up": 7, "train-loss": 0.8, "trained": {"a": 9}, "void": True}
    writer.add({"round": 3, "accuracy": 0.5, "cohort": [1], "loss": None, **told, **more})
    assert writer._writer.scalars == [
        ("accuracy/largest", 0.5, 3),
        ("level/a", 0.1, 3),
        ("accuracy/clients", 0.2, 3),
        ("clients/weak", 0.3, 3),
        ("personal/0.5", 0.4, 3),
        ("exit/a-1", 0.6, 3),
        ("cost/bytes-up", 7, 3),
        ("train-loss", 0.8, 3),
        ("trained/a", 9, 3),
    ]


@pytest.mark.skipif(find_spec("tensorboard") is None, reason="tensorboard is not installed")
def test_tensorboard_reads_them_while_the_run_goes_on(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    writer = EventWriter(tmp_path)
    writer.add({"round": 1, "accuracy-a": 0.25, "clients-accuracy-weak": 0.5})
    found = EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in found.Scalars("level/a")] == [(1, 0.25)]
    assert found.Scalars("clients/weak")[0].value == 0.5
    writer.close()
