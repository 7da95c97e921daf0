import json
import math
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from lamina.platform.errors import UserError
from lamina.platform.reporting import metrics_log, records
from lamina.platform.reporting.records import Record


def entries(steps, seeds=(0,)):
    return [Record(step, "train", "loss", 1 / step, seed, 0.5) for step in steps for seed in seeds]


@pytest.mark.parametrize("value", [0.25, -3.0, 1e-30, None])
def test_a_record_survives_encoding(value):
    entry = Record(7, "validation", 'odd "name"\n', value, 3, 1.25)
    assert records.decode(records.encode(entry)) == entry


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, np.float32("nan")])
def test_a_value_that_is_not_finite_becomes_none_and_valid_json(value):
    assert records.record(1, "train", "loss", value).value is None
    line = records.encode(Record(1, "train", "loss", float(value)))
    assert json.loads(line, parse_constant=pytest.fail)["value"] is None


def test_numpy_scalars_become_python_numbers():
    entry = records.record(
        np.int32(4), "train", "loss", np.float32(0.5), np.int64(2), np.float64(1)
    )
    assert entry == (4, "train", "loss", 0.5, 2, 1.0)
    assert [type(field) for field in entry] == [int, str, str, float, int, float]


def test_read_drops_a_torn_last_line_wherever_it_is_torn(tmp_path):
    path = tmp_path / "metrics.jsonl"
    whole = records.lines(entries([1, 2]))
    last = records.lines(entries([3]))
    for length in range(len(last)):
        path.write_bytes(whole + last[:length])
        assert [entry.step for entry in records.read(path)] == [1, 2]
    path.write_bytes(whole + last)
    assert [entry.step for entry in records.read(path)] == [1, 2, 3]


@pytest.mark.parametrize(
    "line", ["{", "[1]", '{"step": 1}', '{"step": "x", "split": "", "name": ""}']
)
def test_read_names_file_and_line_of_a_corrupt_record(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(records.encode(entries([1])[0]) + "\n" + line + "\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2"):
        records.read(path)


def test_reading_no_file_gives_no_records(tmp_path):
    assert records.read(tmp_path / "metrics.jsonl") == []


def test_cut_keeps_records_up_to_the_checkpoint_and_drops_the_torn_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(records.lines(entries([10, 20, 30])) + b'{"step": 2')
    kept = records.cut(path, 20)
    assert [entry.step for entry in kept] == [10, 20]
    assert path.read_bytes() == records.lines(entries([10, 20]))
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


def test_cut_leaves_the_records_of_seeds_that_do_not_resume(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(records.lines(entries([10, 20], seeds=(0, 1))))
    kept = records.cut(path, 10, seeds=(1,))
    assert [(entry.step, entry.seed) for entry in kept] == [(10, 0), (10, 1), (20, 0)]


def test_cut_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    before = records.lines(entries([10, 20]))
    path.write_bytes(before)

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        records.cut(path, 10)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


def test_the_log_appends_after_whole_lines_only(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(records.lines(entries([1])) + b'{"step": 2, "spl')
    log = metrics_log.open_log(path)
    log.write(entries([2, 3]))
    assert [entry.step for entry in records.read(path)] == [1, 2, 3]  # before close: flushed
    log.close()
    assert path.read_bytes() == records.lines(entries([1, 2, 3]))


def test_the_log_syncs_to_the_disk(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(handle))
    log = metrics_log.open_log(tmp_path / "metrics.jsonl")
    log.write(entries([1]))
    assert not synced
    log.sync()
    assert len(synced) == 1
    log.close()


def test_what_was_written_survives_kill_9(tmp_path):
    path = tmp_path / "metrics.jsonl"
    program = f"""
import os, signal
from lamina.platform.reporting import metrics_log, records
log = metrics_log.open_log({str(path)!r})
for step in range(1, 6):
    log.write([records.record(step, "train", "loss", 0.5)])
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", program], check=False)
    assert done.returncode == -signal.SIGKILL
    assert [entry.step for entry in records.read(path)] == [1, 2, 3, 4, 5]


def test_a_remote_log_rewrites_the_whole_object_on_sync_and_after_a_minute(bucket):
    name = "gs://bucket/run/metrics.jsonl"
    bucket[name] = records.lines(entries([1])) + b"{torn"
    clock = [0.0]
    log = metrics_log.open_log(name, now=lambda: clock[0])
    log.write(entries([2]))
    assert bucket[name].endswith(b"{torn")  # not yet rewritten
    log.sync()
    assert bucket[name] == records.lines(entries([1, 2]))
    clock[0] = metrics_log.REMOTE_SECONDS - 1
    log.write(entries([3]))
    assert bucket[name] == records.lines(entries([1, 2]))
    clock[0] += 1
    log.write(entries([4]))
    assert bucket[name] == records.lines(entries([1, 2, 3, 4]))
    log.write(entries([5]))
    log.close()
    assert [entry.step for entry in records.read(name)] == [1, 2, 3, 4, 5]
    assert [entry.step for entry in records.cut(name, 3)] == [1, 2, 3]
    assert bucket[name] == records.lines(entries([1, 2, 3]))


def test_summary_is_the_sample_deviation_and_zero_for_one_seed():
    values = [0.9, 0.7, 0.95]
    found = records.summary(values)
    assert found.mean == pytest.approx(np.mean(values))
    assert found.std == pytest.approx(np.std(values, ddof=1))
    assert records.summary([0.5]) == (0.5, 0.0, [0.5])


def test_a_diverged_seed_leaves_no_mean():
    assert records.summary([0.5, math.nan]) == (None, None, [0.5, None])
    assert records.summary([]) == (None, None, [])


def test_summarise_takes_each_seeds_latest_value_in_the_given_order():
    logged = [*entries([1, 2], seeds=(5, 3)), Record(2, "test", "accuracy", 0.9, 3)]
    found = records.summarise(logged, seeds=(3, 5))
    assert found["train/loss"] == {"mean": 0.5, "std": 0.0, "values": [0.5, 0.5]}
    assert found["test/accuracy"]["values"] == [0.9, None]
    assert list(records.summarise(logged, split="test")) == ["accuracy"]
    logged = [Record(1, "a", "x", 1.0, 9), Record(1, "a", "x", 2.0, 4)]
    assert records.summarise(logged)["a/x"]["values"] == [1.0, 2.0]
