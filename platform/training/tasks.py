"""Tasks: what a model is asked to do, as losses and metrics per example, with weights.

Letters: B batch, T time, C classes, V vocabulary, O regression targets. A weight of 0 marks
padding, whose inputs and labels don't matter; an absent weight is 1. Everything is summed in
float32. A metric is a pair (weighted sum, weight), so that batches of any size add up exactly.

Inside a compiled step a label can't be refused. Data sets check labels when they are built
(`lamina.platform.data`); one that is out of range all the same makes the loss NaN, which stops the
run as diverged, instead of training on another class.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lamina.models.spec import DataSpec, Output
from lamina.platform.errors import UserError

Batch = Mapping[str, jax.Array]
Metrics = dict[str, tuple[jax.Array, jax.Array]]

_DETERMINED_OUTPUTS = 16
"""Up to so many regression targets, r2 is measured: it needs three sums for each."""


class Task(NamedTuple):
    """A task, as its factory returns it.

    Attributes:
        inputs: batch -> (arguments, keyword arguments) of the model's call.
        loss: (output, batch) -> (losses, weights), float32 of one shape, [B] or [B, T]. The step
            minimises sum(losses * weights) / sum(weights). Losses are 0 where weights are.
        metrics: (output, batch) -> name to (weighted sum, weight), float32 scalars; "loss" is
            the loss that is minimised.
        finish: (means of the metrics, bytes per token or None) -> the numbers to report: the means,
            with derived numbers added and helpers taken out. Names it doesn't know stay.
        select: name of the metric by which the best checkpoint is chosen, and "max" or "min".
    """

    inputs: Callable[[Batch], tuple[tuple, dict[str, Any]]]
    loss: Callable[[Output, Batch], tuple[jax.Array, jax.Array]]
    metrics: Callable[[Output, Batch], Metrics]
    finish: Callable[[dict[str, float], float | None], dict[str, float]]
    select: tuple[str, str]


def classification(spec: DataSpec, *, label_smoothing: float = 0.0) -> Task:
    """One class for each example, by softmax cross-entropy.

    `loss = -sum_c q_c log softmax(logits)_c` in nats, with
    `q = (1 - label_smoothing) label + label_smoothing / C`. Labels are int32 [B], or float [B, C]
    probabilities (mixed examples, distillation). The metric "loss" has the smoothing in it, in
    evaluation too. "accuracy" counts examples whose largest logit (the first of equals) is the
    label's, for probabilities that of the most probable class.

    Args:
        spec: `outputs` is the number of classes.
        label_smoothing: share of the label spread over all classes, in [0, 1) (default: none).

    Raises:
        UserError: label_smoothing is out of range, or there are fewer than two classes; (by the
            loss) the model has fewer logits than there are classes.

    References:
        Szegedy et al., Rethinking the Inception Architecture, https://arxiv.org/abs/1512.00567
    """
    if isinstance(label_smoothing, int | float) and not 0 <= label_smoothing < 1:
        raise UserError(f"task.label_smoothing = {label_smoothing} should be in [0, 1)")
    if spec.outputs < 2:
        raise UserError(
            f"task 'classification' needs two or more classes, the data set has {spec.outputs}"
        )

    def loss(output: Output, batch: Batch):
        logits_BxC, labels = output.logits.astype(jnp.float32), batch["labels"]
        _check_logits("classification", logits_BxC, labels, spec.outputs)
        weights_B = _weights(batch, logits_BxC.shape[:-1])
        if _are_probabilities(labels):
            labels_BxC = optax.smooth_labels(labels.astype(jnp.float32), label_smoothing)
            losses_B = optax.softmax_cross_entropy(logits_BxC, labels_BxC)
        else:
            losses_B = _cross_entropy(logits_BxC, labels, label_smoothing)
        return _counted(losses_B, weights_B), weights_B

    def metrics(output: Output, batch: Batch) -> Metrics:
        losses_B, weights_B = loss(output, batch)
        labels = batch["labels"]
        classes_B = jnp.argmax(labels, axis=-1) if _are_probabilities(labels) else labels
        right_B = (jnp.argmax(output.logits, axis=-1) == classes_B).astype(jnp.float32)
        return {"loss": _total(losses_B, weights_B), "accuracy": _total(right_B, weights_B)}

    return Task(_plain_inputs, loss, metrics, _as_they_are, ("accuracy", "max"))


def language_modeling(spec: DataSpec) -> Task:
    """The next token at every position, by softmax cross-entropy in nats per token.

    Labels are int32 [B, T], the next token in the stream. With "segments" (int32 [B, T], the
    document of each input, 0 for padding) several documents share a row: a position counts only if
    its target lies in its own segment, so the last token of a document predicts nothing. (The last
    position of a row counts: its target isn't in the row. Give it weight 0 if it should not.)
    "segments" and "positions", where the batch has them, are passed to the model by these names.

    Metrics: "loss", and "accuracy" of the most probable token. Derived: "perplexity" = exp(loss)
    and, where the bytes per token are known, "bits_per_byte" = loss / (ln 2 * bytes per token).

    Args:
        spec: `outputs` is the size of the vocabulary, `input_shape` is (T,).

    Raises:
        UserError: the data set isn't one of token sequences; (by the loss) the model has fewer
            logits than there are tokens.
    """
    if len(spec.input_shape) != 1 or not spec.input_dtype.startswith("int"):
        raise UserError(
            "task 'language_modeling' needs sequences of tokens, but an example of the data set is "
            f"{spec.input_dtype} of shape {tuple(spec.input_shape)}"
        )

    def inputs(batch: Batch):
        named = {key: batch[key] for key in ("segments", "positions") if key in batch}
        return (batch["inputs"],), named

    def loss(output: Output, batch: Batch):
        logits_BxTxV, labels_BxT = output.logits.astype(jnp.float32), batch["labels"]
        _check_logits("language_modeling", logits_BxTxV, labels_BxT, spec.outputs)
        weights_BxT = _weights(batch, labels_BxT.shape)
        if "segments" in batch:
            segments_BxT = batch["segments"]
            following_BxT = jnp.concatenate([segments_BxT[:, 1:], segments_BxT[:, -1:]], axis=1)
            own_BxT = (segments_BxT == following_BxT) & (segments_BxT != 0)
            weights_BxT = jnp.where(own_BxT, weights_BxT, 0)
        losses_BxT = _cross_entropy(logits_BxTxV, labels_BxT, 0.0)
        return _counted(losses_BxT, weights_BxT), weights_BxT

    def metrics(output: Output, batch: Batch) -> Metrics:
        losses_BxT, weights_BxT = loss(output, batch)
        right_BxT = jnp.argmax(output.logits, axis=-1) == batch["labels"]
        return {
            "loss": _total(losses_BxT, weights_BxT),
            "accuracy": _total(right_BxT.astype(jnp.float32), weights_BxT),
        }

    def finish(means: dict[str, float], bytes_per_token: float | None = None) -> dict[str, float]:
        if "loss" not in means:
            return dict(means)
        nats = means["loss"]
        derived = {"perplexity": math.exp(nats) if nats < 700 else math.inf}
        if bytes_per_token:
            derived["bits_per_byte"] = nats / (math.log(2) * bytes_per_token)
        return means | derived

    return Task(inputs, loss, metrics, finish, ("loss", "min"))


def regression(spec: DataSpec, *, target_offset: float = 0.0) -> Task:
    """Numbers for each example, by squared error.

    Labels are float [B, O] (or [B] for one target). `loss = sum_o (logit_o - label_o)^2 / O` for
    each example. Metrics: "loss", "mse" (the same), "mae" (mean absolute error), and for at most 16
    targets "r2", the coefficient of determination `1 - mse_o / var_o`, averaged over the targets
    (scikit-learn's default); a target that is constant is left out of the average.

    r2 comes from sums of labels and of their squares in float32, so labels whose mean is far larger
    than their spread lose digits: give such a mean as `target_offset`. It changes nothing else.

    Args:
        spec: `outputs` is the number of targets.
        target_offset: a number near the labels' mean (default: 0, for standardised labels).

    Raises:
        UserError: (by the loss) the labels aren't a number for each output.
    """
    determined = range(spec.outputs if spec.outputs <= _DETERMINED_OUTPUTS else 0)

    def errors(output: Output, batch: Batch):
        logits_BxO, labels = output.logits.astype(jnp.float32), batch["labels"]
        if labels.size != logits_BxO.size:
            raise UserError(
                f"task 'regression': labels {labels.dtype} {list(labels.shape)} aren't a number "
                f"for each output {list(logits_BxO.shape)}: for classes use 'classification'"
            )
        labels_BxO = labels.astype(jnp.float32).reshape(logits_BxO.shape)
        return logits_BxO - labels_BxO, labels_BxO, _weights(batch, logits_BxO.shape[:1])

    def loss(output: Output, batch: Batch):
        errors_BxO, _, weights_B = errors(output, batch)
        return _counted(jnp.mean(jnp.square(errors_BxO), axis=-1), weights_B), weights_B

    def metrics(output: Output, batch: Batch) -> Metrics:
        errors_BxO, labels_BxO, weights_B = errors(output, batch)
        shifted_BxO = labels_BxO - target_offset
        squared = _total(*loss(output, batch))
        found = {
            "loss": squared,
            "mse": squared,
            "mae": _total(jnp.mean(jnp.abs(errors_BxO), axis=-1), weights_B),
        }
        for o in determined:
            found[f"r2_error_{o}"] = _total(jnp.square(errors_BxO[:, o]), weights_B)
            found[f"r2_label_{o}"] = _total(shifted_BxO[:, o], weights_B)
            found[f"r2_square_{o}"] = _total(jnp.square(shifted_BxO[:, o]), weights_B)
        return found

    def finish(means: dict[str, float], bytes_per_token: float | None = None) -> dict[str, float]:
        del bytes_per_token
        reported = {k: v for k, v in means.items() if not k.startswith("r2_")}
        scores = []
        for o in determined:
            if f"r2_error_{o}" not in means:
                continue
            square = means[f"r2_square_{o}"]
            variance = square - means[f"r2_label_{o}"] ** 2
            # Below this, a variance in float32 is what rounding left of a constant.
            if variance > 1e-6 * square:
                scores.append(1 - means[f"r2_error_{o}"] / variance)
        return reported | ({"r2": sum(scores) / len(scores)} if scores else {})

    return Task(_plain_inputs, loss, metrics, finish, ("loss", "min"))


TASKS: dict[str, Callable[..., Task]] = {
    "classification": classification,
    "language_modeling": language_modeling,
    "regression": regression,
}


def _plain_inputs(batch: Batch) -> tuple[tuple, dict[str, Any]]:
    return (batch["inputs"],), {}


def _as_they_are(means: dict[str, float], bytes_per_token: float | None = None) -> dict[str, float]:
    del bytes_per_token
    return dict(means)


def _are_probabilities(labels: jax.Array) -> bool:
    return jnp.issubdtype(labels.dtype, jnp.floating)


def _weights(batch: Batch, shape: tuple[int, ...]) -> jax.Array:
    """Returns the weights in `shape`; one weight per example covers all its positions."""
    if "weights" not in batch:
        return jnp.ones(shape, jnp.float32)
    weights = batch["weights"].astype(jnp.float32)
    missing = len(shape) - weights.ndim
    return jnp.broadcast_to(weights.reshape(weights.shape + (1,) * missing), shape)


def _cross_entropy(logits: jax.Array, labels: jax.Array, smoothing: Any) -> jax.Array:
    """Returns the cross-entropy in nats over the last axis; NaN for a label out of range."""
    log_total = jax.nn.logsumexp(logits, axis=-1)
    chosen = jnp.take_along_axis(logits, labels[..., None], axis=-1, mode="clip")[..., 0]
    if not isinstance(smoothing, int | float) or smoothing:
        chosen = (1 - smoothing) * chosen + smoothing * jnp.mean(logits, axis=-1)
    inside = (labels >= 0) & (labels < logits.shape[-1])
    return jnp.where(inside, log_total - chosen, jnp.nan)


def _check_logits(task: str, logits: jax.Array, labels: jax.Array, outputs: int) -> None:
    """Refuses logits of another shape than the labels; more outputs than needed do no harm."""
    places = labels.shape[:-1] if _are_probabilities(labels) else labels.shape
    if logits.shape[:-1] != places or logits.shape[-1] < outputs:
        raise UserError(
            f"task '{task}': the model's logits have the shape {list(logits.shape)}, where "
            f"{[*places, outputs]} is needed"
        )


def _counted(losses: jax.Array, weights: jax.Array) -> jax.Array:
    """Returns the losses with 0 for padding, whose labels may be anything."""
    return jnp.where(weights != 0, losses, 0)


def _total(values: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    counted = _counted(values.astype(jnp.float32), weights)
    return jnp.sum(counted * weights), jnp.sum(weights)
