"""Rules by parameter path give some parameters another optimizer, decay or learning rate."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from lamina.platform.errors import UserError
from lamina.platform.optimizers import rules, table
from lamina.platform.training import experiment

PATHS = ("body/kernel", "body/bias", "head/kernel")
KEYS = {"weight_decay": 0.1}


def params():
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    return {"body": {"kernel": draw(3, 2), "bias": draw(2)}, "head": {"kernel": draw(2, 2)}}


def after(optimizer, tree, steps=3):
    state = optimizer.init(tree)
    for _ in range(steps):
        updates, state = optimizer.update(params(), state, tree, value=1.0, grad=params())
        tree = jax.tree.map(jnp.add, tree, updates)
    return tree


def ruled(**blocks):
    return rules.create(table.create, "adamw", 0.1, KEYS, blocks, PATHS)


def test_each_parameter_moves_as_its_own_optimizer_says():
    got = after(
        ruled(
            plain={"paths": ("bias$",), "weight_decay": 0.0},
            head={
                "paths": ("^head/",),
                "name": "sgd",
                "momentum": 0.9,
                "learning_rate_factor": 2.0,
            },
        ),
        params(),
    )
    whole = after(table.create("adamw", 0.1, **KEYS), params())
    plain = after(table.create("adamw", 0.1, weight_decay=0.0), params())
    head = after(table.create("sgd", 0.2, momentum=0.9), params())
    np.testing.assert_allclose(got["body"]["kernel"], whole["body"]["kernel"], rtol=1e-6)
    np.testing.assert_allclose(got["body"]["bias"], plain["body"]["bias"], rtol=1e-6)
    np.testing.assert_allclose(got["head"]["kernel"], head["head"]["kernel"], rtol=1e-6)
    assert not np.allclose(whole["body"]["bias"], plain["body"]["bias"])


def test_rules_may_leave_nothing_to_the_main_optimizer():
    blocks = {"all": {"paths": (".",), "name": "sgd"}}
    alone = rules.create(table.create, "galore", 0.1, {}, blocks, PATHS)
    plain = table.create("sgd", 0.1)
    jax.tree.map(np.testing.assert_array_equal, after(alone, params()), after(plain, params()))


def test_without_rules_the_optimizer_is_the_plain_one():
    assert jax.tree.structure(ruled().init(params())) == jax.tree.structure(
        table.create("adamw", 0.1).init(params())
    )


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ({"a": {"paths": ("nothing",)}}, "optimizer.rules.a.paths: 'nothing' is found in no name"),
        ({"a": {"paths": ("(",)}}, "optimizer.rules.a.paths"),
        ({"a": {"paths": "bias"}}, "should be regular expressions"),
        ({"a": {}}, "should be regular expressions"),
        ({"a": 3}, "should be a block"),
        ({"a": {"paths": ("bias",), "momentum": 0.9}}, "rules.a: .*momentum is not a key"),
        ({"a": {"paths": ("bias",), "name": "sdg"}}, "did you mean 'sgd'"),
        ({"a": {"paths": ("bias",), "learning_rate_factor": -1.0}}, "learning_rate_factor = -1.0"),
        ({"a": {"paths": ("bias",), "name": "lbfgs"}}, "need all parameters"),
        (
            {"a": {"paths": ("bias",)}, "b": {"paths": ("body",)}},
            "body/bias is selected by optimizer.rules.a and by optimizer.rules.b",
        ),
    ],
)
def test_a_mistake_names_the_rule(blocks, message):
    with pytest.raises(UserError, match=message):
        ruled(**blocks)


RULES = {
    "plain": {"paths": ("bias$",), "weight_decay": 0.0},
    "head": {"paths": ("^head/kernel",), "name": "muon", "learning_rate_factor": 0.5},
}


def config(**changes):
    base = {
        "steps": 6,
        "data": {"name": "digits", "batch_size": 16},
        "model": {"name": "mlp", "widths": (8,)},
        "task": {"name": "classification"},
        "optimizer": {"name": "soap", "learning_rate": 1e-2, "rules": RULES},
        "schedule": {"name": "plateau", "every": 2, "patience": 1},
        "log_every": 2,
        "steps_per_call": 2,
        "mesh": {"data": -1},
        "trackers": (),
    }
    return ConfigDict(base | changes)


def test_a_config_with_rules_is_assembled_sharded_over_eight_devices():
    c = config(mesh={"data": 2, "fsdp": 4}, sharding={"rules": "fsdp"})
    parts = experiment.assemble(experiment.resolve(c))
    kernel = parts.state.params["layers"]["0"]["kernel"].sharding
    moments = [
        leaf.sharding
        for leaf in jax.tree.leaves(parts.state.optimizer_state)
        if leaf.shape == (64, 8)
    ]
    assert len(moments) == 2
    assert all(m == kernel for m in moments)
    assert not kernel.is_fully_replicated


def test_a_config_whose_rule_selects_nothing_is_refused():
    broken = {"a": {"paths": ("tail",)}}
    c = config(optimizer={"name": "adamw", "learning_rate": 0.1, "rules": broken})
    with pytest.raises(UserError, match=r"optimizer.rules.a.paths: 'tail' is found in no name"):
        experiment.assemble(experiment.resolve(c))


def test_a_negative_learning_rate_is_refused():
    with pytest.raises(UserError, match=r"optimizer.learning_rate = -0.1"):
        experiment.resolve(config(optimizer={"name": "adamw", "learning_rate": -0.1}))
