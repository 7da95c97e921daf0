"""iCaRL: exemplars chosen by herding, and classes answered by the nearest mean of exemplars."""

from typing import Any

import jax
import jax.numpy as jnp

from lamina.platform.incremental import memory as memories
from lamina.platform.incremental.learners import features
from lamina.platform.training.learners import Draw, Learner, Mixed, Moment, Own, Setup, Sweep


def icarl(*, memory: int = 2000, replay: int = 0) -> Learner:
    """Distils and classifies with one sigmoid a class, herds exemplars, answers the nearest mean.

    Rebuffi et al. (2017, arXiv 1611.07725). The loss of a row, of the stream or of the memory, is
    the sum over the classes seen of the binary cross-entropy: against the sigmoid of the model at
    the end of the last experience for classes seen before, and against the label for those of this
    one (also where they came before, as all do in a domain-incremental stream); then the mean over
    rows. At the end of an experience the memory takes its rows in the order of herding: the k-th
    exemplar of a class minimises `|| mu - (phi_x + sum of the k - 1 before) / k ||`, with features
    phi of length 1 and mu their mean. The memory holds equal numbers of each class and gives up the
    last ones first. The answer is the class whose exemplars' mean, of length 1, is nearest; it is
    computed again for all classes at each end, so before the first one the logits answer.

    The authors train on the stream and all exemplars shuffled together; here each batch has rows of
    the memory beside it.

    Args:
        memory: exemplars in all. Default 2000: the paper's for CIFAR-100.
        replay: rows drawn at each step; 0: as many as the stream's batch has.

    Raises:
        UserError: the memory holds less than is drawn.
    """
    memories.check_size(memory, replay)
    draws = {"replay": Draw(replay, labelled=True)}
    kept = memories.create(memory, policy="balanced", draws=draws, at_end="herded")

    def init(setup: Setup) -> Own:
        classes = setup.space.classes
        return {
            "teacher": jax.tree.map(jnp.copy, setup.params),
            "old": jnp.zeros(classes, bool),
            "mean": jnp.zeros((classes, features.width(setup, "icarl"))),
            # Their lengths tell sizes where only the state is at hand.
            "rows": jnp.zeros(setup.space.rows, bool),
        }

    def loss(loss, own: Own, params: Any, mixed: Mixed, output: Any, moment: Moment, forward: Any):
        del loss, params
        teacher = forward(own["teacher"], mixed.batch).logits
        rows, seen, old = mixed.batch, own["old"] | moment.now, own["old"] & ~moment.now
        losses_R = cross_entropies(teacher, output.logits, rows["labels"], old, seen)
        weights_R = rows["weights"]
        return jnp.sum(losses_R * weights_R) / jnp.maximum(jnp.sum(weights_R), 1.0)

    def start(own: Own, params: Any, moment: Moment) -> Any:
        del params, moment
        count = len(own["rows"])
        return {
            "features": jnp.zeros((count, own["mean"].shape[-1]), own["mean"].dtype),
            "labels": jnp.zeros(count, jnp.int32),
            "there": own["rows"],
            "place": jnp.zeros((), jnp.int32),
        }

    def add(carry: Any, own: Own, params: Any, mixed: Mixed, forward: Any, moment: Moment) -> Any:
        del own, moment
        rows = mixed.batch
        phi = features.unit(forward(params, rows).features.astype(carry["features"].dtype))
        new = {"features": phi, "labels": rows["labels"], "there": rows["there"]}
        put = lambda name: jax.lax.dynamic_update_slice_in_dim(
            carry[name], new[name].astype(carry[name].dtype), carry["place"], axis=0
        )
        return {name: put(name) for name in new} | {"place": carry["place"] + len(phi)}

    def priority(carry: Any, own: Own, params: Any, moment: Moment) -> jax.Array:
        del params
        seen = own["old"] | moment.now
        most = -(-memory // jnp.maximum(seen.sum(), 1))
        rank = herded(carry["features"], carry["labels"], carry["there"], len(seen), most)
        return jnp.where(rank < most, rank / (memory + 1.0), memories.EMPTY)

    def review(own: Own, params: Any, rows: Any, there: Any, forward: Any, moment: Moment) -> Own:
        del moment
        phi = features.unit(forward(params, rows).features.astype(own["mean"].dtype))
        members = jax.nn.one_hot(rows["labels"], len(own["old"]), dtype=phi.dtype)
        total = (members * there[:, None]).T @ phi
        return own | {"mean": features.unit(total)}

    def end(own: Own, state: Any, moment: Moment) -> tuple[Own, Any]:
        return own | {"teacher": state.params, "old": moment.seen}, state

    def predict(own: Own, output: Any, moment: Moment) -> jax.Array:
        del moment
        phi = features.unit(output.features.astype(own["mean"].dtype))
        there = jnp.any(own["mean"] != 0, axis=-1)
        # Both of length 1: the nearest mean is that with the largest product.
        scores = jnp.where(there, phi @ own["mean"].T, -jnp.inf)
        return jnp.where(jnp.any(there), scores, output.logits)

    return Learner(
        init=init,
        loss=loss,
        sweep=Sweep(start, add, lambda carry, own, *rest: own, 0, priority),
        review=review,
        end=end,
        predict=predict,
        memory=kept,
        needs=frozenset({"boundaries", "classes", "first"}),
    )


def cross_entropies(
    teacher: jax.Array, student: jax.Array, labels: jax.Array, old: jax.Array, seen: jax.Array
) -> jax.Array:
    """Returns the sums over classes of binary cross-entropies [B].

    Args:
        teacher: logits [B, C], whose sigmoids are the targets of old classes.
        student: logits [B, C].
        labels: int [B], the targets of the other classes.
        old: bool [C].
        seen: bool [C]: classes that count.
    """
    hot = jax.nn.one_hot(labels, student.shape[-1], dtype=student.dtype)
    target = jnp.where(old, jax.nn.sigmoid(jax.lax.stop_gradient(teacher)), hot)
    entropy = -(target * jax.nn.log_sigmoid(student) + (1 - target) * jax.nn.log_sigmoid(-student))
    return jnp.where(seen, entropy, 0.0).sum(-1)


def herded(
    features: jax.Array, labels: jax.Array, there: jax.Array, classes: int, most: jax.Array
) -> jax.Array:
    """Returns the place of each row in the herding of its class, int32 [n]; `most` where none.

    Args:
        features: phi [n, D].
        labels: int [n].
        there: bool [n].
        classes: C.
        most: int []: exemplars of each class.
    """
    members = jax.nn.one_hot(labels, classes, dtype=features.dtype) * there[:, None]
    mean = (members.T @ features) / jnp.maximum(members.sum(0), 1.0)[:, None]
    square = jnp.sum(features**2, axis=-1)

    def pick(k: jax.Array, carry: Any) -> Any:
        rank, total = carry
        # || mu - (phi + total) / (k+1) ||^2 times (k+1)^2, without what all rows of a class share.
        toward = (k + 1) * mean - total
        cost = square - 2 * jnp.take_along_axis(features @ toward.T, labels[:, None], -1)[:, 0]
        free = there & (rank == most)
        costs = jnp.where((members > 0) & free[:, None], cost[:, None], jnp.inf)
        chosen, found = jnp.argmin(costs, axis=0), jnp.isfinite(costs.min(axis=0))
        rank = rank.at[jnp.where(found, chosen, len(rank))].set(k, mode="drop")
        return rank, total + jnp.where(found[:, None], features[chosen], 0.0)

    start = (jnp.full(len(labels), most, jnp.int32), jnp.zeros_like(mean))
    rank, _ = jax.lax.fori_loop(0, most, pick, start)
    return rank
