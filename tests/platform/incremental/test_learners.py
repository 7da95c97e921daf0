"""Learners against their formulas, written out in numpy, both in float64."""

import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lamina.models.spec import Output
from lamina.platform import config as configs
from lamina.platform.errors import UserError
from lamina.platform.incremental.learners import LEARNERS, agem, chain, create, ewc, gem, lwf, table
from lamina.platform.training.learners import Mixed, Moment, Setup, Space

pytestmark = pytest.mark.usefixtures("x64")

SPACE = Space(experiences=3, classes=4, tasks=3, points=3, rows=12)
RNG = np.random.default_rng(0)
X, W = RNG.normal(size=(6, 3)), RNG.normal(size=(3, 4))
LABELS = np.array([0, 1, 2, 3, 0, 1])
PARAMS = {"kernel": W}


def forward(params, batch):
    return Output(batch["inputs"] @ params["kernel"])


def moment(experience=1, seen=(True, True, False, False)):
    seen = jnp.asarray(seen)
    return Moment(jnp.int32(experience), seen, seen, jnp.int32(0), jax.random.key(0))


def mixed(groups=None, **arrays):
    batch = {"inputs": jnp.asarray(X), "labels": jnp.asarray(LABELS)}
    batch |= {"weights": jnp.ones(6), "there": jnp.ones(6, bool)}
    return Mixed(batch | arrays, groups or {"stream": slice(0, 6)})


def state_of(learner):
    batch = jax.eval_shape(lambda: mixed().batch)
    own = learner.init(Setup(PARAMS, forward, batch, SPACE, jax.random.key(0)))
    return own | {name: jnp.asarray(value) for name, value in learner.hyper.items()}


def softmax(z):
    e = np.exp(np.asarray(z, np.float64) - np.max(z, -1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def test_ewc_penalty_of_two_experiences_is_the_sum_of_both():
    learner = create("ewc", strength=3.0)
    own, anchors, fishers = state_of(learner), [], []
    for _ in range(2):
        anchor, fisher = RNG.normal(size=(3, 4)), RNG.uniform(0, 2, size=(3, 4))
        fisher[0, 0] = 0.0
        new = ({"kernel": jnp.asarray(fisher)}, {"kernel": jnp.asarray(anchor)})
        own |= ewc.joined(own, *new)
        anchors, fishers = [*anchors, anchor], [*fishers, fisher]

    def value(params):
        return learner.loss(jnp.zeros(()), own, params, mixed(), None, moment(), forward)

    terms = zip(fishers, anchors, strict=True)
    expected = 1.5 * sum((f * (W - a) ** 2).sum() for f, a in terms)
    np.testing.assert_allclose(value(PARAMS), expected, rtol=1e-10)
    gradient = 3.0 * sum(f * (W - a) for f, a in zip(fishers, anchors, strict=True))
    np.testing.assert_allclose(jax.grad(value)(PARAMS)["kernel"], gradient, rtol=1e-10)


@pytest.mark.parametrize("fisher", ["empirical", "predicted", "batch"])
def test_fisher_information_of_a_linear_model(fisher):
    p = softmax(X @ W)
    labels = p.argmax(-1) if fisher == "predicted" else LABELS
    errors = np.eye(4)[labels] - p
    each = X[:, :, None] * errors[:, None, :]
    expected = each.mean(0) ** 2 if fisher == "batch" else (each**2).sum(0)
    key = jax.random.key(0)
    squares, count = ewc.squared_gradients(fisher, PARAMS, mixed().batch, forward, key)
    np.testing.assert_allclose(squares["kernel"], expected, rtol=1e-10)
    assert count == (1 if fisher == "batch" else 6)


@pytest.mark.parametrize("fisher", ["sampled", "exact"])
def test_the_true_fisher_is_the_mean_over_labels_and_padding_counts_nothing(fisher):
    p = softmax(X @ W)
    expected = np.zeros((3, 4))
    for label in range(4):
        errors = np.eye(4)[label] - p
        expected += (p[:, label, None, None] * (X[:, :, None] * errors[:, None, :]) ** 2).sum(0)
    batch = mixed().batch
    batch = jax.tree.map(lambda a: jnp.concatenate([a, a]), batch)
    batch["weights"] = jnp.concatenate([jnp.ones(6), jnp.zeros(6)])
    one = lambda key: ewc.squared_gradients(fisher, PARAMS, batch, forward, key)
    draws, error = (4000, 0.02) if fisher == "sampled" else (1, 1e-12)
    squares, counts = jax.vmap(one)(jax.random.split(jax.random.key(1), draws))
    np.testing.assert_allclose(squares["kernel"].mean(0), expected, rtol=5 * error, atol=error)
    assert (counts == 6).all()


def test_lwf_distils_over_the_old_classes_at_its_temperature():
    learner = create("lwf", alpha=0.5, temperature=3.0)
    own = state_of(learner)
    teacher = RNG.normal(size=(3, 4))
    own |= {
        "teacher": {"kernel": jnp.asarray(teacher)},
        "old": jnp.asarray([True, True, True, False]),
    }
    output = forward(PARAMS, mixed().batch)
    loss = learner.loss(jnp.asarray(2.0), own, PARAMS, mixed(), output, moment(), forward)
    target, log_p = softmax((X @ teacher)[:, :3] / 3), np.log(softmax((X @ W)[:, :3] / 3))
    np.testing.assert_allclose(loss, 2.0 + 0.5 * 9 * -(target * log_p).sum(-1).mean(), rtol=1e-10)


def test_lwf_pulls_nowhere_at_the_teacher_and_is_silent_in_the_first_experience():
    z = jnp.asarray(X @ W)
    old = jnp.asarray([True, True, False, False])
    pull = jax.grad(lambda s: lwf.distillation(z, s, old, jnp.asarray(2.0)).sum())(z)
    np.testing.assert_allclose(pull, 0, atol=1e-12)
    none = jnp.zeros(4, bool)
    assert not lwf.distillation(z, 2 * z, none, jnp.asarray(2.0)).any()


def test_si_paths_add_up_to_the_fall_of_a_quadratic_loss():
    learner = create("si", strength=0.5, damping=0.1)
    own = state_of(learner)
    centre, params, rate = W + 1.0, PARAMS, 1e-3
    start_loss = 0.5 * ((W - centre) ** 2).sum()
    for _ in range(3000):
        gradient = {"kernel": params["kernel"] - centre}
        new = {"kernel": params["kernel"] - rate * gradient["kernel"]}
        before = types.SimpleNamespace(params=params)
        after = types.SimpleNamespace(params=new)
        own, _ = learner.after(own, before, after, gradient, mixed(), None, moment())
        params = new
    end_loss = 0.5 * ((np.asarray(params["kernel"]) - centre) ** 2).sum()
    np.testing.assert_allclose(own["path"]["kernel"].sum(), start_loss - end_loss, rtol=2e-3)
    path = np.asarray(own["path"]["kernel"])
    own, _ = learner.end(own, types.SimpleNamespace(params=params), moment())
    expected = path / ((np.asarray(params["kernel"]) - W) ** 2 + 0.1)
    np.testing.assert_allclose(own["importance"]["kernel"], expected, rtol=1e-10)
    assert not own["path"]["kernel"].any()


def test_si_importances_stay_where_they_are_told_to():
    ends = {}
    for clamp in ((), (0.0, 1e-3)):
        learner = create("si", clamp=clamp)
        own = state_of(learner) | {"path": {"kernel": 0.01 * jnp.asarray(W)}}
        own, _ = learner.end(own, types.SimpleNamespace(params=PARAMS), moment())
        ends[clamp] = np.asarray(own["importance"]["kernel"])
    assert ends[()].min() < 0
    assert ends[()].max() > 1e-3
    np.testing.assert_array_equal(ends[0.0, 1e-3], np.clip(ends[()], 0.0, 1e-3))


def test_der_and_derpp_losses_of_two_draws():
    groups = {"stream": slice(0, 2), "logits": slice(2, 4), "labels": slice(4, 6)}
    stored = RNG.normal(size=(6, 4))
    there = jnp.asarray([True, True, True, False, True, True])
    batch = mixed(groups, logits=jnp.asarray(stored), there=there)
    output = forward(PARAMS, batch.batch)
    z = X @ W
    squared = ((z[2] - stored[2]) ** 2).mean()
    for name, beta in (("der", 0.0), ("derpp", 0.5)):
        learner = create(name, alpha=0.3, **({"beta": beta} if beta else {}))
        rows = batch._replace(groups={k: groups[k] for k in ("stream", *learner.memory.draws)})
        own = state_of(learner)
        loss = learner.loss(jnp.asarray(1.0), own, PARAMS, rows, output, moment(), forward)
        cross = -np.log(softmax(z))[[4, 5], LABELS[[4, 5]]].mean()
        np.testing.assert_allclose(loss, 1.0 + 0.3 * squared + beta * cross, rtol=1e-10)


def test_agem_takes_off_only_what_goes_against_the_reference():
    g, r = {"a": jnp.asarray([1.0, -2.0])}, {"a": jnp.asarray([1.0, 1.0])}
    out = agem.projected(g, r)["a"]
    np.testing.assert_allclose(out, np.array([1.0, -2.0]) + 0.5, rtol=1e-12)
    np.testing.assert_allclose(jnp.dot(out, r["a"]), 0, atol=1e-12)
    with_it = {"a": jnp.asarray([1.0, 2.0])}
    np.testing.assert_array_equal(agem.projected(with_it, r)["a"], with_it["a"])


def exact_dual(gram, dots, bound):
    """Enumerates which entries are at their bound, and takes the best feasible point."""
    best, value = None, np.inf
    for free in itertools.product([False, True], repeat=len(dots)):
        free, v = np.array(free), np.full(len(dots), bound)
        if free.any():
            rest = dots[free] + gram[np.ix_(free, ~free)] @ v[~free]
            v[free] = -np.linalg.solve(gram[np.ix_(free, free)], rest)
        if (v >= bound - 1e-12).all() and 0.5 * v @ gram @ v + dots @ v < value:
            best, value = v, 0.5 * v @ gram @ v + dots @ v
    return best


@pytest.mark.parametrize("bound", [0.0, 0.5])
@pytest.mark.parametrize("cosine", [0.0, 0.99])  # of the rows, which are alike as gradients are
@pytest.mark.parametrize("size", [1, 4])
def test_gem_solves_its_dual(size, cosine, bound):
    rng, solve = np.random.default_rng(size), jax.jit(gem.dual)
    for _ in range(20):
        common, own, g = rng.normal(size=12), rng.normal(size=(size, 12)), rng.normal(size=12)
        rows = np.sqrt(cosine) * common + np.sqrt(1 - cosine) * own
        gram, dots = rows @ rows.T + 1e-3 * np.eye(size), rows @ g
        there = jnp.ones(size, bool)
        found = solve(jnp.asarray(gram), jnp.asarray(dots), there, jnp.asarray(bound))
        np.testing.assert_allclose(found, exact_dual(gram, dots, bound), atol=1e-10)


def test_a_chain_of_one_link_is_that_link_and_a_chain_pipes_losses():
    ewc_, lwf_ = create("ewc", strength=2.0), create("lwf")
    both = chain(ewc=ewc_, lwf=lwf_)
    own = {"ewc": state_of(ewc_), "lwf": state_of(lwf_)}
    own["ewc"] |= {"importance": {"kernel": jnp.ones((3, 4))}}
    own["lwf"] |= {"old": jnp.ones(4, bool)}
    output = forward(PARAMS, mixed().batch)
    arguments = (PARAMS, mixed(), output, moment(), forward)
    loss = both.loss(jnp.asarray(1.0), own, *arguments)
    first = ewc_.loss(jnp.asarray(1.0), own["ewc"], *arguments)
    assert loss == lwf_.loss(first, own["lwf"], *arguments)
    assert both.needs == {"boundaries", "classes"}


def test_links_with_memories_share_one_or_are_refused():
    both = create("chain", links=("er", "derpp"), options={"er": {"policy": "reservoir"}})
    assert set(both.memory.draws) == {"er/replay", "derpp/logits", "derpp/labels"}
    assert both.memory.stores == ("logits",)
    with pytest.raises(UserError, match="share one memory"):
        create("chain", links=("er", "gem"))


def test_each_link_of_a_chain_sweeps_as_many_batches_as_it_wants():
    ewc_, lwf_ = create("ewc", fisher="empirical", batches=1), create("lwf")
    whole = lwf_._replace(sweep=ewc_.sweep._replace(batches=0))  # any other that wants all
    both, own = chain(ewc=ewc_, all=whole), state_of(ewc_)
    owns = {"ewc": own, "all": own}
    carry, alone = both.sweep.start(owns, PARAMS, moment()), ewc_.sweep.start(own, PARAMS, moment())
    alone = ewc_.sweep.add(alone, own, PARAMS, mixed(), forward, moment())
    for _ in range(2):
        carry = both.sweep.add(carry, owns, PARAMS, mixed(), forward, moment())
    done = both.sweep.finish(carry, owns, PARAMS, moment())
    expected = ewc_.sweep.finish(alone, own, PARAMS, moment())
    for name in ("importance", "anchor", "level"):
        jax.tree.map(np.testing.assert_array_equal, done["ewc"][name], expected[name])
    assert float(carry[1]["ewc"]["count"]) == 6
    assert float(carry[1]["all"]["count"]) == 12
    assert both.sweep.batches == 0


def test_every_learner_can_be_made_and_a_wrong_key_is_named():
    for name in LEARNERS:
        if name != "chain":
            create(name)
    with pytest.raises(UserError, match=r"learner\.strenght is not a key"):
        create("ewc", strenght=1.0)


def test_links_of_somebody_else_need_trust_as_learners_do():
    keys = {"name": "chain", "links": ("er", "colorsys:hls_to_rgb"), "options": {}}
    with pytest.raises(UserError, match=r"links, 'colorsys:hls_to_rgb': .*--trust=colorsys"):
        configs.build(keys, table.KIND, "learner", ())
    keys["links"] = ("er", own := f"{__name__}:mine")
    trusted = configs.build(keys, table.KIND, "learner", (__name__.partition(".")[0],))
    assert set(trusted.hyper) == {own}
    assert create("chain", links=(own,)).hyper  # a config of one's own code


def mine(*, strength: float = 1.0):
    return create("ewc", strength=strength)


@pytest.mark.parametrize(
    ("name", "keys", "message"),
    [
        ("ewc", {"strength": -1.0}, "learner.strength = -1.0 should be at least 0"),
        ("ewc", {"mode": "online", "decay": 2.0}, r"learner.decay = 2.0 should lie in \[0, 1\]"),
        ("ewc", {"batches": -1}, "learner.batches = -1"),
        ("ewc", {"batches": 10**12}, "learner.batches = 1000000000000 should lie"),
        ("si", {"damping": 0.0}, "learner.damping = 0.0 should be above 0"),
        ("si", {"clamp": (1.0, 0.0)}, r"learner.clamp = \(1.0, 0.0\) should be"),
        ("si", {"clamp": (1.0,)}, "learner.clamp"),
        ("lwf", {"temperature": 0.0}, "learner.temperature = 0.0 should be above 0"),
        ("der", {"alpha": -1.0}, "learner.alpha = -1.0"),
        ("derpp", {"beta": -1.0}, "learner.beta = -1.0"),
        ("gem", {"strength": -0.5}, "learner.strength = -0.5"),
        ("agem", {"sample": 0}, "learner.sample = 0 should be at least 1"),
        ("slda", {"shrinkage": 2.0}, "learner.shrinkage = 2.0"),
        ("l2p", {"pull": -1.0}, "learner.pull = -1.0"),
        ("ema_merge", {"decay": 1.5}, "learner.decay = 1.5"),
        ("icarl", {"replay": -1}, "learner.replay = -1"),
        ("chain", {"links": ("er", "er")}, "a name stands twice"),
        ("chain", {"links": ()}, "learner.links is empty"),
        ("chain", {"links": ("er", "nope")}, "learner.links, 'nope': .*is unknown"),
        ("chain", {"links": ("ewc",), "options": {"ewc": {"mode": 1}}}, "links, 'ewc': .*mode = 1"),
        ("chain", {"links": ("ewc", "icarl")}, "name 'icarl' first in learner.links"),
        ("chain", {"links": ("er",), "options": {"er": 5}}, "learner.options.er = 5 should have"),
    ],
)
def test_a_number_without_meaning_is_named(name, keys, message):
    with pytest.raises(UserError, match=message):
        create(name, **keys)
