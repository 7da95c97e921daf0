"""Metrics of incremental learning, all from one tensor of accuracies.

The tensor is `[..., time, task]`: the accuracy on each test task at each time of evaluation, with
seeds in front. Where it is square, row `i` is the time after experience `i`, in which task `i` was
learned. A finer grid in time names with `ends` the rows at which an experience ended. A task that
was not evaluated before its own experience may have NaN there. `result.json` holds these metrics
for each seed, `accuracy.npy` the tensor.

Letters: T times, J tasks (as many as experiences), R[i, j] accuracy on task j after experience i.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

Array = np.ndarray


def after_experiences(accuracy: Array, ends: Sequence[int] | None = None) -> Array:
    """Returns R, float64 [..., J, J]: the rows at which an experience ended.

    Args:
        accuracy: [..., T, J].
        ends: rows at the ends of the experiences, in order. Default: the rows as they are.

    Raises:
        ValueError: the tensor isn't square and there are no `ends`, or not as many as tasks, or
            they are no rows in order.
    """
    whole = np.asarray(accuracy, np.float64)
    if whole.ndim < 2 or not whole.shape[-1]:
        raise ValueError(f"accuracy should be [..., time, task], not of shape {whole.shape}")
    rows = whole if ends is None else whole[..., _places(ends, whole.shape[-2]), :]
    if rows.shape[-2] != rows.shape[-1]:
        raise ValueError(
            f"accuracy has {rows.shape[-2]} times and {rows.shape[-1]} tasks: name the rows at the "
            "ends of the experiences with ends="
        )
    return rows


def _places(ends: Sequence[int], times: int) -> list[int]:
    """Returns the rows that `ends` names, counted from the first."""
    places = [int(end) + times * (end < 0) for end in ends]
    if not all(0 <= place < times for place in places) or sorted(set(places)) != places:
        raise ValueError(f"ends = {list(ends)} should be increasing rows of the {times} times")
    return places


def final_average_accuracy(accuracy: Array, ends: Sequence[int] | None = None) -> Array:
    """Returns ACC = mean_j R[J, j]: accuracy on all tasks after the last experience."""
    return after_experiences(accuracy, ends)[..., -1, :].mean(-1)


def average_incremental_accuracy(accuracy: Array, ends: Sequence[int] | None = None) -> Array:
    """Returns AIA = mean_t (mean_{j<=t} R[t, j]).

    That is iCaRL's average incremental accuracy (Rebuffi et al. 2017, arXiv 1611.07725) for tasks
    of equal size.
    """
    rows = after_experiences(accuracy, ends)
    seen = np.tril(np.ones(rows.shape[-2:], bool))
    return (np.where(seen, rows, 0.0).sum(-1) / seen.sum(-1)).mean(-1)


def forgetting(
    accuracy: Array, ends: Sequence[int] | None = None, *, from_own_task: bool = False
) -> Array:
    """Returns F = mean_{j<J} (max_{l<J} R[l, j] - R[J, j]); 0 for a single experience.

    After Chaudhry et al. (2018, arXiv 1801.10112). The maximum is over all earlier experiences, not
    only those since task j was learned, and doesn't include the last, so that a task that gained
    counts as negative forgetting.

    Args:
        accuracy: [..., T, J].
        ends: as for `after_experiences`.
        from_own_task: take the maximum from the task's own experience on (l >= j).
    """
    rows = after_experiences(accuracy, ends)
    tasks = rows.shape[-1]
    if tasks == 1:
        return np.zeros(rows.shape[:-2])
    earlier = rows[..., :-1, :-1]
    learned = np.tril(np.ones((tasks - 1, tasks - 1), bool))
    counts = learned if from_own_task else learned | ~np.isnan(earlier)
    earlier = np.where(counts, earlier, -np.inf)
    return (earlier.max(-2) - rows[..., -1, :-1]).mean(-1)


def backward_transfer(accuracy: Array, ends: Sequence[int] | None = None) -> Array:
    """Returns BWT = mean_{j<J} (R[J, j] - R[j, j]); 0 for a single experience.

    After Lopez-Paz and Ranzato (2017, arXiv 1706.08840).
    """
    rows = after_experiences(accuracy, ends)
    if rows.shape[-1] == 1:
        return np.zeros(rows.shape[:-2])
    own = np.diagonal(rows, axis1=-2, axis2=-1)
    return (rows[..., -1, :-1] - own[..., :-1]).mean(-1)


def forward_transfer(
    accuracy: Array, ends: Sequence[int] | None = None, *, initial: Array | float = 0.0
) -> Array:
    """Returns FWT = mean_{j>1} (R[j-1, j] - initial_j); 0 for a single experience.

    After Lopez-Paz and Ranzato (2017, arXiv 1706.08840). It tells little where a head can't name
    the classes of later tasks, as in class-incremental streams.

    Args:
        accuracy: [..., T, J].
        ends: as for `after_experiences`.
        initial: [..., J], accuracies before training; 0 where they aren't known.
    """
    rows = after_experiences(accuracy, ends)
    tasks = rows.shape[-1]
    if tasks == 1:
        return np.zeros(rows.shape[:-2])
    before = np.diagonal(rows, offset=1, axis1=-2, axis2=-1)
    start = np.broadcast_to(np.asarray(initial, np.float64), (*rows.shape[:-2], tasks))
    return (before - start[..., 1:]).mean(-1)


def intransigence(
    accuracy: Array, ends: Sequence[int] | None = None, *, reference: Array | float = 1.0
) -> Array:
    """Returns I = mean_k (reference_k - R[k, k]): what was not learned of a new task.

    After Chaudhry et al. (2018, arXiv 1801.10112).

    Args:
        accuracy: [..., T, J].
        ends: as for `after_experiences`.
        reference: [..., J], accuracy on task k of a model trained on the data of tasks 1..k
            together (the diagonal of a run of `cumulative`). Default: 1, so that the number is the
            error on a task just learned.
    """
    own = np.diagonal(after_experiences(accuracy, ends), axis1=-2, axis2=-1)
    return (np.asarray(reference, np.float64) - own).mean(-1)


def minimum_accuracy(accuracy: Array, ends: Sequence[int] | None = None) -> Array:
    """Returns min-ACC = mean_{j<J} (min_e A[e, j]), e over all times after experience j.

    After De Lange et al. (2022, arXiv 2205.13452). The minimum falls as the grid gets finer: it is
    comparable only between runs with the same times of evaluation. A single experience gives its
    accuracy.
    """
    whole = np.asarray(accuracy, np.float64)
    rows = after_experiences(accuracy, ends)
    tasks = rows.shape[-1]
    if tasks == 1:
        return rows[..., 0, 0]
    place = list(range(tasks)) if ends is None else _places(ends, whole.shape[-2])
    lowest = [whole[..., place[j] + 1 :, j].min(-1) for j in range(tasks - 1)]
    return np.stack(lowest, -1).mean(-1)


METRICS: Mapping[str, Callable[..., Array]] = {
    "final_average_accuracy": final_average_accuracy,
    "average_incremental_accuracy": average_incremental_accuracy,
    "forgetting": forgetting,
    "backward_transfer": backward_transfer,
    "forward_transfer": forward_transfer,
    "intransigence": intransigence,
    "minimum_accuracy": minimum_accuracy,
}
"""All metrics, in the order in which they are shown."""
