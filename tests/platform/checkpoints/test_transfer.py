"""Which parameters go where: parts, renaming, freezing, and errors that help."""

import doctest

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lamina.platform.checkpoints import names, transfer
from lamina.platform.errors import UserError


def source():
    return {
        "encoder": {"0": {"kernel": np.ones((2, 3))}, "1": {"kernel": np.full((3, 3), 2.0)}},
        "head": {"kernel": np.zeros((3, 10), np.float32)},
    }


def target():
    return {
        "body": {"0": {"kernel": jnp.zeros((2, 3))}, "1": {"kernel": jnp.zeros((3, 3))}},
        "head": {"kernel": jnp.full((3, 5), 7.0)},
    }


RENAME = (("^encoder/", "body/"),)


def test_a_part_is_renamed_and_loaded_and_the_rest_stays():
    done = transfer.transfer(source(), target(), exclude=("^head/",), rename=RENAME)
    assert float(done.params["body"]["1"]["kernel"][0, 0]) == 2.0
    assert float(done.params["head"]["kernel"][0, 0]) == 7.0
    assert done.params["body"]["0"]["kernel"].dtype == jnp.float32
    assert done.loaded == {
        "body/0/kernel": "encoder/0/kernel",
        "body/1/kernel": "encoder/1/kernel",
    }
    assert done.left == ("head/kernel",)
    assert done.unused == ("head/kernel",)
    assert "unused (head/kernel)" in done.report()


def test_include_takes_only_what_it_names():
    done = transfer.transfer(source(), target(), include=("body/0",), rename=RENAME)
    assert list(done.loaded) == ["body/0/kernel"]
    assert float(done.params["body"]["1"]["kernel"][0, 0]) == 0.0


def test_groups_rename_numbered_layers():
    rename = ((r"^encoder/(\d+)/kernel$", r"body/\1/kernel"),)
    assert len(transfer.transfer(source(), target(), include=("body",), rename=rename).loaded) == 2


def test_every_mismatch_is_listed_with_the_nearest_name():
    with pytest.raises(UserError) as caught:
        transfer.transfer(source(), target())
    message = str(caught.value)
    assert "3 of 3" in message
    assert "body/0/kernel: not in the source (nearest:" in message
    assert "head/kernel: shape (3, 10) in the source, (3, 5) here" in message


def test_integers_do_not_become_floats():
    with pytest.raises(UserError, match="w: int32 in the source, float32 here"):
        transfer.transfer({"w": np.ones(2, np.int32)}, {"w": jnp.ones(2)})


def test_values_go_to_the_targets_dtype_and_sharding():
    mesh = Mesh(np.array(jax.devices()), ("a",))
    sharding = NamedSharding(mesh, P("a"))
    want = {"w": jax.device_put(jnp.zeros(8, jnp.bfloat16), sharding)}
    for value in (np.arange(8.0), jnp.arange(8.0)):
        leaf = transfer.transfer({"w": value}, want).params["w"]
        assert leaf.dtype == jnp.bfloat16
        assert leaf.sharding == sharding
        np.testing.assert_array_equal(np.asarray(leaf, np.float32), np.arange(8))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"include": ("boddy/",)}, "include: 'boddy/' is found in no name"),
        ({"exclude": ("decoder",)}, "exclude: 'decoder' is found in no name"),
        ({"rename": (("decoder", "x"),)}, "rename: 'decoder' is found in no name"),
        ({"include": ("(",)}, r"include: '\(' is no regular expression"),
        ({"rename": (("encoder", r"\7"),)}, "is no replacement"),
        ({"rename": (("encoder",),)}, "is no .* pair"),
        ({"rename": ((r"\d", "x"),)}, "both encoder/0/kernel and encoder/1/kernel .* become"),
    ],
)
def test_rules_that_fit_nothing_are_errors(options, message):
    with pytest.raises(UserError, match=message):
        transfer.transfer(source(), target(), **options)


def test_the_examples_in_the_docstrings_are_true():
    for module in (names, transfer):
        result = doctest.testmod(module)
        assert result.attempted > 0
        assert result.failed == 0
