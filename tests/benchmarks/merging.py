"""Merging of large files: seconds, and the most memory, beside mergekit.

    python tests/benchmarks/merging.py --parameters=1e9 --mergekit=/path/to/python

makes four checkpoints of a Llama in bfloat16 (a base and three near it) in --folder, unless they
are there, and merges them by each method, in a process of its own. With an interpreter that has
mergekit, it merges the same files with that too (`ties_per_tensor` is what it calls ties; `ties`
trims over the whole model, for which mergekit has no counterpart). Its time is told with and
without its start, and ours with the start of Python. Before each merge the files are read once, so
that both sides find them in the system's file cache, as far as they fit there.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ml_dtypes
import numpy as np

METHODS = {
    "linear": {"scale": None},
    "task_arithmetic": {"scale": 0.5},
    "ties_per_tensor": {"scale": 0.5, "density": 0.2},
    "ties": {"scale": 0.5, "density": 0.2},
}
MERGEKIT = """
import json, sys, time
start = time.perf_counter()
from mergekit.config import MergeConfiguration
from mergekit.merge import MergeOptions, run_merge
ready = time.perf_counter()
config = MergeConfiguration.model_validate(json.loads(sys.argv[1]))
run_merge(config, sys.argv[2], MergeOptions(copy_tokenizer=False, quiet=True))
print(json.dumps([ready - start, time.perf_counter() - ready]))
"""


def shapes(parameters: float) -> dict[str, tuple[int, ...]]:
    """A Llama of about so many parameters: width 2048, hidden 5632, a vocabulary of 32,000."""
    width, hidden, vocabulary = 2048, 5632, 32_000
    layer = 4 * width * width + 3 * width * hidden + 2 * width
    layers = max(1, round((parameters - 2 * vocabulary * width) / layer))
    found = {"model.embed_tokens.weight": (vocabulary, width), "model.norm.weight": (width,)}
    found["lm_head.weight"] = (vocabulary, width)
    for number in range(layers):
        stem = f"model.layers.{number}."
        found |= {f"{stem}self_attn.{p}_proj.weight": (width, width) for p in "qkvo"}
        found |= {f"{stem}mlp.{p}_proj.weight": (hidden, width) for p in ("gate", "up")}
        found[f"{stem}mlp.down_proj.weight"] = (width, hidden)
        found[f"{stem}input_layernorm.weight"] = (width,)
        found[f"{stem}post_attention_layernorm.weight"] = (width,)
    return found


def make(folder: Path, parameters: float) -> None:
    """Writes the checkpoints tensor by tensor, and a config that mergekit reads."""
    from lamina.platform.checkpoints import safetensors
    from lamina.platform.checkpoints.safetensors import Layout

    table = shapes(parameters)
    layers = sum(name.endswith("input_layernorm.weight") for name in table)
    layouts = {n: Layout(s, np.dtype(ml_dtypes.bfloat16)) for n, s in table.items()}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "num_hidden_layers": layers,
        "vocab_size": 32_000,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    for number in range(4):
        path = folder / f"model{number}"
        if (path / "config.json").exists():
            continue
        path.mkdir(parents=True, exist_ok=True)

        def values(name: str, number: int = number) -> np.ndarray:
            key = [list(table).index(name)]
            shape = table[name]
            base = np.random.default_rng(key).standard_normal(shape, np.float32) * np.float32(0.02)
            if number:
                own = np.random.default_rng([*key, number]).standard_normal(shape, np.float32)
                base += own * np.float32(0.002)
            return base.astype(ml_dtypes.bfloat16)

        safetensors.write(path / "model.safetensors", layouts, values, {"format": "pt"})
        (path / "config.json").write_text(json.dumps(config))


def warm(paths: list[Path]) -> None:
    """Reads the checkpoints, for the file cache."""
    for path in paths:
        with open(path / "model.safetensors", "rb") as file:
            while file.read(1 << 24):
                pass


def measured(command: list[str]) -> tuple[float, float, float, str]:
    """Seconds, CPU seconds, the most memory in GB, and what it printed."""
    with tempfile.TemporaryFile("w+") as out:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        text = out.read()
    if process.returncode:
        raise SystemExit(f"{' '.join(command[:4])} ... ended with {process.returncode}: {text}")
    return seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024 / 1e9, text


def ours(method: str, paths: list[Path], out: Path) -> tuple[float, float, float, str]:
    """Merges by `lamina merge`."""
    models = paths if method == "linear" else paths[1:]
    keys = [f"{key}={value}" for key, value in METHODS[method].items() if value is not None]
    return measured(
        [
            *(sys.executable, "-m", "lamina.platform.cli", "merge", f"--method={method}"),
            f"--models={','.join(map(str, models))}",
            *([] if method == "linear" else [f"--base={paths[0]}"]),
            *([f"--set={','.join(keys)}"] if keys else []),
            f"--out={out}",
        ]
    )


def theirs(
    python: str, method: str, paths: list[Path], out: Path
) -> tuple[float, float, float, str]:
    """Merges by mergekit, computing in float32 as we do."""
    keys = METHODS[method]
    name = {"ties_per_tensor": "ties"}.get(method, method)
    parameters = {"weight": 1.0} | ({"density": keys["density"]} if "density" in keys else {})
    models = paths if method == "linear" else paths[1:]
    config = {
        "merge_method": name,
        "models": [{"model": str(path), "parameters": parameters} for path in models],
        "dtype": "float32",
        "out_dtype": "bfloat16",
    }
    if method != "linear":
        config |= {"base_model": str(paths[0]), "parameters": {"lambda": keys["scale"]}}
    return measured([python, "-c", MERGEKIT, json.dumps(config), str(out)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parameters", type=float, default=2.5e8)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/lamina-merging"))
    parser.add_argument("--mergekit", default="", help="a Python interpreter that has mergekit")
    parser.add_argument("--methods", default=",".join(METHODS))
    given = parser.parse_args()
    folder = given.folder / f"{given.parameters / 1e6:.0f}M"
    # In a process of its own: the memory of the process that starts a merge counts as the merge's.
    maker = multiprocessing.get_context("spawn").Process(
        target=make, args=(folder, given.parameters)
    )
    maker.start()
    maker.join()
    paths = [folder / f"model{number}" for number in range(4)]
    out = given.folder / "out"
    head = f"{'seconds':>8} {'CPU':>6} {'GB':>5}"
    print(f"{'':<16} {head}   mergekit: {head}, without its start", flush=True)
    for method in given.methods.split(","):
        warm(paths)
        line = f"{method:<16} " + "{:8.1f} {:6.1f} {:5.2f}".format(*ours(method, paths, out)[:3])
        shutil.rmtree(out, ignore_errors=True)
        if given.mergekit and method != "ties":
            warm(paths)
            *numbers, text = theirs(given.mergekit, method, paths, out)
            shutil.rmtree(out, ignore_errors=True)
            merging = json.loads(text.splitlines()[-1])[1]
            line += "             {:8.1f} {:6.1f} {:5.2f}".format(*numbers) + f" {merging:8.1f}"
        print(line, flush=True)


if __name__ == "__main__":
    main()
