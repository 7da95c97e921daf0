"""A checkpoint saved on one mesh is restored, and verified, on any other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lamina.platform.checkpoints import checksum
from lamina.platform.checkpoints.store import open_store


def mesh(*shape):
    count = int(np.prod(shape))
    return Mesh(np.array(jax.devices()[:count]).reshape(shape), ("a", "b")[: len(shape)])


def place(state, on, specs):
    return jax.tree.map(
        lambda x, spec: jax.device_put(x, NamedSharding(on, spec)),
        state,
        specs,
        is_leaf=lambda x: isinstance(x, P),
    )


def make_state():
    return {
        "kernel": jax.random.normal(jax.random.key(0), (16, 24)),
        "seeds": jnp.arange(4 * 8 * 8, dtype=jnp.bfloat16).reshape(4, 8, 8),
        "keys": jax.random.split(jax.random.key(1), 8),
        "step": jnp.int32(3),
    }


LAYOUTS = {
    "whole": (mesh, (1,), {"kernel": P(), "seeds": P(), "keys": P(), "step": P()}),
    "rows": (mesh, (8,), {"kernel": P("a"), "seeds": P(), "keys": P("a"), "step": P()}),
    "both": (
        mesh,
        (2, 4),
        {"kernel": P("b", "a"), "seeds": P(None, "b", "a"), "keys": P(("a", "b")), "step": P()},
    ),
    "columns": (
        mesh,
        (4, 2),
        {"kernel": P(None, "a"), "seeds": P("a"), "keys": P("b"), "step": P()},
    ),
}


def build(layout):
    make, shape, specs = LAYOUTS[layout]
    return place(make_state(), make(*shape), specs)


@pytest.mark.parametrize("saved", LAYOUTS)
def test_any_mesh_reads_what_another_wrote(tmp_path, saved):
    store = open_store(tmp_path)
    store.save(3, build(saved))
    expected = make_state()
    for layout in LAYOUTS:
        wanted = build(layout)
        form = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), wanted
        )
        restored = store.restore(form)
        assert restored.notes == ()
        for name, leaf in restored.state.items():
            assert leaf.sharding.is_equivalent_to(wanted[name].sharding, leaf.ndim), name
            want = expected[name]
            if name == "keys":
                leaf, want = jax.random.key_data(leaf), jax.random.key_data(want)
            assert np.asarray(leaf).tobytes() == np.asarray(want).tobytes()
    store.close()


def test_checksums_do_not_depend_on_the_mesh():
    plain = {name: leaf for name, leaf in make_state().items() if name != "keys"}
    expected = checksum.checksums(plain)
    for layout in LAYOUTS:
        state = build(layout)
        del state["keys"]
        assert checksum.checksums(state) == expected
        assert {n: checksum.own_share(b) for n, b in checksum.on_host(state).items()} == expected


def test_a_state_sharded_then_donated_is_saved_intact(tmp_path):
    store = open_store(tmp_path)
    state = {"kernel": build("both")["kernel"]}
    expected = np.array(state["kernel"])
    shardings = jax.tree.map(lambda x: x.sharding, state)
    overwrite = jax.jit(
        lambda t: jax.tree.map(lambda x: x * 0, t), donate_argnums=0, out_shardings=shardings
    )
    store.save(1, state)
    for _ in range(3):
        state = overwrite(state)
    jax.block_until_ready(state)
    restored = store.restore({"kernel": jax.ShapeDtypeStruct((16, 24), jnp.float32)})
    np.testing.assert_array_equal(restored.state["kernel"], expected)
    store.close()
