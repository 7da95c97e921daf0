"""Samples for the report: text that a language model writes, images that a classifier judges."""

import base64
import io
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lamina.models import generate as generation
from lamina.models.transformer import Transformer
from lamina.platform.data import feed as feeds
from lamina.platform.training import evaluation_step, seeds
from lamina.platform.training.experiment import Experiment
from lamina.platform.training.state import TrainState

PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 2, 64, 400
IMAGES = 12


def make(parts: Experiment, state: TrainState) -> list[dict[str, str]]:
    """Returns entries of `samples.json` from the first seed's model and the test split.

    Tasks and models of which there is nothing to show give none.

    Args:
        parts: the run's parts.
        state: the final state, of all seeds.
    """
    split = parts.dataset.splits.get("test")
    if split is None or jax.process_count() > 1:
        return []
    one = seeds.take(state, parts.seeds.number, 0)
    trained = evaluation_step.evaluation_params(parts.recipe, one)
    params = parts.recipe.parameters.combine(trained, one.frozen)
    name = parts.config.task.name
    if name == "language_modeling" and parts.dataset.decode is not None:
        module = parts.recipe.model.bind(params, one.model_state)
        return _texts(parts, module, split) if isinstance(module, Transformer) else []
    shape = parts.dataset.spec.input_shape
    if name == "classification" and len(shape) == 3 and shape[-1] in (1, 3, 4):
        return _images(parts, params, one.model_state, split)
    return []


def _texts(parts: Experiment, module: Transformer, split: Any) -> list[dict[str, str]]:
    decode = parts.dataset.decode
    assert decode is not None
    entries = []
    for i in range(PROMPTS):
        example = split[i * (len(split) // PROMPTS)]
        prompt = np.asarray(example["inputs"])[:PROMPT_TOKENS]
        key = jax.random.fold_in(jax.random.key(0), i)
        tokens = generation.generate(
            module, jnp.asarray(prompt[None], jnp.int32), key, steps=NEW_TOKENS, temperature=0.7
        )
        written = np.asarray(tokens)[0, len(prompt) :]
        entries.append(
            {
                "title": f"Continuation of a held-out text ({len(prompt)} tokens, temperature 0.7)",
                "text": f"{decode(prompt.tolist())}⟦…⟧{decode(written.tolist())}",
            }
        )
    return entries


def _images(parts: Experiment, params: Any, model_state: Any, split: Any) -> list[dict[str, str]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    examples = [split[i] for i in range(min(IMAGES, len(split)))]
    raw = np.stack([np.asarray(e["inputs"]) for e in examples])
    inputs = np.asarray(feeds.normalise({"inputs": jnp.asarray(raw)})["inputs"])
    output, _ = jax.jit(
        lambda params, state, x: parts.recipe.model.apply(params, state, x, train=False)
    )(params, model_state, inputs)
    predicted = np.asarray(output.logits).argmax(-1)
    names = parts.dataset.label_names
    called = lambda c: names[c] if names else str(c)
    columns = 6
    figure = Figure(figsize=(columns * 1.1, 1.35 * -(-len(examples) // columns)), dpi=100)
    FigureCanvasAgg(figure)
    for i, (example, image, guess) in enumerate(zip(examples, inputs, predicted, strict=True)):
        axes = figure.add_subplot(-(-len(examples) // columns), columns, i + 1)
        low, high = image.min(), image.max()
        axes.imshow((image - low) / (high - low + 1e-9), cmap="gray")
        axes.set_axis_off()
        label = np.asarray(example["labels"])
        truth = int(label) if label.ndim == 0 else int(label.argmax())
        right = int(guess) == truth
        title = called(int(guess)) if right else f"{called(int(guess))} ✗ {called(truth)}"
        axes.set_title(title, fontsize=6, color="black" if right else "#b3261e")
    figure.tight_layout(pad=0.4)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    png = base64.b64encode(buffer.getvalue()).decode("ascii")
    return [{"title": "Test images: prediction, and ✗ truth where it is wrong", "png_base64": png}]
