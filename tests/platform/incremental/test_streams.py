"""Streams: which example comes when."""

import numpy as np
import pytest

from lamina.platform.errors import UserError
from lamina.platform.incremental import transforms
from lamina.platform.incremental.learners import create
from lamina.platform.incremental.stream import (
    Labels,
    Shared,
    aligned,
    check_labels,
    parts_of,
    schedule,
)
from lamina.platform.incremental.streams import STREAMS

DOMAINS = (np.arange(103) % 5, np.arange(40) % 5)
LABELS = Labels(np.arange(103) % 10, np.arange(40) % 10, 10, (4, 4, 1), DOMAINS)


def build(name, batch_size=8, seed=0, labels=LABELS, shared=None, **options):
    return STREAMS[name](labels, batch_size, seed, shared or Shared(), **options)


@pytest.mark.parametrize("name", [*STREAMS])
def test_every_example_comes_as_often_as_there_are_epochs(name):
    epochs = 1 if name == "online" else 3
    stream = build(name, shared=Shared(epochs=epochs))
    counts = np.bincount(stream.rows[stream.valid])
    assert set(counts[counts > 0]) == {epochs}
    copies = 5 if name == "domain_incremental" else 1
    assert np.count_nonzero(counts) == copies * 103 == stream.fresh.sum()
    assert stream.valid.any(1).all()
    assert len(stream.rows) == stream.steps.sum()


@pytest.mark.parametrize("name", [*STREAMS])
def test_a_seed_fixes_every_byte_and_another_changes_the_order(name):
    first, again, other = build(name), build(name), build(name, seed=1)
    assert first.rows.tobytes() == again.rows.tobytes()
    assert first.rows.tobytes() != other.rows.tobytes()


def test_classes_come_once_and_their_test_examples_belong_to_their_task():
    stream = build("class_incremental", class_order="shuffled")
    assert (stream.classes.sum(0) == 1).all()
    for number, part in enumerate(parts_of(stream)):
        assert set(LABELS.train[part]) == set(np.flatnonzero(stream.classes[number]))
        tested = stream.test_index[stream.test_task == number]
        assert set(LABELS.test[tested]) == set(np.flatnonzero(stream.classes[number]))


def test_classes_come_in_the_order_that_is_given_and_others_not_at_all():
    stream = build("class_incremental", class_order=(9, 3, 0, 7, 1), shared=Shared(experiences=2))
    assert [set(np.flatnonzero(row)) for row in stream.classes] == [{9, 3, 0}, {7, 1}]
    assert set(LABELS.train[np.concatenate(parts_of(stream))]) == {0, 1, 3, 7, 9}
    assert set(LABELS.test[stream.test_index]) == {0, 1, 3, 7, 9}


@pytest.mark.parametrize("name", ["class_incremental", "online", "si_blurry"])
@pytest.mark.parametrize("class_order", ["fixed", "shuffled"])
def test_class_ids_may_start_anywhere_and_have_gaps(name, class_order):
    ids = np.array([5, 6, 8, 9])
    labels = LABELS._replace(train=ids[LABELS.train % 4], test=ids[LABELS.test % 4], classes=12)
    options = {} if name == "si_blurry" else {"class_order": class_order}
    stream = STREAMS[name](labels, 8, 0, Shared(experiences=2), **options)
    assert set(np.flatnonzero(stream.classes.any(0))) == set(ids)
    assert name == "si_blurry" or (stream.classes.sum(1) == 2).all()
    with pytest.raises(UserError, match=r"4, the number of classes|of the 4 classes"):
        STREAMS[name](labels, 8, 0, Shared(experiences=5), **options)


def test_repeats_of_a_batch_follow_it_and_are_not_fresh():
    stream = build("online", shared=Shared(repeats=2))
    assert (stream.rows[::2] == stream.rows[1::2]).all()
    assert not stream.fresh[1::2].any()


def test_an_example_arrives_once_in_each_pass():
    stream = build("class_incremental", shared=Shared(epochs=3, repeats=2))
    assert stream.arrives.sum() == 3 * 103
    arrived = np.bincount(stream.rows[stream.arrives], minlength=103)
    assert (arrived == 3).all()
    first = slice(0, int(stream.epoch_steps[0]))
    np.testing.assert_array_equal(stream.arrives[first], stream.fresh[first])


def test_joint_and_cumulative_bring_what_they_should():
    stream = build("class_incremental")
    cumulative = create("cumulative").arrange(stream)
    sizes = [len(part) for part in parts_of(cumulative)]
    assert sizes == np.cumsum([len(part) for part in parts_of(stream)]).tolist()
    joint = create("joint").arrange(stream)
    assert np.bincount(joint.rows[joint.valid]).tolist() == [1] * 103
    assert joint.classes.all()
    alone = build("class_incremental", shared=Shared(experiences=1))
    np.testing.assert_array_equal(create("cumulative").arrange(alone).rows, alone.rows)


def test_seeds_of_unequal_length_are_padded_with_steps_without_rows():
    short = build("class_incremental", labels=LABELS)
    long = short._replace(**schedule([np.arange(60)] * 5, 8, 1, 1, 0))
    one, two = aligned([short, long])
    assert (one.steps == two.steps).all()
    assert one.valid.sum() == short.valid.sum()


def test_si_blurry_keeps_disjoint_classes_in_one_experience():
    homes = []
    for seed in range(20):
        stream = build("si_blurry", seed=seed, disjoint=50, blurry=40)
        parts = parts_of(stream)
        assert sum(len(part) for part in parts) == 103
        homes.append(stream.classes.sum(0))
    homes = np.stack(homes)
    assert ((homes == 1).sum(1) >= 5).all()  # half of the ten classes
    assert (homes > 1).any()
    plain = build("si_blurry", disjoint=100, blurry=0, sizes="equal")
    assert (plain.classes.sum(0) == 1).all()
    unshared = build("si_blurry", blurry=0, sizes="random")
    assert (unshared.classes.sum(0) == 1).all()


def test_a_permutation_moves_pixels_and_a_rotation_turns_the_image():
    image = np.arange(16, dtype=np.float32).reshape(1, 4, 4, 1)
    permuted = transforms.permuted((4, 4, 1), 3, seed=0, first_unchanged=True)
    for number in range(3):
        out = np.asarray(transforms.apply(permuted, image, np.int32([number])))
        assert sorted(out.ravel()) == list(range(16))
        assert (out == image).all() == (number == 0)
    turned = transforms.rotation((4, 4, 1), np.array([0.0, 90.0]))
    np.testing.assert_allclose(transforms.apply(turned, image, np.int32([0])), image, atol=1e-4)
    out = np.asarray(transforms.apply(turned, image, np.int32([1])))
    np.testing.assert_allclose(out[0, ..., 0], np.rot90(image[0, ..., 0]), atol=1e-4)


@pytest.mark.parametrize(
    ("name", "shared", "options", "message"),
    [
        ("class_incremental", Shared(experiences=12), {}, "stream.experiences = 12"),
        ("class_incremental", Shared(), {"classes": 11}, "there are 10 classes"),
        ("class_incremental", Shared(), {"class_order": (3, 3)}, "each at most once"),
        ("class_incremental", Shared(), {"class_order": ()}, "should name classes from 0"),
        ("online", Shared(), {"class_order": (9, 10)}, "classes from 0 to 9"),
        ("task_incremental", Shared(), {"class_order": (9, 1)}, "between 1 and 2"),
        ("online", Shared(epochs=2), {}, "one pass"),
        ("data_incremental", Shared(experiences=0), {}, "between 1 and 40"),
        ("si_blurry", Shared(experiences=0), {}, "stream.experiences = 0 should lie"),
        ("si_blurry", Shared(), {"blurry": 101}, "stream.blurry = 101"),
        ("si_blurry", Shared(experiences=11), {}, "between 1 and 10"),
        ("domain_incremental", Shared(), {"examples": 1000}, "there are 103"),
    ],
)
def test_what_a_stream_cannot_be_is_named(name, shared, options, message):
    with pytest.raises(UserError, match=message):
        build(name, shared=shared, **options)


def test_a_label_that_is_no_class_is_named():
    with pytest.raises(UserError, match=r"label 12 \(example 1\), outside of 0 to 9"):
        check_labels(LABELS._replace(train=np.array([0, 12])))
