"""The plan of a run: which steps are dispatched together, and what is due after them."""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple


class Chunk(NamedTuple):
    """Steps that are dispatched together.

    Attributes:
        first: the first step, 0-based.
        steps: how many.
        due: names of what is due after them.
    """

    first: int
    steps: int
    due: frozenset[str]

    @property
    def end(self) -> int:
        """The number of steps done after this chunk."""
        return self.first + self.steps


def chunks(start: int, stop: int, length: int, cadences: Mapping[str, int]) -> Iterator[Chunk]:
    """Yields the chunks from step `start` to `stop`.

    Chunks end at absolute multiples of `length`, wherever the run starts: a resumed run dispatches
    the same chunks as an undisturbed one.

    Args:
        start: steps already done.
        stop: steps of the whole run.
        length: most steps in a chunk.
        cadences: name to the number of steps between two times that it is due; 0: at the end only.
    """
    first = start
    while first < stop:
        end = min((first // length + 1) * length, stop)
        due = {name for name, every in cadences.items() if every and end % every == 0}
        if end == stop:
            due = set(cadences)
        yield Chunk(first, end - first, frozenset(due))
        first = end


def should_stop(values: Sequence[float], mode: str, patience: int, min_delta: float) -> bool:
    """Returns whether the last `patience` values brought no improvement.

    Args:
        values: the metric at each evaluation so far; one that is not finite is no improvement.
        mode: "max" or "min".
        patience: evaluations to wait for an improvement.
        min_delta: how much better than the best so far counts.
    """
    sign = 1.0 if mode == "max" else -1.0
    best, waited = float("-inf"), 0
    for value in values:
        score = sign * value
        if score > best + (min_delta if best != float("-inf") else 0.0):
            best, waited = score, 0
        else:
            waited += 1
    return waited >= patience
