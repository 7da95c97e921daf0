"""The state and the data that a run begins with."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lamina.platform import config as configs
from lamina.platform.data import feed as feeds
from lamina.platform.training import compiled
from lamina.platform.training.experiment import Experiment
from lamina.platform.training.loading import Loaded
from lamina.platform.training.state import TrainState
from lamina.sharding import rules as partition_rules


def create(parts: Experiment, loaded: Loaded) -> TrainState:
    """Returns the state before the first step, made already sharded.

    Hyper-parameters that the state holds are those of the config.

    Args:
        parts: the run's parts.
        loaded: what isn't drawn.
    """
    return creating(parts, loaded)()


def creating(
    parts: Experiment, loaded: Loaded, restored: TrainState | None = None
) -> Callable[[], TrainState]:
    """Returns what makes the state to begin with, and compiles that in a thread meanwhile.

    It holds what is loaded or restored: drop it once it was called.

    Args:
        parts: the run's parts.
        loaded: what isn't drawn; it is taken at once.
        restored: the state of a checkpoint, if there is one: then nothing is made.
    """
    if restored is not None:
        return lambda: restored
    held = parts.state.hyper
    flat = configs.flatten(parts.config) if held else {}
    hyper = {key: np.full(leaf.shape, flat[key], leaf.dtype) for key, leaf in held.items()}
    values = jnp.asarray(compiled.seed_values(parts))
    params, model_state = loaded.take()
    arguments = (values, (dict(params), dict(model_state)), hyper)
    pool = ThreadPoolExecutor(1, "lamina_initial")
    program = pool.submit(compiled.initialiser(parts).lower(*arguments).compile)
    pool.shutdown(wait=False)
    return lambda: program.result()(*arguments)


def open_feed(parts: Experiment) -> feeds.Feed:
    """Returns the feed of the training split."""
    c = parts.config
    feed = feeds.training_feed(
        parts.dataset.splits["train"],
        c.data.batch_size,
        c.data.seed,
        placement=c.data.placement,
        seeds=c.seeds if c.data.order == "per_seed" else (),
        workers=c.data.workers,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        sharding=partition_rules.replicated(parts.mesh),
    )
    if not c.debug.overfit_one_batch:
        return feed

    def first_batch(first_step: int, count: int) -> Any:
        del first_step
        return jax.tree.map(lambda a: np.repeat(a, count, axis=0), feed.read(0, 1))

    return feed._replace(read=first_batch)
