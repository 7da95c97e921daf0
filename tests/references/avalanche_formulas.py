"""Writes single steps of Avalanche: `python avalanche_formulas.py avalanche_formulas.json`.

In an environment of its own, with avalanche-lib 0.6.0, torch and quadprog. All in float64, but for
what Avalanche itself rounds to float32: GEM's projection, EWC's penalty and iCaRL's loss.
"""

import json
import sys
import types
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from avalanche.evaluation.metrics import BWT, Forgetting, ForwardTransfer
from avalanche.models import NCMClassifier
from avalanche.models.prompt import Prompt
from avalanche.training import DER, StreamingLDA
from avalanche.training.losses import ICaRLLossPlugin
from avalanche.training.plugins import (
    AGEMPlugin,
    EWCPlugin,
    GEMPlugin,
    SynapticIntelligencePlugin,
)
from avalanche.training.regularization import LearningWithoutForgetting
from avalanche.training.storage_policy import HerdingSelectionStrategy
from avalanche.training.supervised.icarl import _ICaRLPlugin
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

SIZE, CLASSES = 3, 4


def linear(weights: np.ndarray) -> torch.nn.Linear:
    """Returns a linear model with these weights [inputs, outputs]."""
    model = torch.nn.Linear(*weights.shape, bias=False)
    model.weight.data = torch.tensor(weights.T.copy())
    return model


def rows(rng: np.random.Generator, number: int = 6) -> tuple[np.ndarray, np.ndarray]:
    """Returns inputs, and labels of which every class has one."""
    return rng.normal(size=(number, SIZE)), np.arange(number) % CLASSES


def plain(**values: object) -> dict:
    """Returns arrays and tensors as lists."""
    listed = lambda v: v.tolist() if isinstance(v, np.ndarray | torch.Tensor) else v
    return {name: listed(value) for name, value in values.items()}


def distillation(rng: np.random.Generator) -> dict:
    """LwF's term (without its factor alpha) and its gradient by the logits."""
    teacher, student = rng.normal(size=(2, 5, 4))
    z, classes, temperature = torch.tensor(student, requires_grad=True), [0, 1, 3], 2.0
    method = LearningWithoutForgetting(1.0, temperature)
    value = method._distillation_loss(z, torch.tensor(teacher), classes)
    value.backward()
    given = {"teacher": teacher.tolist(), "student": student.tolist(), "classes": classes}
    return given | {"temperature": temperature, "gradient": z.grad.tolist()}


def gem(rng: np.random.Generator, strength: float) -> dict:
    """GEM's projection of a gradient that goes against some of three others."""
    plugin = GEMPlugin(patterns_per_experience=1, memory_strength=strength)
    past, g = rng.normal(size=(3, 8)), rng.normal(size=8)
    plugin.G = torch.tensor(past)
    projected = plugin.solve_quadprog(torch.tensor(g)).tolist()
    return {"strength": strength, "past": past.tolist(), "g": g.tolist(), "projected": projected}


def agem(rng: np.random.Generator) -> dict:
    """A-GEM's projection of a gradient that goes against its reference."""
    reference = rng.normal(size=8)
    g = rng.normal(size=8) - reference
    plugin = AGEMPlugin(patterns_per_experience=1, sample_size=1)
    plugin.buffers, plugin.reference_gradients = [None], torch.tensor(reference)
    model = torch.nn.Linear(8, 1, bias=False)
    model.weight.grad = torch.tensor(g)[None]
    plugin.after_backward(types.SimpleNamespace(model=model, device="cpu"))
    projected = model.weight.grad[0].tolist()
    return {"reference": reference.tolist(), "g": g.tolist(), "projected": projected}


def ewc(rng: np.random.Generator, mode: str, batch: int) -> dict:
    """EWC's importances after two experiences, and the penalty and its gradient elsewhere."""
    plugin = EWCPlugin(ewc_lambda=0.5, mode=mode, decay_factor=0.8 if mode == "online" else None)
    anchors, (here,) = rng.normal(size=(2, SIZE, CLASSES)), rng.normal(size=(1, SIZE, CLASSES))
    model, data, found = linear(anchors[0]), [rows(rng) for _ in anchors], []
    strategy = types.SimpleNamespace(
        model=model,
        _criterion=cross_entropy,
        optimizer=torch.optim.SGD(model.parameters(), 0.1),
        device="cpu",
        train_mb_size=batch,
        clock=types.SimpleNamespace(),
    )
    for number, (anchor, (x, y)) in enumerate(zip(anchors, data, strict=True)):
        model.weight.data = torch.tensor(anchor.T.copy())
        strategy.clock.train_exp_counter = number
        examples = TensorDataset(torch.tensor(x), torch.tensor(y), torch.zeros(len(y)))
        strategy.experience = types.SimpleNamespace(dataset=examples)
        plugin.after_training_exp(strategy)
        found.append(plugin.importances[number]["weight"].data.T.clone())
    model.weight.data = torch.tensor(here.T.copy())
    model.zero_grad()
    strategy.clock.train_exp_counter, strategy.loss = len(anchors), torch.zeros(())
    plugin.before_backward(strategy)
    strategy.loss.backward()
    return plain(
        mode=mode,
        decay=0.8,
        strength=0.5,
        batch=batch,
        x=np.stack([x for x, _ in data]),
        labels=np.stack([y for _, y in data]),
        anchors=anchors,
        importances=torch.stack(found),
        params=here,
        penalty=strategy.loss.item(),
        gradient=model.weight.grad.T,
    )


def si(rng: np.random.Generator) -> dict:
    """SI over two experiences of SGD: path, importance and penalty, without Avalanche's ceiling.

    On a CPU Avalanche's copies of the parameters are views of them, so that each of its paths and
    penalties is 0; here they are cloned, as they are where a GPU's parameters are copied.
    """
    plugin, strength, damping = SynapticIntelligencePlugin, 0.7, 0.1
    start, none = rng.normal(size=(SIZE, CLASSES)), set()
    model, data = linear(start), [rows(rng) for _ in range(2)]
    old, path = ({}, {}), {k: {} for k in ("old_theta", "new_theta", "grad")}
    path |= {"trajectory": {}, "cum_trajectory": {}}
    optimizer, found = torch.optim.SGD(model.parameters(), 0.3), []
    back = lambda flat: flat.data.reshape(CLASSES, SIZE).T.clone()

    def clone(held: dict) -> None:
        held["weight"].data = held["weight"].data.clone()

    for x, y in data:
        plugin.create_syn_data(model, old, path, none)
        plugin.init_batch(model, old, path, none)
        clone(old[0])
        for _ in range(4):
            plugin.pre_update(model, path, none)
            clone(path["old_theta"])
            optimizer.zero_grad()
            loss = cross_entropy(model(torch.tensor(x)), torch.tensor(y))
            loss += plugin.compute_ewc_loss(model, old, none, "cpu", strength)
            loss.backward()
            optimizer.step()
            plugin.post_update(model, path, none)
        walked = back(path["trajectory"]["weight"])
        plugin.update_ewc_data(model, old, path, float("inf"), none, 1, eps=damping)
        found.append((walked, back(old[1]["weight"]), model.weight.detach().T.clone()))
    here = rng.normal(size=(SIZE, CLASSES))
    model.weight.data = torch.tensor(here.T.copy())
    penalty = plugin.compute_ewc_loss(model, old, none, "cpu", strength)
    return plain(
        strength=strength,
        damping=damping,
        rate=0.3,
        start=start,
        x=np.stack([x for x, _ in data]),
        labels=np.stack([y for _, y in data]),
        paths=torch.stack([p for p, _, _ in found]),
        importances=torch.stack([f for _, f, _ in found]),
        ends=torch.stack([e for _, _, e in found]),
        params=here,
        penalty=penalty.item(),
    )


def der(rng: np.random.Generator, alpha: float, beta: float) -> dict:
    """DER's loss of a batch beside one of the memory, with logits, and its gradient."""
    weights, (x, y), (x_m, y_m) = rng.normal(size=(SIZE, CLASSES)), rows(rng), rows(rng)
    model, logits = linear(weights), rng.normal(size=(len(y_m), CLASSES))
    nothing = lambda **kwargs: None
    hooks = ["training_iteration", "forward", "backward", "update"]
    names = [f"_{when}_{what}" for when in ("before", "after") for what in hooks]
    step = types.SimpleNamespace(
        **dict.fromkeys([*names, "_unpack_minibatch"], nothing),
        dataloader=[None],
        _stop_training=False,
        optimizer=torch.optim.SGD(model.parameters(), 0.0),
        _make_empty_loss=lambda: torch.zeros(()),
        forward=lambda: model(torch.tensor(np.concatenate([x_m, x]))),
        mb_y=torch.tensor(np.concatenate([y_m, y])),
        replay_loader=(),
        batch_size_mem=len(y_m),
        batch_logits=torch.tensor(logits),
        alpha=alpha,
        beta=beta,
        backward=lambda: step.loss.backward(),
        optimizer_step=lambda: None,
    )
    DER.training_epoch(step)
    given = {"alpha": alpha, "beta": beta, "weights": weights, "x": x, "labels": y}
    given |= {"x_memory": x_m, "labels_memory": y_m, "logits_memory": logits}
    return plain(**given, loss=step.loss.item(), gradient=model.weight.grad.T)


def icarl_loss(rng: np.random.Generator) -> dict:
    """iCaRL's loss of a batch with the logits of the old model, and its gradient."""
    teacher, student = rng.normal(size=(2, 6, CLASSES))
    labels, plugin = np.arange(6) % CLASSES, ICaRLLossPlugin()
    plugin.old_classes, plugin.old_logits = [0, 2], torch.tensor(teacher, dtype=torch.float32)
    z = torch.tensor(student, dtype=torch.float32, requires_grad=True)
    loss = plugin(z, torch.tensor(labels))
    loss.backward()
    given = {"teacher": teacher, "student": student, "labels": labels, "old": [0, 2]}
    return plain(**given, loss=loss.item(), gradient=z.grad)


def icarl_exemplars(rng: np.random.Generator) -> dict:
    """Orders of herding of one class, the means of two, and the answers for other features."""
    features = rng.normal(size=(12, 5))
    unit = torch.tensor(features / np.linalg.norm(features, axis=1, keepdims=True))
    order = HerdingSelectionStrategy.make_sorted_indices_from_features(None, unit)
    plugin, model = _ICaRLPlugin(4), torch.nn.Module()
    model.feature_extractor, model.eval_classifier = torch.nn.Identity(), NCMClassifier()
    strategy = types.SimpleNamespace(model=model, device="cpu")
    benchmark = types.SimpleNamespace(n_classes_per_exp=[2])
    strategy.experience = types.SimpleNamespace(benchmark=benchmark)
    plugin.embedding_size = 5
    plugin.x_memory = [torch.tensor(features[:4]), torch.tensor(features[4:9])]
    plugin.y_memory = [[0] * 4, [1] * 5]
    plugin.compute_class_means(strategy)
    asked = rng.normal(size=(8, 5))
    means = torch.stack([plugin.class_means[label] for label in (0, 1)])
    scores = model.eval_classifier(torch.tensor(asked))
    return plain(
        features=features, order=order, means=means, asked=asked, answers=scores.argmax(-1)
    )


def slda(rng: np.random.Generator) -> dict:
    """Streaming LDA after twenty rows one by one: its statistics, and scores of other rows."""
    x, labels = rng.normal(size=(20, SIZE)), rng.integers(0, CLASSES, 20)
    x += labels[:, None]
    method = StreamingLDA(
        slda_model=torch.nn.Identity(),
        criterion=None,
        input_size=SIZE,
        num_classes=CLASSES,
        shrinkage_param=0.01,
        evaluator=None,
    )
    for row, label in zip(torch.tensor(x), torch.tensor(labels), strict=True):
        method.fit(row[None], label[None])
    asked = rng.normal(size=(5, SIZE))
    return plain(
        shrinkage=0.01,
        x=x,
        labels=labels,
        mean=method.muK,
        count=method.cK,
        covariance=method.Sigma,
        asked=asked,
        scores=method.predict(torch.tensor(asked)),
    )


def l2p(rng: np.random.Generator) -> dict:
    """The prompts that queries take from a pool, and the mean of their similarities."""
    pool = Prompt(length=2, embed_dim=SIZE, prompt_pool=True, prompt_key=True, pool_size=5, top_k=2)
    pool.embedding_key = "cls"
    prompts, keys = rng.normal(size=(5, 2, SIZE)), rng.normal(size=(5, SIZE))
    pool.prompt.data, pool.prompt_key.data = torch.tensor(prompts), torch.tensor(keys)
    queries, tokens = rng.normal(size=(4, SIZE)), torch.zeros(4, 1, SIZE)
    found = pool(tokens, cls_features=torch.tensor(queries))
    return plain(
        prompts=prompts,
        keys=keys,
        queries=queries,
        tokens=found["prompted_embedding"][:, :-1].detach(),
        similarity=found["reduce_sim"].item(),
    )


def transfer(rng: np.random.Generator) -> dict:
    """The standalone metrics of a matrix of accuracies, as means over the tasks that they know."""
    initial, accuracy = rng.uniform(size=4), rng.uniform(size=(4, 4))
    metrics = {"forgetting": Forgetting(), "backward": BWT(), "forward": ForwardTransfer()}
    for task in range(4):
        if task < 3:
            for name in ("forgetting", "backward"):
                metrics[name].update(task, accuracy[task, task], initial=True)
                metrics[name].update(task, accuracy[-1, task])
        if task:
            metrics["forward"].update(task, initial[task], initial=True)
            metrics["forward"].update(task, accuracy[task - 1, task])
    means = {k: float(np.mean(list(m.result().values()))) for k, m in metrics.items()}
    return plain(initial=initial, accuracy=accuracy) | means


def main() -> None:
    torch.set_default_dtype(torch.float64)
    rng = np.random.default_rng(0)
    numbers = {
        "package": f"avalanche-lib {version('avalanche-lib')}, torch {torch.__version__}",
        "lwf": distillation(rng),
        "gem": [gem(rng, strength) for strength in (0.0, 0.5)],
        "agem": agem(rng),
        "ewc": [ewc(rng, mode, batch) for mode in ("separate", "online") for batch in (1, 3)],
        "si": si(rng),
        "der": [der(rng, 0.3, beta) for beta in (0.0, 0.5)],
        "icarl_loss": icarl_loss(rng),
        "icarl_exemplars": icarl_exemplars(rng),
        "slda": slda(rng),
        "l2p": l2p(rng),
        "metrics": transfer(rng),
    }
    Path(sys.argv[1]).write_text(json.dumps(numbers) + "\n")


if __name__ == "__main__":
    main()
