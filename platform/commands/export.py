"""`lamina export`: writes a trained model to one file."""

from collections.abc import Sequence

from lamina.platform.commands import arguments as parsing
from lamina.platform.commands.arguments import Flag
from lamina.platform.errors import UserError

FLAGS = {
    "out": Flag("", "the file: *.safetensors for weights, *.jax for a serialised prediction"),
    "seed": Flag(-1, "the value of the seed; default: the run's first"),
    "step": Flag(-1, "the checkpoint's step; default: the newest"),
    "trust": Flag((), "packages whose factories the run's config may name"),
}

USAGE = f"""lamina export DIR --out=FILE

Writes the trained weights (FILE.safetensors), or the prediction as a program that runs without
Lamina (FILE.jax, by jax.export; its batch size is free).

{parsing.describe_flags(FLAGS)}"""


def main(arguments: Sequence[str]) -> int:
    """Runs the command and returns its exit code."""
    given = parsing.parse("export", arguments, FLAGS)
    if len(given.positional) != 1:
        raise UserError("give one run folder")
    out = given.flags["out"]
    if not out.endswith((".safetensors", ".jax")):
        raise UserError(f"--out={out!r} should end in .safetensors or .jax")
    seed, step = given.flags["seed"], given.flags["step"]

    from lamina.platform import exporting
    from lamina.platform.training import trained

    found = trained.read(
        given.positional[0],
        seed=None if seed < 0 else seed,
        step=None if step < 0 else step,
        trust=tuple(given.flags["trust"]),
    )
    write = exporting.weights if out.endswith(".safetensors") else exporting.prediction
    write(found, out)
    print(out)
    return 0
