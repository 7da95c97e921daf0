"""Tasks against optax, numpy and scikit-learn; weights count exactly."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn import metrics as sklearn_metrics

from lamina.models.spec import DataSpec, Output
from lamina.platform.errors import UserError
from lamina.platform.training.tasks import TASKS, classification, language_modeling, regression

B, T, C = 12, 6, 5
CLASSES = DataSpec((4,), "float32", C)
TOKENS = DataSpec((T,), "int32", C)
TARGETS = DataSpec((4,), "float32", 3)
RNG = np.random.default_rng(0)
LOGITS = jnp.asarray(3 * RNG.normal(size=(B, C)), jnp.float32)
LABELS = jnp.asarray(RNG.integers(0, C, B), jnp.int32)
TOKEN_LOGITS = jnp.asarray(3 * RNG.normal(size=(B, T, C)), jnp.float32)
NEXT = jnp.asarray(RNG.integers(0, C, (B, T)), jnp.int32)
PREDICTED = jnp.asarray(RNG.normal(size=(B, 3)), jnp.float32)
WANTED = jnp.asarray(RNG.normal([0.0, 1.0, -2.0], size=(B, 3)), jnp.float32)

CASES = {
    "classification": (classification(CLASSES), LOGITS, {"labels": LABELS}),
    "smoothed": (classification(CLASSES, label_smoothing=0.1), LOGITS, {"labels": LABELS}),
    "language_modeling": (language_modeling(TOKENS), TOKEN_LOGITS, {"labels": NEXT}),
    "regression": (regression(TARGETS), PREDICTED, {"labels": WANTED}),
}
every_case = pytest.mark.parametrize(("task", "logits", "batch"), CASES.values(), ids=list(CASES))


@functools.partial(jax.jit, static_argnums=0)
def measure(task, logits, batch):
    return task.metrics(Output(logits), batch)


def means(task, logits, batch, bytes_per_token=None):
    found = measure(task, logits, batch)
    numbers = {k: float(s) / float(w) for k, (s, w) in found.items() if w > 0}
    return task.finish(numbers, bytes_per_token)


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def test_classification_equals_scikit_learn():
    found = means(*CASES["classification"])
    probabilities = np.exp(log_softmax(LOGITS))
    expected = sklearn_metrics.log_loss(LABELS, probabilities, labels=range(C))
    assert found["loss"] == pytest.approx(expected, rel=1e-6)
    right = sklearn_metrics.accuracy_score(LABELS, np.argmax(LOGITS, axis=-1))
    assert found["accuracy"] == pytest.approx(right)
    assert found.keys() == {"loss", "accuracy"}


@pytest.mark.parametrize(
    ("case", "logits", "needed"),
    [
        ("classification", LOGITS[:, :-1], r"\[12, 4\], where \[12, 5\] is needed"),
        ("classification", LOGITS[:, 0], r"\[12\], where \[12, 5\]"),
        ("classification", TOKEN_LOGITS, r"\[12, 6, 5\], where \[12, 5\]"),
        ("language_modeling", TOKEN_LOGITS[..., :-1], r"\[12, 6, 4\], where \[12, 6, 5\]"),
        ("language_modeling", LOGITS, r"\[12, 5\], where \[12, 6, 5\]"),
    ],
)
def test_logits_that_do_not_fit_the_labels_are_refused(case, logits, needed):
    task, _, batch = CASES[case]
    with pytest.raises(UserError, match=f"task '{case}': the model's logits.*{needed}"):
        task.loss(Output(logits), batch)


def test_more_logits_than_classes_are_allowed():
    wide = jnp.pad(LOGITS, ((0, 0), (0, 2)), constant_values=-jnp.inf)
    found, plain = (
        means(classification(CLASSES), wide, {"labels": LABELS}),
        means(*CASES["classification"]),
    )
    assert found == pytest.approx(plain)


def test_classification_honours_example_weights():
    weights = np.array([0.5, 2.0, 0.0, 1.0] * 3)
    found = means(
        classification(CLASSES), LOGITS, {"labels": LABELS, "weights": jnp.asarray(weights)}
    )
    expected = sklearn_metrics.log_loss(
        LABELS, np.exp(log_softmax(LOGITS)), sample_weight=weights, labels=range(C)
    )
    assert found["loss"] == pytest.approx(expected, rel=1e-6)
    right = sklearn_metrics.accuracy_score(LABELS, np.argmax(LOGITS, -1), sample_weight=weights)
    assert found["accuracy"] == pytest.approx(right, rel=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
def test_label_smoothing_equals_optaxs(smoothing):
    task = classification(CLASSES, label_smoothing=smoothing)
    losses, _ = task.loss(Output(LOGITS), {"labels": LABELS})
    smooth = optax.smooth_labels(jax.nn.one_hot(LABELS, C), smoothing)
    np.testing.assert_allclose(losses, optax.softmax_cross_entropy(LOGITS, smooth), rtol=2e-6)


def test_probabilities_as_labels_are_the_cross_entropy_to_them():
    soft = RNG.dirichlet(np.ones(C), B)
    task = classification(CLASSES, label_smoothing=0.2)
    found = means(task, LOGITS, {"labels": jnp.asarray(soft, jnp.float32)})
    target = 0.8 * soft + 0.2 / C
    expected = -(target * log_softmax(LOGITS)).sum(-1).mean()
    assert found["loss"] == pytest.approx(expected, rel=1e-6)
    right = np.mean(np.argmax(LOGITS, -1) == np.argmax(soft, -1))
    assert found["accuracy"] == pytest.approx(right)


def test_integer_labels_and_their_one_hot_form_give_the_same_losses_and_gradients():
    task = classification(CLASSES, label_smoothing=0.1)
    total = lambda logits, labels: jnp.sum(task.loss(Output(logits), {"labels": labels})[0])
    hot = jax.nn.one_hot(LABELS, C)
    value, grad = jax.jit(jax.value_and_grad(total))(LOGITS, LABELS)
    other_value, other_grad = jax.jit(jax.value_and_grad(total))(LOGITS, hot)
    np.testing.assert_allclose(value, other_value, rtol=1e-6)
    np.testing.assert_allclose(grad, other_grad, atol=1e-6)


@every_case
def test_a_padded_batch_counts_as_the_unpadded_one(task, logits, batch):
    kept = 7
    short = {key: value[:kept] for key, value in batch.items()}
    garbage = {key: value.at[kept:].set(-77) for key, value in batch.items()}
    weights = (jnp.arange(B) < kept).astype(jnp.float32)
    plain = measure(task, logits[:kept], short)
    padded = measure(task, logits, garbage | {"weights": weights})
    for name, (total, weight) in plain.items():
        assert weight == padded[name][1], name
        np.testing.assert_allclose(padded[name][0], total, rtol=1e-6, err_msg=name)


@every_case
def test_padding_has_no_gradient(task, logits, batch):
    weights = (jnp.arange(B) < 7).astype(jnp.float32)

    def objective(logits):
        losses, counts = task.loss(Output(logits), batch | {"weights": weights})
        return jnp.sum(losses * counts) / jnp.sum(counts)

    grad = jax.jit(jax.grad(objective))(logits)
    assert np.all(np.asarray(grad[7:]) == 0)
    assert np.all(np.asarray(grad[:7]) != 0)


@every_case
def test_metrics_of_two_halves_add_up_to_those_of_the_whole(task, logits, batch):
    whole = measure(task, logits, batch)
    parts = [
        measure(task, logits[s], {k: v[s] for k, v in batch.items()})
        for s in (slice(0, 5), slice(5, B))
    ]
    for name, (total, weight) in whole.items():
        np.testing.assert_allclose(sum(p[name][0] for p in parts), total, rtol=1e-5, atol=1e-5)
        assert sum(p[name][1] for p in parts) == weight


@every_case
def test_losses_and_metrics_are_float32_whatever_the_logits_are(task, logits, batch):
    output = Output(logits.astype(jnp.bfloat16))
    losses, weights = task.loss(output, batch)
    assert losses.shape == weights.shape == batch["labels"].shape[: losses.ndim]
    assert (losses.dtype, weights.dtype) == (jnp.float32, jnp.float32)
    for name, (total, weight) in task.metrics(output, batch).items():
        assert (total.shape, weight.shape) == ((), ()), name
        assert (total.dtype, weight.dtype) == (jnp.float32, jnp.float32), name


@every_case
def test_the_loss_metric_is_the_loss_that_is_minimised(task, logits, batch):
    losses, weights = task.loss(Output(logits), batch)
    total, weight = task.metrics(Output(logits), batch)["loss"]
    np.testing.assert_allclose(total / weight, jnp.sum(losses * weights) / jnp.sum(weights))
    name, mode = task.select
    assert name in means(task, logits, batch)
    assert mode == ("max" if name == "accuracy" else "min")


@pytest.mark.parametrize("bad", [-1, C])
@pytest.mark.parametrize("name", ["classification", "smoothed", "language_modeling"])
def test_a_label_out_of_range_makes_the_loss_not_a_number_unless_it_is_padding(name, bad):
    task, logits, batch = CASES[name]
    labels = batch["labels"].at[3].set(bad)
    assert np.isnan(means(task, logits, {"labels": labels})["loss"])
    weights = jnp.ones(B).at[3].set(0.0)
    assert np.isfinite(means(task, logits, {"labels": labels, "weights": weights})["loss"])


def test_language_modeling_is_nats_per_token():
    found = means(*CASES["language_modeling"])
    log_probabilities = log_softmax(TOKEN_LOGITS).reshape(B * T, C)
    expected = -log_probabilities[np.arange(B * T), np.ravel(NEXT)].mean()
    assert found["loss"] == pytest.approx(expected, rel=1e-6)
    assert found["perplexity"] == pytest.approx(np.exp(expected), rel=1e-5)
    right = np.mean(np.argmax(TOKEN_LOGITS, -1) == np.asarray(NEXT))
    assert found["accuracy"] == pytest.approx(right)
    assert "bits_per_byte" not in found, "bytes per token are not known"


def test_bits_per_byte_are_per_byte_of_text():
    task = language_modeling(TOKENS)
    assert task.finish({"loss": np.log(2)}, 1.0)["bits_per_byte"] == pytest.approx(1.0)
    assert task.finish({"loss": np.log(2)}, 4.0)["bits_per_byte"] == pytest.approx(0.25)


def test_finish_copes_with_what_is_not_there_and_what_is_too_large():
    for name in TASKS:
        task = TASKS[name](TOKENS)
        assert task.finish({}, None) == {}
        assert task.finish({"learning_rate": 0.5}, None) == {"learning_rate": 0.5}
    assert language_modeling(TOKENS).finish({"loss": 1e4}, None)["perplexity"] == np.inf
    assert not np.isfinite(language_modeling(TOKENS).finish({"loss": np.nan})["perplexity"])


def test_targets_in_another_segment_and_padding_do_not_count():
    segments = jnp.asarray([[1, 1, 1, 2, 2, 0]] * B, jnp.int32)
    task = language_modeling(TOKENS)
    batch = {"labels": NEXT, "segments": segments}
    _, weights = task.loss(Output(TOKEN_LOGITS), batch)
    np.testing.assert_array_equal(weights[0], [1, 1, 0, 1, 0, 0])
    counted = jnp.asarray([[1, 1, 0, 1, 0, 0]] * B, jnp.float32)
    by_weights = means(task, TOKEN_LOGITS, {"labels": NEXT, "weights": counted})
    assert means(task, TOKEN_LOGITS, batch) == by_weights
    _, both = task.loss(Output(TOKEN_LOGITS), batch | {"weights": counted.at[:, 0].set(0.5)})
    np.testing.assert_array_equal(both[0], [0.5, 1, 0, 1, 0, 0])


def test_the_last_position_counts_unless_its_weight_is_zero():
    segments = jnp.full((B, T), 3, jnp.int32)
    _, weights = language_modeling(TOKENS).loss(
        Output(TOKEN_LOGITS), {"labels": NEXT, "segments": segments}
    )
    np.testing.assert_array_equal(weights, np.ones((B, T)))


def test_packed_documents_count_as_the_same_documents_apart():
    """Labels are the next tokens of the stream, so the first document loses its last one."""
    task = language_modeling(TOKENS)
    packed = {"labels": NEXT[:1], "segments": jnp.asarray([[1, 1, 1, 1, 2, 2]], jnp.int32)}
    together = measure(task, TOKEN_LOGITS[:1], packed)
    apart = [
        measure(task, TOKEN_LOGITS[:1, s], {"labels": NEXT[:1, s]})
        for s in (slice(0, 3), slice(4, 6))
    ]
    for name, (total, weight) in together.items():
        np.testing.assert_allclose(sum(a[name][0] for a in apart), total, rtol=1e-6)
        assert weight == 5


def test_the_model_gets_segments_and_positions_where_there_are_some():
    inputs = language_modeling(TOKENS).inputs
    batch = {"inputs": NEXT, "labels": NEXT}
    arguments, named = inputs(batch)
    assert arguments[0] is NEXT
    assert named == {}
    _, named = inputs(batch | {"segments": NEXT, "positions": LABELS})
    assert named["segments"] is NEXT
    assert named["positions"] is LABELS


def test_regression_on_classes_is_refused():
    with pytest.raises(UserError, match="for classes use 'classification'"):
        means(regression(TARGETS), PREDICTED, {"labels": jnp.zeros(len(WANTED), jnp.int32)})


def test_regression_equals_scikit_learn():
    weights = np.array([0.5, 2.0, 0.0, 1.0] * 3)
    for extra, sample_weight in (({}, None), ({"weights": jnp.asarray(weights)}, weights)):
        found = means(regression(TARGETS), PREDICTED, {"labels": WANTED} | extra)
        score = functools.partial(_score, sample_weight=sample_weight)
        assert found["mse"] == found["loss"]
        assert found["mse"] == pytest.approx(score("mean_squared_error"), rel=1e-5)
        assert found["mae"] == pytest.approx(score("mean_absolute_error"), rel=1e-5)
        assert found["r2"] == pytest.approx(score("r2_score"), rel=1e-4)
        assert found.keys() == {"loss", "mse", "mae", "r2"}


def _score(name, sample_weight, offset=0.0):
    wanted = np.asarray(WANTED, np.float64) + offset
    predicted = np.asarray(PREDICTED, np.float64) + offset
    return getattr(sklearn_metrics, name)(wanted, predicted, sample_weight=sample_weight)


def test_a_target_offset_keeps_r2_exact_for_labels_far_from_zero():
    offset = 3000.0
    batch = {"labels": WANTED + offset}
    expected = _score("r2_score", None, offset)
    found = means(regression(TARGETS, target_offset=offset), PREDICTED + offset, batch)
    assert found["r2"] == pytest.approx(expected, rel=1e-3)
    unshifted = means(regression(TARGETS), PREDICTED + offset, batch)
    assert abs(unshifted.get("r2", np.inf) - expected) > abs(found["r2"] - expected)
    assert unshifted["mse"] == found["mse"]


def test_one_target_may_come_without_its_axis_but_wrong_shapes_do_not_broadcast():
    task = regression(DataSpec((4,), "float32", 1))
    flat = means(task, PREDICTED[:, :1], {"labels": WANTED[:, 0]})
    assert flat == means(task, PREDICTED[:, :1], {"labels": WANTED[:, :1]})
    with pytest.raises(UserError, match=r"labels float32 \[12, 3\] aren't a number for each"):
        task.loss(Output(PREDICTED[:, :1]), {"labels": WANTED})


def test_a_constant_target_has_no_r2_and_many_targets_have_none():
    task = regression(DataSpec((4,), "float32", 1))
    batch = {"labels": jnp.full((B, 1), 1.1)}
    assert means(task, PREDICTED[:, :1], batch).keys() == {"loss", "mse", "mae"}
    wide = jnp.zeros((B, 17))
    found = means(regression(DataSpec((4,), "float32", 17)), wide, {"labels": wide + 1})
    assert found == {"loss": 1.0, "mse": 1.0, "mae": 1.0}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: classification(CLASSES, label_smoothing=1.0), r"should be in \[0, 1\)"),
        (lambda: classification(CLASSES, label_smoothing=-0.1), r"should be in \[0, 1\)"),
        (lambda: classification(CLASSES._replace(outputs=1)), "two or more classes"),
        (lambda: language_modeling(CLASSES), r"sequences of tokens.*float32 of shape \(4,\)"),
        (lambda: language_modeling(DataSpec((4, 4), "int32", 9)), "sequences of tokens"),
    ],
)
def test_a_task_that_does_not_fit_says_why(make, message):
    with pytest.raises(UserError, match=message):
        make()
