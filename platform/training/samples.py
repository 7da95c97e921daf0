"""Samples for the report: text that a language model writes, images that a classifier judges."""

import base64
import io
from collections.abc import Sequence
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
IMAGES, COLUMNS = 12, 6
SIDE, TITLE, MARGIN = 96, 15, 7  # pixels of an image, of the line above it, and around both


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
    examples = [split[i] for i in range(min(IMAGES, len(split)))]
    raw = np.stack([np.asarray(e["inputs"]) for e in examples])
    inputs = np.asarray(feeds.normalise({"inputs": jnp.asarray(raw)})["inputs"])
    output, _ = jax.jit(
        lambda params, state, x: parts.recipe.model.apply(params, state, x, train=False)
    )(params, model_state, inputs)
    names = parts.dataset.label_names
    called = lambda c: names[c] if names else str(c)
    titles = []
    for example, guess in zip(examples, np.asarray(output.logits).argmax(-1).tolist(), strict=True):
        label = np.asarray(example["labels"])
        truth = int(label) if label.ndim == 0 else int(label.argmax())
        titles.append(called(guess) if guess == truth else f"{called(guess)} ✗ {called(truth)}")
    png = base64.b64encode(sheet(inputs, titles)).decode("ascii")
    return [{"title": "Test images: prediction, and ✗ truth where it is wrong", "png_base64": png}]


def sheet(images: np.ndarray, titles: Sequence[str]) -> bytes:
    """Draws images in rows, each below its title, which is red where it has a "✗".

    Args:
        images: [image, height, width, channels of 1, 3 or 4]; each is stretched to its own range.
        titles: one for each image.

    Returns:
        A PNG, `COLUMNS` images wide.
    """
    import matplotlib
    from PIL import Image, ImageDraw, ImageFont, ImageOps

    width, height = SIDE + 2 * MARGIN, SIDE + TITLE + 2 * MARGIN
    page = Image.new("RGB", (COLUMNS * width, -(-len(images) // COLUMNS) * height), "white")
    draw = ImageDraw.Draw(page)
    font = ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf", 9)
    for place, (image, title) in enumerate(zip(images, titles, strict=True)):
        x = place % COLUMNS * width + width // 2
        y = place // COLUMNS * height + MARGIN + TITLE
        low, high = image.min(), image.max()
        pixels = (255 * (image - low) / (high - low + 1e-9)).astype(np.uint8)
        picture = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
        sharp = Image.Resampling.NEAREST if max(picture.size) < SIDE else Image.Resampling.BOX
        picture = ImageOps.contain(picture, (SIDE, SIDE), sharp).convert("RGB")
        page.paste(picture, (x - picture.width // 2, y))
        draw.text((x, y - 3), title, "#b3261e" if "✗" in title else "black", font, anchor="ms")
    buffer = io.BytesIO()
    page.save(buffer, "png")
    return buffer.getvalue()
