"""Both placements give the same batches, from any step, in any number of processes and workers."""

import multiprocessing
import os
import signal
import time

import jax
import numpy as np
import pytest

from lamina.platform.data import feed, order
from lamina.platform.data.dataset import ArraySource, Subset
from lamina.platform.errors import UserError

N, B = 103, 8


@pytest.fixture(scope="module")
def source():
    pixels = np.random.default_rng(0).integers(0, 256, (N, 4, 4, 1), dtype=np.uint8)
    return ArraySource({"inputs": pixels, "labels": np.arange(N, dtype=np.int32)})


def read_batches(opened, first_step, count):
    """The selected batches of some steps, as a jitted scan body would see them."""
    rows = opened.read(first_step, count)
    select = jax.jit(opened.select)
    return [select(opened.constants, jax.tree.map(lambda a, i=i: a[i], rows)) for i in range(count)]


def assert_same(ours, theirs):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert sorted(a) == sorted(b)
        for name in a:
            assert a[name].dtype == b[name].dtype
            assert np.array_equal(a[name], b[name]), name


@pytest.mark.parametrize("seeds", [(), (0, 5)])
def test_device_and_grain_threads_give_identical_batches(source, seeds):
    device = feed.device_feed(source, B, 1, seeds=seeds)
    grain = feed.grain_feed(source, B, 1, seeds=seeds)
    for first in (0, 3, 6, 40):
        assert_same(read_batches(device, first, 3), read_batches(grain, first, 3))
    grain.close()


def test_device_and_two_grain_workers_give_identical_batches(source):
    device = feed.device_feed(source, B, 1)
    grain = feed.grain_feed(source, B, 1, workers=2)
    for first in (20, 27):
        assert_same(read_batches(device, first, 7), read_batches(grain, first, 7))
    grain.close()


@pytest.mark.parametrize("open_feed", [feed.device_feed, feed.grain_feed])
def test_reading_from_the_middle_gives_what_an_undisturbed_read_gives(source, open_feed):
    undisturbed = open_feed(source, B, 2)
    whole = [batch for first in range(0, 30, 5) for batch in read_batches(undisturbed, first, 5)]
    resumed = open_feed(source, B, 2)
    assert_same(read_batches(resumed, 17, 4), whole[17:21])
    undisturbed.close()
    resumed.close()


@pytest.mark.parametrize("open_feed", [feed.device_feed, feed.grain_feed])
def test_an_epoch_holds_every_training_example_exactly_once(source, open_feed):
    opened = open_feed(source, B, 0)
    labels = np.concatenate([b["labels"] for b in read_batches(opened, 0, 26)])
    opened.close()
    for epoch in (0, 1):
        assert np.array_equal(np.sort(labels[epoch * N : (epoch + 1) * N]), np.arange(N))


@pytest.mark.parametrize("open_feed", [feed.device_feed, feed.grain_feed])
def test_processes_read_disjoint_rows_of_the_global_batch(source, open_feed):
    feeds = [
        open_feed(source, B, 4, process_index=p, process_count=count)
        for count in (1, 4)
        for p in range(count)
    ]
    whole, *shares = [read_batches(f, 5, 2) for f in feeds]
    for step in range(2):
        joined = np.concatenate([share[step]["labels"] for share in shares])
        assert np.array_equal(joined, whole[step]["labels"])
    for opened in feeds:
        opened.close()


def test_seeds_have_their_own_orders(source):
    both = read_batches(feed.device_feed(source, B, 9, seeds=(3, 4)), 2, 1)[0]["labels"]
    assert both.shape == (2, B)
    for row, seed in zip(both, (3, 4), strict=True):
        assert np.array_equal(row, order.indices(N, order.seed_for(9, seed), 2 * B, B))


@pytest.mark.parametrize("placement", ["device", "grain"])
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("n", [1, 8, 103])
def test_evaluation_weighs_each_example_once_in_any_number_of_processes(
    source, placement, processes, n
):
    split = ArraySource({k: v[:n] for k, v in source.arrays.items()})
    seen, steps = np.zeros(n), set()
    for p in range(processes):
        opened = feed.evaluation_feed(
            split, B, placement=placement, process_index=p, process_count=processes
        )
        steps.add(opened.steps)
        for batch in read_batches(opened, 0, opened.steps + 2):  # a chunk that overshoots
            assert batch["labels"].shape == (B // processes,)
            np.add.at(seen, np.asarray(batch["labels"]), np.asarray(batch["weights"]))
        opened.close()
    assert steps == {-(-n // B)}
    assert np.array_equal(seen, np.ones(n))


def test_padding_multiplies_the_weights_of_tokens():
    weights = np.array([[1, 1, 0], [1, 0.5, 0], [1, 1, 1]], np.float32)
    split = ArraySource({"inputs": np.zeros((3, 3), np.int32), "weights": weights})
    (_, last) = read_batches(feed.evaluation_feed(split, 2, placement="device"), 0, 2)
    assert np.array_equal(last["weights"], [[1, 1, 1], [0, 0, 0]])


def test_pixels_are_scaled_to_the_unit_interval_on_the_device():
    split = ArraySource({"inputs": np.array([[0], [51], [255]], np.uint8)})
    opened = feed.evaluation_feed(split, 3)
    assert opened.constants["inputs"].dtype == np.uint8
    inputs = read_batches(opened, 0, 1)[0]["inputs"]
    np.testing.assert_allclose(inputs[:, 0], [0, 0.2, 1], rtol=1e-6)
    assert inputs.dtype == np.float32
    assert inputs[2, 0] == 1


def test_auto_puts_small_arrays_on_the_device_and_leaves_the_rest_to_grain(source):
    big = ArraySource({"inputs": np.broadcast_to(np.uint8(0), (feed.DEVICE_LIMIT + 1,))})
    assert feed.choose_placement(source) == "device"
    assert feed.choose_placement(big) == "grain"
    assert feed.choose_placement(Subset(source, np.arange(3))) == "grain"
    with pytest.raises(UserError, match="held in memory"):
        feed.choose_placement(Subset(source, np.arange(3)), "device")
    with pytest.raises(UserError, match="'auto', 'device' or 'grain'"):
        feed.choose_placement(source, "gpu")


def test_a_batch_that_processes_cannot_share_is_refused(source):
    with pytest.raises(UserError, match="multiple of 3"):
        feed.device_feed(source, B, 0, process_count=3)


def broken_source():
    """A source with an unreadable example; a local class, so that workers get it by value."""

    class Broken:
        def __len__(self):
            return 20

        def __getitem__(self, index):
            if index == 13:
                raise OSError("disk on fire")
            return {"inputs": np.zeros(2, np.float32)}

        def __getitems__(self, indices):
            return [self[i] for i in indices]

        def __repr__(self):
            return "Broken()"

    return Broken()


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_example_is_named(workers):
    opened = feed.grain_feed(broken_source(), 4, 0, workers=workers)
    with pytest.raises(UserError, match=r"example 13 of Broken\(\) .*disk on fire"):
        opened.read(0, 5)
    opened.close()


@pytest.mark.slow
def test_a_killed_worker_is_reported_instead_of_waited_for(source):
    opened = feed.grain_feed(source, B, 0, workers=1, prefetch=1)
    opened.read(0, 1)
    (worker,) = multiprocessing.active_children()
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(UserError, match="terminated unexpectedly"):
        opened.read(1, 20)
    opened.close()
    assert not multiprocessing.active_children()


def test_examples_of_different_shapes_are_refused():
    class Ragged:
        def __len__(self):
            return 4

        def __getitem__(self, index):
            return {"inputs": np.zeros(index + 1)}

        def __getitems__(self, indices):
            return [self[i] for i in indices]

    with pytest.raises(UserError, match="differ in shape"):
        feed.grain_feed(Ragged(), 4, 0).read(0, 1)


def test_batches_are_read_ahead_of_time():
    slow_reads = []

    class Slow:
        def __len__(self):
            return 1000

        def __getitem__(self, index):
            slow_reads.append(index)
            return {"inputs": np.zeros(1)}

        def __getitems__(self, indices):
            return [self[i] for i in indices]

    opened = feed.grain_feed(Slow(), 2, 0, prefetch=4)
    opened.read(0, 1)
    deadline = time.monotonic() + 10
    while len(slow_reads) < 8 and time.monotonic() < deadline:
        time.sleep(0.01)
    opened.close()
    assert len(slow_reads) >= 8


def test_a_closed_feed_reads_no_more(source):
    opened = feed.grain_feed(source, B, 0)
    opened.read(0, 1)
    opened.close()
    opened.close()
    with pytest.raises(RuntimeError, match="closed"):
        opened.read(1, 1)


def test_an_empty_split_is_refused():
    with pytest.raises(UserError, match="no examples"):
        feed.device_feed(ArraySource({"inputs": np.zeros((0, 2))}), 2, 0)
