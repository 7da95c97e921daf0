"""Model merging: one parameter tree from several, without training.

`create(name, **keys)` gives a merger; `merger(models, base=..., weights=...)` merges.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lamina.platform.merging.mergers import Merger


def create(name: str, **keys: Any) -> "Merger":
    """Returns a merger: `merger(models, base=..., weights=..., axes=...)` gives parameters.

    Args:
        name: one of `lamina.platform.merging.table.MERGERS`, or `"package.module:factory"`.
        **keys: the method's own, such as `density`, `scale`, `normalize`, `t`.

    Raises:
        UserError: there is no such method, or a key is unknown or out of its range.

    Example:
        >>> import numpy as np
        >>> merger = create("task_arithmetic", scale=0.5)
        >>> base, tuned = {"w": np.zeros(2, np.float32)}, {"w": np.ones(2, np.float32)}
        >>> merger([tuned], base=base)["w"].tolist()
        [0.5, 0.5]
    """
    # Merging files needs no jax, which the table's mergers of trees do.
    from lamina.platform.merging import table

    return table.create(name, **keys)
