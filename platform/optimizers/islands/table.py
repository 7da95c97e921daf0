"""The methods of low-communication training by name."""

from collections.abc import Callable, Mapping

from lamina.platform.optimizers.islands.demo import demo
from lamina.platform.optimizers.islands.method import Method, Whole
from lamina.platform.optimizers.islands.rounds import diloco, local_sgd


def none(whole: Whole) -> None:
    """No islands: all devices train one state, and exchange whole gradients at every step."""
    del whole


METHODS: Mapping[str, Callable[..., Method | None]] = {
    "demo": demo,
    "diloco": diloco,
    "local_sgd": local_sgd,
    "none": none,
}
"""Name to factory."""
