"""What language models are to beat: gzip, xz and smoothed n-grams on the very same bytes.

    python tests/benchmarks/text_baselines.py [--split test] [--orders 4 5]

It opens the data set `python_stdlib` as a run does and prints one line of JSON: the bits per byte
of each method on the bytes that an evaluation of that split predicts (each byte of each held-out
file and the separator after it, exactly once). The compressors see nothing but those bytes, whole
as one stream or file by file; they may not look at the training split, as a language model may.
The n-gram counts the training split.
"""

import argparse
import gzip
import json
import lzma
import platform
import time

import numpy as np

from lamina.platform.data import tokens
from lamina.platform.data.python_stdlib import python_stdlib

SYMBOLS = 256


def stream(source: tokens.WindowSource) -> np.ndarray:
    """Returns uint8 [1 + N]: the separator before the first file, and the N predicted bytes."""
    return np.asarray(source.arrays["tokens"][: source.predicted + 1])


def compressed(data: bytes) -> dict[str, int]:
    """Returns the bits that each compressor needs at its strongest setting."""
    return {
        "gzip": 8 * len(gzip.compress(data, compresslevel=9, mtime=0)),
        "xz": 8 * len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)),
    }


def codes(text: np.ndarray, length: int) -> np.ndarray:
    """Returns int64 [N - length + 1]: each run of `length` bytes as one number, the oldest first.

    >>> codes(np.array([1, 2, 3], np.uint8), 2).tolist()
    [258, 515]
    """
    found = np.zeros(len(text) - length + 1, np.int64)
    for i in range(length):
        found = found * SYMBOLS + text[i : i + len(found)]
    return found


def lookup(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Returns the value of each wanted key, 0 where it isn't among the sorted keys."""
    places = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[places] == wanted, values[places], 0)


def ngram_probabilities(train: np.ndarray, held_out: np.ndarray, order: int) -> np.ndarray:
    """Returns float64 [N - 1]: the probability of each byte after the first, given those before.

    Interpolated with Witten-Bell smoothing (Witten and Bell 1991, method C): for the context c of
    k bytes, seen N(c) times with T(c) different successors,

        p_k(x | c) = (N(c x) + T(c) p_{k-1}(x | c')) / (N(c) + T(c)),   c' = c without its oldest,

    down to the uniform distribution; a context that was never seen passes p_{k-1} on.

    Args:
        train: uint8, the text that is counted.
        held_out: uint8 [N], the text that is predicted.
        order: n, the predicted byte included: the longest context has order - 1 bytes.
    """
    probability = np.full(len(held_out) - 1, 1 / SYMBOLS)
    for k in range(order):
        grams, counts = np.unique(codes(train, k + 1), return_counts=True)
        contexts, first = np.unique(grams // SYMBOLS, return_index=True)
        seen = np.add.reduceat(counts, first)
        kinds = np.diff(np.append(first, len(grams)))
        wanted = codes(held_out, k + 1)[0 if k else 1 :]  # those whose last byte is predicted
        total = lookup(contexts, seen, wanted // SYMBOLS)
        distinct = lookup(contexts, kinds, wanted // SYMBOLS)
        tail = slice(len(probability) - len(wanted), None)
        lower = probability[tail]
        mixed = (lookup(grams, counts, wanted) + distinct * lower) / np.maximum(total + distinct, 1)
        probability[tail] = np.where(total > 0, mixed, lower)
    return probability


def main() -> None:
    """Prints the line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--split", default="test", choices=("validation", "test"))
    parser.add_argument("--orders", default=[4, 5], type=int, nargs="+", help="n of the n-grams")
    given = parser.parse_args()
    if not all(1 <= n <= 7 for n in given.orders):
        parser.error("--orders should be from 1 to 7: longer runs of bytes overflow their numbers")
    started = time.perf_counter()
    dataset = python_stdlib()
    train, held_out = stream(dataset.splits["train"]), stream(dataset.splits[given.split])
    predicted = held_out[1:].tobytes()
    separator = bytes([tokens.SEPARATOR])
    files = [part + separator for part in predicted.split(separator)[:-1]]
    each = [compressed(file) for file in files]
    bits = {
        **compressed(predicted),
        **{f"{name}_per_file": sum(one[name] for one in each) for name in ("gzip", "xz")},
    }
    for n in given.orders:
        probability = ngram_probabilities(train, held_out, n)
        bits[f"ngram_{n}"] = float(-np.log2(probability).sum())
    result = {
        "split": given.split,
        "python": platform.python_version(),
        "files": len(files),
        "bytes": len(predicted),
        "bits_per_byte": {name: round(n / len(predicted), 4) for name, n in bits.items()},
        "seconds": round(time.perf_counter() - started, 1),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
