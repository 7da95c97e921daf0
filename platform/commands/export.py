"""`lamina export`: writes a trained model to files that others read."""

from collections.abc import Sequence

from lamina.platform.commands import arguments as parsing
from lamina.platform.commands.arguments import Flag
from lamina.platform.errors import UserError

FLAGS = {
    "out": Flag(
        "", "*.safetensors for weights, *.jax for a serialised prediction, a folder with --names"
    ),
    "names": Flag("", "hf-llama or hf-vit: names and shapes of Hugging Face's transformers"),
    "dtype": Flag("float32", "of the weights with --names: float32, bfloat16 or float16"),
    "seed": Flag(-1, "the value of the seed; default: the run's first"),
    "step": Flag(-1, "the checkpoint's step; default: the newest"),
    "trust": Flag((), "packages whose factories the run's config may name"),
}

USAGE = f"""lamina export DIR --out=FILE

Writes the trained weights (FILE.safetensors), or the prediction as a program that runs without
Lamina (FILE.jax, by jax.export; its batch size is free). With --names=hf-llama (of a transformer)
or --names=hf-vit (of a vit), --out may also be a folder: it gets config.json and model.safetensors,
which transformers' from_pretrained reads.

{parsing.describe_flags(FLAGS)}"""


def main(arguments: Sequence[str]) -> int:
    """Runs the command and returns its exit code."""
    given = parsing.parse("export", arguments, FLAGS)
    if len(given.positional) != 1:
        raise UserError("give one run folder")
    out = given.flags["out"]
    layout, dtype = given.flags["names"], given.flags["dtype"]
    if layout and layout not in ("hf-llama", "hf-vit"):
        raise UserError(f"--names={layout!r} is unknown: hf-llama or hf-vit")
    if dtype not in ("float32", "bfloat16", "float16") or (dtype != "float32" and not layout):
        raise UserError(f"--dtype={dtype!r}: with --names, float32, bfloat16 or float16")
    if layout and (not out or out.endswith(".jax")):
        raise UserError(f"--out={out!r} should be a folder or end in .safetensors")
    if not layout and not out.endswith((".safetensors", ".jax")):
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
    if layout:
        exporting.to_layout(found, out, layout, dtype)
    elif out.endswith(".safetensors"):
        exporting.weights(found, out)
    else:
        exporting.prediction(found, out)
    print(out)
    return 0
