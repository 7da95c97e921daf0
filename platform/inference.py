"""Trained models, ready to use: `model = restore("runs/quickstart")`."""

import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lamina.models import generate as generation
from lamina.models.spec import Output
from lamina.models.transformer import Transformer
from lamina.platform.data import feed as feeds
from lamina.platform.errors import UserError
from lamina.platform.training import trained
from lamina.platform.training.trained import Trained


def restore(
    workdir: str | os.PathLike,
    *,
    seed: int | None = None,
    step: int | None = None,
    trust: Sequence[str] = (),
) -> "TrainedModel":
    """Returns the model that a run has trained.

    Args:
        workdir: the run folder, or one of its checkpoints (`runs/x/checkpoints/300`).
        seed: the value of one of its seeds; default: the first.
        step: which checkpoint; default: the newest that verifies.
        trust: packages whose factories the run's config may name: it may be somebody's else.

    Raises:
        UserError: there is no such run, checkpoint or seed, or it is damaged.
    """
    return TrainedModel(trained.read(workdir, seed=seed, step=step, trust=trust))


class TrainedModel:
    """A trained model, in evaluation mode.

    Attributes:
        module: the Flax module, with its weights.
        trained: its config, weights and task.
    """

    def __init__(self, found: Trained):
        self.trained = found
        self.module = found.model.bind(found.params, found.model_state)
        self._apply = jax.jit(
            lambda params, state, *inputs: found.model.apply(params, state, *inputs, train=False)[0]
        )

    def __call__(self, inputs: Any, *rest: Any) -> Output:
        """Returns the model's output for a batch.

        Args:
            inputs: [B, ...], as the data set gives them; uint8 images are scaled to [0, 1].
            *rest: further arguments of the module.

        Raises:
            UserError: the shape isn't that of a batch of the model's inputs.
        """
        array = jnp.asarray(inputs)
        wanted = self.trained.spec.input_shape
        tokens = np.issubdtype(self.trained.spec.input_dtype, np.integer) and len(wanted) == 1
        fits = array.ndim == 2 if tokens else array.shape[1:] == tuple(wanted)
        if not fits:
            shape = "T" if tokens else ", ".join(map(str, wanted))
            raise UserError(f"the model takes inputs [B, {shape}], not {list(array.shape)}")
        array = feeds.normalise({"inputs": array})["inputs"]
        return self._apply(self.trained.params, self.trained.model_state, array, *rest)

    def predict(self, inputs: Any, batch_size: int = 256) -> np.ndarray:
        """Returns predictions: class [N] for classification, values [N, O] for regression.

        For language models: the most likely next token at each place, [N, T].

        Args:
            inputs: [N, ...]; one example without its batch dimension is not accepted.
            batch_size: examples at once; the last batch is padded, so that one program serves all.

        Raises:
            UserError: there are no inputs, or the model takes others.
        """
        array = np.asarray(inputs)
        parts = []
        for first in range(0, len(array), batch_size):
            part = array[first : first + batch_size]
            missing = batch_size - len(part) if len(array) > batch_size else 0
            padded = np.concatenate([part, np.repeat(part[:1], missing, axis=0)])
            logits = np.asarray(self(padded).logits)[: len(part)]
            parts.append(logits)
        if not parts:
            raise UserError("predict was given no examples")
        logits = np.concatenate(parts)
        if self.trained.config.task.name == "regression":
            return logits
        return logits.argmax(-1)

    def generate(
        self,
        prompt: str | bytes | Sequence[int],
        *,
        length: int = 200,
        temperature: float = 0.8,
        top_k: int = 0,
        seed: int = 0,
    ) -> str | np.ndarray:
        """Returns a continuation of `prompt`, for language models.

        Args:
            prompt: text (for models of bytes), or token ids.
            length: tokens to add.
            temperature: of the sampling; 0 takes the most likely token.
            top_k: sample from so many of the likeliest tokens; 0: from all.
            seed: of the sampling.

        Returns:
            Text if a text was given, otherwise token ids, without the prompt.

        Raises:
            UserError: the model is no language model.
        """
        if not isinstance(self.module, Transformer):
            raise UserError(
                f"generate needs the model 'transformer', not {self.trained.config.model.name!r}"
            )
        text = isinstance(prompt, str | bytes)
        if text and (self.trained.spec.outputs != 256 or self.trained.config.data.get("tokenizer")):
            raise UserError("this model's tokens aren't bytes: give the prompt as token ids")
        encoded = prompt.encode() if isinstance(prompt, str) else prompt
        tokens = np.frombuffer(encoded, np.uint8) if isinstance(encoded, bytes) else encoded
        try:
            ids = generation.generate(
                self.module,
                jnp.asarray(tokens, jnp.int32)[None],
                jax.random.key(seed),
                steps=length,
                temperature=temperature,
                top_k=top_k,
            )
        except ValueError as error:
            raise UserError(f"generate: {error}") from error
        new = np.asarray(ids)[0, len(tokens) :]
        if not text:
            return new
        return bytes(new[new < 256].astype(np.uint8)).decode("utf-8", "replace")

    def __repr__(self) -> str:
        found = self.trained
        count = sum(leaf.size for leaf in jax.tree.leaves(found.params))
        return (
            f"TrainedModel({found.config.model.name}, {count:,} parameters, "
            f"step {found.step}, seed {found.seed})"
        )
