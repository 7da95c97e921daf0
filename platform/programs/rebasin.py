"""The program `rebasin`: trains models independently, matches their units, and measures barriers.

The seeds of a training config are trained, in `train/`; then for each pair of them (the first and
the second, the third and the fourth) the loss is followed along the straight line between the two,
before and after the second's units are matched to the first's (Ainsworth et al. 2022, arXiv
2209.04836), and after REPAIR (Jordan et al. 2022, 2211.08403) if that is wanted. Each pair is a
small file: a run that was killed goes on in the training, or with the pair that it was at, with the
same numbers.
"""

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import FrozenConfigDict

from lamina.models import placement
from lamina.platform import config as configs
from lamina.platform.data import batches, order
from lamina.platform.data import feed as feeds
from lamina.platform.data.dataset import Dataset
from lamina.platform.errors import UserError
from lamina.platform.merging import barrier, matching, permutations, repair, symmetries
from lamina.platform.programs import stage, train
from lamina.platform.programs.context import Context, Outcome
from lamina.platform.reporting import folder, formats, records, storage
from lamina.platform.training import compiled, evaluation, evaluation_step, experiment, trained
from lamina.platform.training import settings as training_settings
from lamina.platform.training.experiment import Experiment

TRAINING = "train"
PAIRS = "pairs"
BATCHES_AT_ONCE = 64
"""Batches of the split that are on the devices at once."""


class Rebasin(NamedTuple):
    """What is measured.

    Attributes:
        points: places on the line, the ends among them.
        split: on which; keep "test" for the last measurement.
        restarts: starts of each matching, of which the best counts.
        repair: whether to measure the line with the units' statistics repaired, too.
        examples: training examples for that, in batches of data.batch_size.
    """

    points: int = 25
    split: Literal["train", "validation", "test"] = "validation"
    restarts: int = 1
    repair: bool = False
    examples: int = 4096


def _contradictions(c: FrozenConfigDict) -> Iterable[str]:
    yield from experiment.SCHEMA.contradictions(c)
    if len(c.seeds) < 2 or len(c.seeds) % 2:
        yield f"seeds = {tuple(c.seeds)} should be pairs: two, four... of them"
    if c.rebasin.points < 3:
        yield f"rebasin.points = {c.rebasin.points} should be 3 or more"
    for key in ("restarts", "examples"):
        if c.rebasin[key] < 1:
            yield f"rebasin.{key} = {c.rebasin[key]} should be 1 or more"


SCHEMA = experiment.SCHEMA._replace(
    blocks={**experiment.SCHEMA.blocks, "rebasin": Rebasin}, contradictions=_contradictions
)
"""The vocabulary: that of training, and the block `rebasin`."""


class Prepared(NamedTuple):
    """A measurement before its folder exists.

    Attributes:
        parts: of the training.
        config: resolved.
        training: the config of the training alone.
        symmetries: what may be permuted in the model.
        trust: packages whose factories the config may name.
        devices: the devices to use.
    """

    parts: Experiment
    config: FrozenConfigDict
    training: FrozenConfigDict
    symmetries: symmetries.Symmetries
    trust: Sequence[str]
    devices: Any


def resolve(config: Any, trust: Sequence[str] = configs.EVERYONE) -> FrozenConfigDict:
    """Returns the whole config, checked.

    Raises:
        UserError: lists all mistakes.
    """
    return configs.resolve(config, SCHEMA, trust)


def prepare(
    config: FrozenConfigDict,
    trust: Sequence[str],
    devices: Sequence[jax.Device] | None,
    fresh: bool,
    dataset: Dataset | None = None,
) -> Prepared:
    """Builds the parts of the training, and finds what may be permuted in the model.

    Raises:
        UserError: the config doesn't fit the data or the devices, or nothing may be permuted.
    """
    del fresh
    if jax.process_count() > 1:
        raise UserError("rebasin runs in one process")
    plain = configs.thaw(config)
    del plain["rebasin"]
    training = experiment.resolve({**plain, "program": "train"}, trust)
    parts = experiment.assemble(training, trust, devices, dataset)
    if config.rebasin.split not in parts.dataset.splits:
        splits = ", ".join(parts.dataset.splits)
        raise UserError(f"rebasin.split = {config.rebasin.split!r}: the data set has {splits}")
    found = symmetries.derive(parts.recipe.model, parts.dataset.spec)
    if not found.spec.permuted():
        raise UserError("no units of this model can be permuted: there is nothing to match")
    return Prepared(parts, config, training, found, trust, devices)


def describe(config: FrozenConfigDict, trust: Sequence[str], dataset: Dataset) -> list[str]:
    """Returns what `lamina check` says: the pairs, and what is permuted."""
    prepared = prepare(config, trust, None, True, dataset)
    spec, m = prepared.symmetries.spec, config.rebasin
    lines = [f"seeds {a} and {b}: {m.points} points on {m.split}" for a, b in pairs(config)]
    for name in spec.permuted():
        group = spec.groups[name]
        each = f" for each of {', '.join(group.given)}" if group.given else ""
        lines.append(f"permutes {group.size} units{each}: {name}, {len(spec.users(name))} leaves")
    return lines


def forbidden_changes(old: Mapping, new: Mapping) -> dict[str, tuple[Any, Any]]:
    """Returns the differences between two configs that forbid the new one to go on."""
    return configs.difference(old, new, train.FREE)


def pairs(config: FrozenConfigDict) -> list[tuple[int, int]]:
    """Returns the seeds two by two."""
    return list(zip(config.seeds[::2], config.seeds[1::2], strict=True))


def run(prepared: Prepared, context: Context) -> Outcome:
    """Trains, and measures the pairs that the folder has no file of.

    Args:
        prepared: the parts.
        context: the run folder and what else a program is given.

    Raises:
        InterruptedRun: a signal asked to stop.
        DivergedError: the training diverged.
    """
    begin = time.monotonic()
    folder.write_parameters(context.workdir, compiled.parameter_rows(prepared.parts))
    root = os.path.join(context.workdir, TRAINING)
    stage.run(prepared.training, context._replace(workdir=root), prepared.devices)
    found = []
    for one, other in pairs(prepared.config):
        path = storage.as_path(context.workdir) / PAIRS / f"{one}_{other}.json"
        known = storage.read_object(path)
        if not known:
            context.stop.before(f"the seeds {one} and {other}")
            known = storage.plain(measure(prepared, root, one, other))
            storage.write_json(path, known)
        found.append(known)
        _say(prepared, context, known)
    result = summarise(prepared, found)
    result["seconds"] = time.monotonic() - begin
    return Outcome(storage.plain(result))


def measure(prepared: Prepared, root: str, one: int, other: int) -> dict[str, Any]:
    """Returns what is found for two seeds: metrics along the line, before and after matching."""
    m, parts = prepared.config.rebasin, prepared.parts
    spec, trees = prepared.symmetries.spec, []
    for seed in (one, other):
        read = trained.read(root, seed=seed, trust=prepared.trust)
        trees.append(symmetries.joined(read.params, read.model_state))
    begin = time.monotonic()
    matched = matching.match(spec, *trees, restarts=m.restarts)
    seconds = time.monotonic() - begin
    first, second = trees
    moved = permutations.apply(spec, matched.permutations, second)
    alphas = np.linspace(0, 1, m.points)
    line = Line(parts, m.split)
    try:
        curves = {"before": line.along(first, second, alphas)}
        curves["after"] = line.along(first, moved, alphas)
        if m.repair:
            inputs = training_inputs(parts, m.examples)
            curves["repaired"] = line.along(first, moved, alphas, inputs)
    finally:
        line.close()
    return {
        "seeds": [one, other],
        "alphas": alphas.tolist(),
        "curves": curves,
        "similarity": [matched.before, matched.similarity],
        "sweeps": matched.sweeps,
        "matching_seconds": seconds,
    }


class Line:
    """Evaluates a split along lines between models: each line is one compiled pass.

    Args:
        parts: of the training.
        split: the split's name.
    """

    def __init__(self, parts: Experiment, split: str):
        c = parts.config
        size = c.evaluation.batch_size or c.data.batch_size
        self._parts, self._split = parts, split
        self._feed = feeds.evaluation_feed(
            parts.dataset.splits[split], size, placement=c.data.placement, workers=c.data.workers
        )
        self._program: Any = None

    def along(
        self,
        one: Any,
        other: Any,
        alphas: np.ndarray,
        repaired_with: jax.Array | None = None,
    ) -> dict[str, list[float]]:
        """Returns each metric at each place.

        Args:
            one: the model at 0, as `symmetries.joined` makes it.
            other: the one at 1.
            alphas: the places.
            repaired_with: inputs `[batches, B, ...]` on which the models between are repaired.
        """
        feed, recipe = self._feed, self._parts.recipe

        def sums(tree: Any, constants: Any, rows: Any) -> Any:
            params, model_state = symmetries.separate(tree)

            def body(row: Any) -> Any:
                batch = feed.select(constants, row)
                return evaluation_step.evaluate_batch(recipe, params, model_state, batch)

            return jax.tree.map(lambda leaf: leaf.sum(0), jax.lax.map(body, rows))

        def places(one: Any, other: Any, inputs: Any, places: Any, *data: Any) -> Any:
            def at(alpha: jax.Array) -> Any:
                tree = barrier.interpolate(one, other, alpha)
                if inputs is not None:
                    tree = repair.repair(recipe.model, one, other, tree, inputs, alpha=alpha)
                return sums(tree, *data)

            with placement.use(recipe.placement):
                return jax.lax.map(at, places)

        self._program = self._program or jax.jit(places)
        wanted = jnp.asarray(alphas, jnp.float32)
        totals: Any = None
        for start in range(0, feed.steps, BATCHES_AT_ONCE):
            rows = feed.read(start, min(BATCHES_AT_ONCE, feed.steps - start))
            new = self._program(one, other, repaired_with, wanted, feed.constants, rows)
            totals = new if totals is None else jax.tree.map(jnp.add, totals, new)
        host = jax.device_get(totals)
        bytes_per_token = self._parts.dataset.bytes_per_token.get(self._split)
        found: dict[str, list[float]] = {}
        for i in range(len(alphas)):
            at = {name: (total[i], weight[i]) for name, (total, weight) in host.items()}
            for name, value in evaluation.finished(self._parts, at, bytes_per_token).items():
                found.setdefault(name, []).append(float(value))
        return found

    def close(self) -> None:
        """Stops what reads the split."""
        self._feed.close()


def training_inputs(parts: Experiment, number: int) -> jax.Array:
    """Returns training inputs `[batches, B, ...]`, the first of the order of data.seed."""
    source, c = parts.dataset.splits["train"], parts.config
    size = min(c.data.batch_size, len(source))
    count = max(1, min(number, len(source)) // size)
    chosen = order.permutation(len(source), c.data.seed, 0)[: count * size]
    rows = batches.fetch(source, chosen)["inputs"]
    batch = feeds.normalise({"inputs": jnp.asarray(rows)})["inputs"]
    return batch.reshape(count, size, *batch.shape[1:])


def summarise(prepared: Prepared, found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns what `result.json` holds: the barriers of all pairs, and the lines to draw."""
    split = prepared.config.rebasin.split
    kinds = list(found[0]["curves"])
    final = {}

    def put(name: str, values: Sequence[float]) -> None:
        # A value for each seed, as in any run: that of its pair.
        entry = records.summary(values)._asdict()
        final[f"{split}/{name}"] = {**entry, "values": np.repeat(entry["values"], 2).tolist()}

    for metric in _shown(prepared, found):
        mode = training_settings.better(metric, "auto")
        for kind in kinds:
            values = [
                barrier.barrier(pair["alphas"], pair["curves"][kind][metric], mode=mode)
                for pair in found
            ]
            put(f"{metric}_barrier_{kind}", values)
            middles = [_middle(pair["curves"][kind][metric]) for pair in found]
            put(f"{metric}_midpoint_{kind}", middles)
    shares = [
        barrier.barrier(pair["alphas"], pair["curves"]["after"]["loss"])
        / max(barrier.barrier(pair["alphas"], pair["curves"]["before"]["loss"]), 1e-12)
        for pair in found
    ]
    put("loss_barrier_left", shares)
    return {
        "final": final,
        "pairs": list(found),
        "groups": {n: list(prepared.symmetries.spec.shape(n)) for n in _permuted(prepared)},
        "panels": [_panel(prepared, found, metric) for metric in _shown(prepared, found)],
        "steps": prepared.parts.steps,
    }


def _permuted(prepared: Prepared) -> list[str]:
    return prepared.symmetries.spec.permuted()


def _shown(prepared: Prepared, found: Sequence[Mapping[str, Any]]) -> list[str]:
    """The loss, and the metric by which the task selects."""
    chosen = prepared.parts.recipe.task.select[0]
    known = found[0]["curves"]["before"]
    return [name for name in dict.fromkeys(("loss", chosen)) if name in known]


def _middle(values: Sequence[float]) -> float:
    """Half-way, between the two middle places if there are two."""
    half = (len(values) - 1) / 2
    return (values[int(np.floor(half))] + values[int(np.ceil(half))]) / 2


def _panel(prepared: Prepared, found: Sequence[Mapping[str, Any]], metric: str) -> dict[str, Any]:
    """Returns a metric along the lines of all pairs, as a section of the report."""
    split, mode = prepared.config.rebasin.split, training_settings.better(metric, "auto")
    kinds = list(found[0]["curves"])
    number = lambda pair, kind: formats.number(
        barrier.barrier(pair["alphas"], pair["curves"][kind][metric], mode=mode)
    )
    charts = []
    for pair in found:
        places = [round(100 * float(alpha), 3) for alpha in pair["alphas"]]
        lines = [{"label": k, "x": places, "y": pair["curves"][k][metric]} for k in kinds]
        name = f"{split}/{metric} from seed {pair['seeds'][0]} to {pair['seeds'][1]}, %"
        charts.append({"name": name, "lines": lines})
    return {
        "title": f"{metric} between models",
        "heads": ["seeds", *(f"barrier {kind}" for kind in kinds)],
        "rows": [
            [" and ".join(map(str, pair["seeds"])), *(number(pair, kind) for kind in kinds)]
            for pair in found
        ],
        "charts": charts,
        "note": "A barrier is how far the line lies on the bad side of the straight line between "
        "its ends, where it does so most.",
    }


def _say(prepared: Prepared, context: Context, pair: Mapping[str, Any]) -> None:
    losses = {k: barrier.barrier(pair["alphas"], c["loss"]) for k, c in pair["curves"].items()}
    told = ", ".join(f"{kind} {formats.number(value)}" for kind, value in losses.items())
    one, other = pair["seeds"]
    split = prepared.config.rebasin.split
    context.say(f"seeds {one} and {other}: {split}/loss barrier {told}")
