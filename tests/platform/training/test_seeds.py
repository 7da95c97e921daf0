"""Several seeds in one program compute what each computes alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lamina.platform.training import seeds


def step(carry, rows):
    return {"w": carry["w"] * 0.9 + rows.T @ jnp.tanh(rows @ carry["w"]) * 0.1}


def run(plan, carry, rows):
    def chunk(carry):
        parts = plan.split(carry)
        parts = jax.lax.fori_loop(0, 5, lambda i, p: plan.lift(step)(p, rows), parts)
        return plan.join(parts)

    return jax.jit(chunk)(carry)


@pytest.fixture
def carry():
    return {"w": jax.random.normal(jax.random.key(0), (3, 16, 8))}


def test_unrolled_seeds_are_bit_identical_to_single_runs(carry):
    rows = jax.random.normal(jax.random.key(1), (4, 16))
    together = run(seeds.Seeds(3, "unroll"), carry, rows)
    for i in range(3):
        alone = run(seeds.Seeds(1, "single"), seeds.take(carry, 3, i), rows)
        np.testing.assert_array_equal(together["w"][i], alone["w"])


def test_vmapped_seeds_agree_with_unrolled_ones(carry):
    rows = jax.random.normal(jax.random.key(1), (4, 16))
    unrolled = run(seeds.Seeds(3, "unroll"), carry, rows)
    mapped = run(seeds.Seeds(3, "vmap"), carry, rows)
    np.testing.assert_allclose(mapped["w"], unrolled["w"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("lowering", ["unroll", "vmap"])
def test_seeds_may_have_rows_of_their_own(carry, lowering):
    rows = jax.random.normal(jax.random.key(1), (3, 4, 16))
    together = run(seeds.Seeds(3, lowering, per_seed_rows=True), carry, rows)
    alone = run(seeds.Seeds(1, "single"), seeds.take(carry, 3, 2), rows[2])
    np.testing.assert_allclose(together["w"][2], alone["w"], rtol=1e-4, atol=1e-6)


def test_cpu_unrolls_and_accelerators_map():
    assert seeds.plan(1, "cpu", 1, False).lowering == "single"
    assert seeds.plan(3, "cpu", 1, False).lowering == "unroll"
    assert seeds.plan(3, "tpu", 1, False).lowering == "vmap"
    assert seeds.plan(4, "cpu", 2, False).lowering == "vmap"


def test_seeds_that_do_not_divide_over_their_mesh_axis_are_refused():
    with pytest.raises(ValueError, match=r"mesh.seed = 2 doesn't divide the 3 seeds"):
        seeds.plan(3, "tpu", 2, False)
