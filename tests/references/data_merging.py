"""Fisher merging, RegMean and REPAIR of two small networks in PyTorch, in float64.

    python tests/references/data_merging.py tests/platform/merging/torch_merging.npz

Run where torch is installed. The formulas are those of the papers, written for torch's [out, in]
weights; the networks are y = W2 tanh(W1 x + b1) + b2. REPAIR is done as its paper does it: a
`BatchNorm1d` behind each hidden layer, which takes its statistics from the data, and is then fused
with the layer by PyTorch; of networks with two hidden layers and relu.
"""

import sys

import numpy as np
import torch

INPUTS, HIDDEN, CLASSES, EXAMPLES = 5, 7, 4, 12
ALPHA = 0.9


def forward(p: dict, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the hidden units and the logits."""
    hidden = torch.tanh(x @ p["up/kernel"].T + p["up/bias"])
    return hidden, hidden @ p["down/kernel"].T + p["down/bias"]


def fisher(p: dict, x: torch.Tensor) -> dict:
    """Returns the exact diagonal Fisher: each class by its probability, each example by itself."""
    total = {name: torch.zeros_like(leaf) for name, leaf in p.items()}
    for row in x:
        log_p = torch.log_softmax(forward(p, row[None])[1][0], -1)
        for c in range(CLASSES):
            slopes = torch.autograd.grad(log_p[c], list(p.values()), retain_graph=True)
            for name, slope in zip(p, slopes, strict=True):
                total[name] += log_p[c].exp().detach() * slope**2
    return {name: value / len(x) for name, value in total.items()}


def networks() -> list[torch.nn.Sequential]:
    """Two networks with two hidden layers, and their mean."""
    dense, relu = torch.nn.Linear, torch.nn.ReLU()
    one, other, mean = (
        torch.nn.Sequential(
            dense(INPUTS, HIDDEN), relu, dense(HIDDEN, HIDDEN), relu, dense(HIDDEN, CLASSES)
        ).double()
        for _ in range(3)
    )
    with torch.no_grad():
        for target, *ends in zip(*(n.parameters() for n in (mean, one, other)), strict=True):
            target.copy_(sum(ends) / 2)
    return [one, other, mean]


def repaired(one, other, mean, x: torch.Tensor) -> torch.nn.Sequential:
    """Returns the mean of two networks with the mean of their statistics."""
    stats = [
        [(net[: n + 1](x).mean(0), net[: n + 1](x).std(0, correction=0)) for n in (0, 2)]
        for net in (one, other)
    ]
    norms = []
    for a, b in zip(*stats, strict=True):
        norm = torch.nn.BatchNorm1d(HIDDEN, eps=1e-12, momentum=1.0).double()
        with torch.no_grad():
            norm.bias.copy_((a[0] + b[0]) / 2)
            norm.weight.copy_((a[1] + b[1]) / 2)
        norms.append(norm)
    net = torch.nn.Sequential(mean[0], norms[0], mean[1], mean[2], norms[1], mean[3], mean[4])
    net.train()(x)
    for norm in norms:
        norm.running_var *= (len(x) - 1) / len(x)  # torch keeps the unbiased one
    net.eval()
    fuse = torch.nn.utils.fusion.fuse_linear_bn_eval
    return torch.nn.Sequential(fuse(net[0], norms[0]), net[2], fuse(net[3], norms[1]), *net[5:])


def main(path: str) -> None:
    """Writes inputs and results."""
    torch.manual_seed(0)
    shapes = {
        "up/kernel": (HIDDEN, INPUTS),
        "up/bias": (HIDDEN,),
        "down/kernel": (CLASSES, HIDDEN),
        "down/bias": (CLASSES,),
    }
    models, data, found = [], [], {"torch": np.array(torch.__version__)}
    for t in range(2):
        p = {n: torch.randn(s, dtype=torch.float64, requires_grad=True) for n, s in shapes.items()}
        models.append(p)
        data.append(torch.randn(EXAMPLES, INPUTS, dtype=torch.float64))
        fishers = fisher(p, data[t])
        for name in shapes:
            found[f"model{t}/{name}"] = p[name].detach().t().numpy()  # [in, out], as in Flax
            found[f"fisher{t}/{name}"] = fishers[name].t().numpy()
        found[f"inputs{t}"] = data[t].numpy()
    norms = [
        torch.sqrt(sum((torch.tensor(found[f"fisher{t}/{n}"]) ** 2).sum() for n in shapes))
        for t in range(2)
    ]
    for name in shapes:
        weights = [
            torch.clamp(torch.tensor(found[f"fisher{t}/{name}"]) / norms[t], min=1e-6)
            for t in range(2)
        ]
        values = [torch.tensor(found[f"model{t}/{name}"]) for t in range(2)]
        merged = sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)
        found[f"fisher/{name}"] = merged.numpy()
    for name in shapes:
        if not name.endswith("kernel"):
            found[f"regmean/{name}"] = (models[0][name] + models[1][name]).detach().numpy() / 2
            continue
        grams = []
        for t in range(2):
            x = data[t] if name == "up/kernel" else forward(models[t], data[t])[0].detach()
            gram = x.T @ x / EXAMPLES
            grams.append(ALPHA * gram + (1 - ALPHA) * torch.diag(torch.diagonal(gram)))
        # In torch's layout: W = (sum_t W_t G_t) (sum_t G_t)^-1.
        products = sum(m[name].detach() @ g for m, g in zip(models, grams, strict=True))
        found[f"regmean/{name}"] = torch.linalg.solve(sum(grams), products, left=False).T.numpy()
    one, other, mean = networks()
    fixed = repaired(one, other, mean, torch.cat(data))
    for name, net in {"one": one, "other": other, "repaired": fixed}.items():
        for number, layer in enumerate(net[::2]):
            found[f"{name}/{number}/kernel"] = layer.weight.detach().t().numpy()
            found[f"{name}/{number}/bias"] = layer.bias.detach().numpy()
    np.savez(path, **found)


if __name__ == "__main__":
    main(sys.argv[1])
