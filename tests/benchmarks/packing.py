"""Simulated step time of padded, packed, and packed and balanced batches of long-tailed lengths.

    python tests/benchmarks/packing.py

A step lasts as long as its slowest data rank. Costs are those of `balancing.row_costs` for a
model of the given width; padding costs what tokens cost in the padded batches, where each document
has a row of its own, and nothing elsewhere.
"""

import argparse

import numpy as np

from lamina.platform.data import balancing, packing


def main() -> None:
    """Prints seconds per token, relative to packed rows assigned by count."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--documents", type=int, default=20000)
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    rng = np.random.default_rng(given.seed)
    lengths = np.clip(rng.lognormal(6.0, 1.4, given.documents), 1, given.context - 1).astype(int)
    quantiles = np.quantile(lengths, [0.5, 0.9, 0.99]).astype(int)
    print(f"lengths: median {quantiles[0]}, 90% {quantiles[1]}, 99% {quantiles[2]}")
    linear = 12.0 * given.width
    rows, _ = packing.first_fit((lengths + 1).tolist(), given.context)
    costs = np.zeros(rows.max() + 1)
    tokens = np.zeros(len(costs))
    np.add.at(costs, rows, (lengths + 1) * (linear + lengths + 1.0))
    np.add.at(tokens, rows, lengths + 1)
    order = rng.permutation(len(costs))
    costs, tokens = costs[order], tokens[order]
    padded = given.context * (linear + given.context) / (lengths.mean() + 1)
    print(
        f"{'ranks':>5} {'rows a rank':>11} {'padded':>7} {'packed':>7} {'balanced':>8} {'bound':>6}"
    )
    for ranks in (8, 32):
        for per_rank in (2, 4, 8):
            size = ranks * per_rank
            batches = [slice(i, i + size) for i in range(0, len(costs) - size + 1, size)]
            if not batches:
                continue
            counted = sum(balancing.step_time(costs[b], ranks) for b in batches)
            even = sum(
                balancing.step_time(costs[b][balancing.balance(costs[b], ranks)], ranks)
                for b in batches
            )
            bound = sum(costs[b].sum() / ranks for b in batches)
            seen = sum(tokens[b].sum() for b in batches)
            alone = padded * seen / ranks
            print(
                f"{ranks:5} {per_rank:11} {alone / counted:7.2f} {1.0:7.2f} "
                f"{even / counted:8.3f} {bound / counted:6.3f}"
            )


if __name__ == "__main__":
    main()
