import io
import struct
import sys
import types
import warnings

import pytest

from lamina.platform.errors import UserError
from lamina.platform.reporting import console, folder, records, storage, writers
from lamina.platform.reporting.protocol import NULL, RunInfo, Writer
from lamina.platform.reporting.records import Record


def moment(step, seeds=(0,), split="train", value=0.5, time=0.0):
    return [Record(step, split, "loss", value, seed, time) for seed in seeds]


def events_of(workdir):
    """(step, tag, value) of scalars and (step, "start", None) of session starts, by file."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted((workdir / "tensorboard").iterdir(), key=lambda path: path.stat().st_mtime):
        data, place = path.read_bytes(), 0
        while place < len(data):
            (length,) = struct.unpack_from("<Q", data, place)
            event = Event.FromString(data[place + 12 : place + 12 + length])
            place += 12 + length + 4
            if event.HasField("session_log"):
                found.append((event.step, "start", None))
            for value in event.summary.value:
                found.append((event.step, value.tag, value.simple_value))
    return found


def test_tensorboard_names_curves_by_split_and_by_seed_where_there_are_several(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    for workdir, seeds in ((one, (7,)), (two, (0, 1))):
        writer = writers.tensorboard(RunInfo(workdir, seeds=seeds))
        writer.write(moment(10, seeds))
        writer.close()
    assert events_of(one) == [(10, "train/loss", 0.5)]
    assert [tag for _, tag, _ in events_of(two)] == ["train/loss/seed_0", "train/loss/seed_1"]


def test_a_resumed_tensorboard_purges_what_comes_after_the_checkpoint(tmp_path):
    writer = writers.tensorboard(RunInfo(tmp_path, start_step=20))
    writer.write(moment(30))
    writer.close()
    assert events_of(tmp_path) == [(21, "start", None), (30, "train/loss", 0.5)]


def test_plain_lines_tell_rate_throughput_and_remaining_time():
    stream = io.StringIO()
    run = RunInfo("run", seeds=(0, 1), steps=600, examples_per_step=64, stream=stream)
    writer = console.console(run)
    for step in (100, 200, 300):
        writer.write(moment(step, (0, 1), time=step / 50))
    writer.write(moment(300, (0, 1), "validation", None, time=6.0))
    writer.close()
    lines = stream.getvalue().splitlines()
    assert lines[0] == "step 100/600  train       loss 0.5000"
    assert lines[2] == (
        "step 300/600  train       loss 0.5000  (50 steps/s, 3.2k examples/s, 6 s left)"
    )
    assert lines[3] == "step 300/600  validation  loss not finite"
    assert len(lines) == 4


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_gets_a_bar_with_other_splits_printed_above(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    writer = console.console(RunInfo("run", steps=200, stream=stream))
    writer.write(moment(100, time=1.0) + moment(100, split="validation", value=0.25, time=1.0))
    writer.write(moment(200, time=3.0))
    writer.close()
    text = stream.getvalue()
    assert "step 100/200  validation  loss 0.2500\n" in text
    assert "50 steps/s" in text
    assert "━" in text


def test_a_progress_bar_keeps_square_brackets_of_names(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    writer = console.console(RunInfo("run", steps=2, stream=stream))
    writer.write([Record(1, "[red]x", "[bold]", 0.5)])
    writer.close()
    assert "[red]x      [bold] 0.5000" in stream.getvalue()


def test_only_the_first_process_writes(tmp_path):
    run = RunInfo(tmp_path / "run", process_index=1)
    assert writers.open_writers(run, {"jsonl": {}, "console": {}, "tensorboard": {}}) is NULL
    assert console.console(run) is NULL
    assert not (tmp_path / "run").exists()


def test_open_writers_writes_to_all_of_them(tmp_path):
    stream = io.StringIO()
    run = RunInfo(tmp_path, stream=stream)
    writer = writers.open_writers(run, {"jsonl": {}, "console": {}, "tensorboard": {}})
    writer.write(moment(5))
    writer.sync()
    writer.close()
    assert records.read(tmp_path / folder.METRICS) == moment(5)
    assert stream.getvalue() == "step 5  train       loss 0.5000\n"
    assert len(events_of(tmp_path)) == 1


def test_an_unknown_writer_is_refused_with_the_known_ones(tmp_path):
    with pytest.raises(UserError, match=r"no writer 'wanbd'.*tensorboard.*wandb"):
        writers.open_writers(RunInfo(tmp_path), {"wanbd": {}})


def test_fan_out_closes_all_even_if_one_fails():
    closed = []

    def fail():
        closed.append("b")
        raise OSError("gone")

    made = [
        NULL._replace(close=lambda: closed.append("a")),
        NULL._replace(close=fail),
        NULL._replace(close=lambda: closed.append("c")),
    ]
    with pytest.raises(OSError, match="gone"):
        writers.fan_out(made).close()
    assert closed == ["a", "b", "c"]


def test_a_failing_tracker_warns_once_and_is_given_up_in_the_end():
    calls = []

    def write(_):
        calls.append("write")
        raise ConnectionError("no route")

    writer = writers.forgiving("wandb", lambda: Writer(write, lambda: None, lambda: None))
    with pytest.warns(RuntimeWarning, match=r"wandb writer failed to write .*no route"):
        writer.write(moment(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(20):
            writer.write(moment(1))
        writer.close()
    assert len(calls) == writers.FAILURES


def test_a_tracker_that_cannot_be_opened_does_not_stop_the_run(tmp_path, monkeypatch):
    def refuse(**_):
        raise ConnectionError("no network")

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=refuse))
    with pytest.warns(RuntimeWarning, match="failed to open"):
        writer = writers.open_writers(RunInfo(tmp_path), {"jsonl": {}, "wandb": {}})
    writer.write(moment(1))
    writer.close()
    assert records.read(tmp_path / folder.METRICS) == moment(1)


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_missing_extra_says_what_to_install(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=rf"pip install 'lamina\[{name}\]'"):
        writers.open_writers(RunInfo(tmp_path), {name: {}})


def test_wandb_resumes_under_its_first_id_and_logs_one_dict_a_step(tmp_path, monkeypatch):
    opened, logged = [], []

    def init(**keywords):
        opened.append(keywords)
        return types.SimpleNamespace(
            log=lambda values, step: logged.append((step, values)), finish=lambda: None
        )

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    run = RunInfo(tmp_path / "digits", seeds=(0, 1), config={"optimizer": {"name": "adamw"}})
    for _ in range(2):
        writer = writers.wandb(run, project="p", mode="offline")
        writer.write([*moment(10, (0, 1)), *moment(10, (0,), "validation", None)])
        writer.close()
    assert opened[0]["id"] == opened[1]["id"]
    assert opened[0]["mode"] == "offline"
    assert opened[0]["name"] == "digits"
    assert opened[0]["config"] == {"optimizer": {"name": "adamw"}}
    assert logged[0] == (10, {"train/loss/seed_0": 0.5, "train/loss/seed_1": 0.5})
    storage.read_object(tmp_path / "digits" / folder.TRACKERS)["wandb"]


def test_mlflow_goes_on_in_the_same_run_and_sends_no_step_twice(tmp_path, monkeypatch):
    params, sent, states = {}, [], []

    class MlflowClient:
        def __init__(self, tracking_uri):
            assert tracking_uri == "somewhere"

        def get_experiment_by_name(self, name):
            return None

        def create_experiment(self, name):
            return f"experiment of {name}"

        def create_run(self, experiment_id, run_name):
            assert (experiment_id, run_name) == ("experiment of lamina", "digits")
            return types.SimpleNamespace(info=types.SimpleNamespace(run_id="r1"))

        def update_run(self, run_id, status):
            states.append((run_id, status))

        def log_param(self, run_id, name, value):
            params[name] = value

        def get_metric_history(self, run_id, name):
            return [types.SimpleNamespace(step=step) for _, key, step in sent if key == name]

        def log_metric(self, run_id, name, value, step):
            sent.append((value, name, step))

        def set_terminated(self, run_id):
            states.append((run_id, "closed"))

    monkeypatch.setitem(sys.modules, "mlflow", types.SimpleNamespace(MlflowClient=MlflowClient))
    run = RunInfo(tmp_path / "digits", config={"model": {"width": 32}})
    first = writers.mlflow(run, tracking_uri="somewhere")
    first.write(moment(10) + moment(20))
    first.close()
    second = writers.mlflow(run._replace(start_step=10), tracking_uri="somewhere")
    second.write(moment(20) + moment(30))
    second.close()
    assert params == {"model.width": "32"}
    assert [step for _, _, step in sent] == [10, 20, 30]
    assert states == [("r1", "closed"), ("r1", "RUNNING"), ("r1", "closed")]
