"""What a method of low-communication training is.

An island is a replica with its own part of every batch. There are two kinds of methods: in `Rounds`
islands train their own parameters and meet every few steps; in an `Exchange` they share parameters
and optimizer, and send a small part of their gradients at every step.

Letters: I islands.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import optax

AXIS = "islands"
"""Name of the vectorised axis of the islands, for collective operations of an `Exchange`."""

Whole = Callable[[Any], Any]
"""Gives every island all of an array [I, ...]: what goes through it is what is sent."""


class Rounds(NamedTuple):
    """Islands with parameters and an optimizer of their own, which meet at the end of a round.

    Attributes:
        number: of islands.
        every: steps of a round.
        outer: moves the common parameters by the mean of their differences to the islands'.
        average: differences, a pytree of [I, ...], to their mean as it arrives.
        sent: parameters (maybe abstract) to the bytes that an island sends in a round.
    """

    number: int
    every: int
    outer: optax.GradientTransformation
    average: Callable[[Any], Any]
    sent: Callable[[Any], int]


class Exchange(NamedTuple):
    """Islands with common parameters and a common optimizer, which exchange at every step.

    Attributes:
        number: of islands.
        transformation: of an island's gradient to what the optimizer is given, the same on all
            islands; it uses collective operations over `AXIS`. Its state is each island's own.
        sent: parameters (maybe abstract) to the bytes that an island sends in a step.
    """

    number: int
    transformation: optax.GradientTransformation
    sent: Callable[[Any], int]


Method = Rounds | Exchange


def check_number(number: int) -> None:
    """Raises a `ValueError` for less than one island."""
    if number < 1:
        raise ValueError(f"number = {number} should be at least 1 island")
