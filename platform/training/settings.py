"""The vocabulary of a training config: its plain keys and its blocks without a name."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

_EMPTY: Mapping[str, Any] = MappingProxyType({})


class Settings(NamedTuple):
    """The plain top-level keys.

    Attributes:
        program: which program runs the config.
        seeds: the value of each seed (not how many); several are trained in one program.
        steps: optimizer steps; or give `epochs`.
        epochs: passes over the training split, rounded up to whole steps; or give `steps`.
        accumulation: parts into which a batch is cut; their gradients are summed before the update.
        clip_norm: largest global norm of a gradient; 0 does not clip.
        precision: dtype of the computation. Parameters and optimizer state stay float32; float16
            uses a dynamic loss scale.
        log_every: steps between two records; a logged value is the weighted mean since the last.
        steps_per_call: steps in one dispatch. Records, evaluation and checkpoints happen between
            dispatches, so their cadences are multiples of it.
        init_from: a run folder, a safetensors file, or a folder of them as Hugging Face writes it,
            whose parameters the run starts from.
        evaluators: name to `dict(data=..., every=...)`: further data to evaluate on.
        trackers: what is written besides `metrics.jsonl` and the console.
        tracker_options: tracker to its keys, such as `wandb=dict(project="digits")`.
    """

    program: str = "train"
    seeds: tuple[int, ...] = (0,)
    steps: int = 0
    epochs: float = 0.0
    accumulation: int = 1
    clip_norm: float = 0.0
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    log_every: int = 10
    steps_per_call: int = 10
    init_from: str = ""
    evaluators: Mapping[str, Any] = _EMPTY
    trackers: tuple[str, ...] = ("tensorboard",)
    tracker_options: Mapping[str, Any] = _EMPTY


class Optimizer(NamedTuple):
    """Keys of the `optimizer` block that every optimizer has.

    Attributes:
        learning_rate: the peak of the schedule.
        rules: a rule's name to a block with `paths` (regular expressions of parameter paths), and
            what those parameters have instead: `learning_rate_factor`, keys such as `weight_decay`,
            or another optimizer's `name` and keys.
    """

    learning_rate: float
    rules: Mapping[str, Any] = _EMPTY


class Data(NamedTuple):
    """Keys of the `data` block that every data set has.

    Attributes:
        batch_size: examples in a step, over all devices and processes.
        seed: decides the order of the training examples, whatever the run's seeds are.
        order: "shared" gives every seed the same batches, "per_seed" each its own order.
        augmentations: names, applied in this order on the device.
        augmentation_options: name to that augmentation's keys.
        placement: "device" keeps the training split on the devices, "grain" reads it with workers,
            "auto" decides by its size. Both give the same batches.
        workers: processes that read ahead with "grain"; 0 reads in a thread.
        balance_length: above 0, the packed rows of a batch go to the devices by the cost of their
            attention instead of in their order. It is the length of a document at which attention
            costs as much as all else: 12 times the width of a transformer. For attention kernels
            that skip what a document doesn't see.
        stand_in: a `data` block (with its own `name`) of random data of the same shapes: what
            `lamina check` takes where the data set isn't on this machine.
    """

    batch_size: int
    seed: int = 0
    order: Literal["shared", "per_seed"] = "shared"
    augmentations: tuple[str, ...] = ()
    augmentation_options: Mapping[str, Any] = _EMPTY
    placement: Literal["auto", "device", "grain"] = "auto"
    workers: int = 0
    balance_length: float = 0.0
    stand_in: Mapping[str, Any] = _EMPTY


class Evaluation(NamedTuple):
    """When and how the validation split is evaluated (the test split is read once, at the end).

    Attributes:
        every: steps between evaluations; 0 evaluates at the end only.
        batch_size: examples evaluated at once; 0 takes `data.batch_size`.
    """

    every: int = 0
    batch_size: int = 0


class Checkpoint(NamedTuple):
    """When checkpoints are saved and which are kept.

    Attributes:
        every: steps between checkpoints; 0 saves at the end (and when interrupted) only.
        keep: how many of the newest are kept.
        best: a metric such as "validation/accuracy": its best checkpoint is kept as well.
        mode: whether the best is the largest or the smallest value; "auto" takes the smallest of
            losses, errors, perplexities and bits, and the largest of all else.
    """

    every: int = 0
    keep: int = 2
    best: str = ""
    mode: Literal["auto", "max", "min"] = "auto"


class EarlyStopping(NamedTuple):
    """Ends a run whose metric, averaged over seeds, no longer improves.

    Attributes:
        metric: such as "validation/loss"; "" never stops.
        mode: whether larger or smaller is better; "auto" as for `checkpoint.mode`.
        patience: evaluations without an improvement after which the run stops.
        min_delta: how much better counts as an improvement.
    """

    metric: str = ""
    mode: Literal["auto", "max", "min"] = "auto"
    patience: int = 5
    min_delta: float = 0.0


class Ema(NamedTuple):
    """Exponential moving average of the parameters, used for evaluation and by `restore`.

    What a model keeps besides, such as batch statistics, is that of the last step.

    Attributes:
        decay: share of the old average kept in a step, at most (1 + t) / (10 + t) at step t so
            that the average forgets its start; 0 keeps no average.
    """

    decay: float = 0.0


class Swa(NamedTuple):
    """Stochastic weight averaging (Izmailov et al. 2018, arXiv 1803.05407), used as `ema` is.

    Attributes:
        start: step after which averaging begins; until it has, the parameters themselves are used.
        every: steps between two parameters that are averaged, all alike; 0 keeps no average.
    """

    start: int = 0
    every: int = 0


class Lawa(NamedTuple):
    """Latest weight averaging (Kaddour 2022, arXiv 2209.14981), used as `ema` is.

    Attributes:
        latest: how many parameters are kept, of which the average is taken (default: the paper's).
        every: steps between two of them; 0 keeps no average.
    """

    latest: int = 6
    every: int = 0


class Adapters(NamedTuple):
    """Low-rank adapters (LoRA; Hu et al. 2021, arXiv 2106.09685): only they are trained.

    Attributes:
        rank: rank of the update of each matrix; 0 trains the model itself.
        alpha: the update is scaled by alpha / rank.
        paths: regular expressions; a parameter whose path one of them matches gets an adapter.
    """

    rank: int = 0
    alpha: float = 16.0
    paths: tuple[str, ...] = (".*kernel",)


class InitRules(NamedTuple):
    """What `init_from` takes, and what is not trained.

    Attributes:
        include: regular expressions; found in a path of this model, they load it (default: all).
        exclude: regular expressions; found in a path, they leave it as it is drawn.
        rename: (pattern, replacement) pairs from the source's paths to this model's.
        freeze: regular expressions; found in a path, they keep it from being trained: no gradient,
            no moments and no weight decay reach it.
    """

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    rename: tuple[tuple[str, str], ...] = ()
    freeze: tuple[str, ...] = ()


class Sharding(NamedTuple):
    """How parameters, optimizer state and activations are laid out on the mesh.

    What explicit rules ask for is a mesh axis, a tuple of them, or "" for what stays whole. A
    dimension that doesn't divide is an error; "tensor?" leaves it whole instead.

    Attributes:
        rules: a preset: "data", "zero1", "fsdp", "tensor", "fsdp+tensor", "sequence" or "auto".
        axes: logical axis of parameters to mesh axis, over the preset's.
        paths: (regular expression, a mesh axis for each dimension) pairs, over all else: the first
            that is found in a parameter's path decides how that parameter is split.
        activations: logical axis of activations to mesh axis, over the preset's.
    """

    rules: str = "data"
    axes: Mapping[str, Any] = _EMPTY
    paths: tuple[tuple[str, tuple[Any, ...]], ...] = ()
    activations: Mapping[str, Any] = _EMPTY


class Profile(NamedTuple):
    """A window in which a trace is written to `profile/` (open it with XProf or Perfetto).

    Attributes:
        start: first step of the window.
        steps: steps in the window; 0 writes none.
    """

    start: int = 0
    steps: int = 0


class Debug(NamedTuple):
    """Aids for finding mistakes.

    Attributes:
        overfit_one_batch: trains on the first batch again and again: its loss should go to 0.
        check_nans: stops at the first operation that makes a NaN, and names it (slower, and twice
            the memory; needs steps_per_call = 1).
    """

    overfit_one_batch: bool = False
    check_nans: bool = False


SMALLER_IS_BETTER = (
    *("loss", "error", "perplexity", "bits", "mse", "mae"),
    *("forgetting", "intransigence"),
)
"""Words in the names of metrics of which the smallest value is best."""


def better(metric: str, mode: str) -> Literal["max", "min"]:
    """Returns "max" or "min": `mode`, or what suits the metric if that is "auto"."""
    smaller = any(word in metric for word in SMALLER_IS_BETTER) if mode == "auto" else mode == "min"
    return "min" if smaller else "max"
