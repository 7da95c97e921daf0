"""FLOPs, loops and collectives that the parser reads agree with XLA's count and with hand sums."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lamina.sharding.pods import chips, collectives, hlo, loops, products, torus

B, D, F, L = 64, 1024, 4096, 4


def mlp(x, weights, unroll):
    def layer(x, w):
        up, down = w
        return x + jax.nn.gelu(x @ up) @ down, None

    return jax.lax.scan(layer, x, weights, unroll=unroll)[0]


def attention(x, weights, unroll):
    def layer(x, w):
        up, down = w
        logits = jnp.einsum("btd,bsd->bts", x @ up @ up.T, x)
        return x + jnp.einsum("bts,bsd->btd", jax.nn.softmax(logits), x) @ up @ down, None

    return jax.lax.scan(layer, x, weights, unroll=unroll)[0]


def convolutions(x, weights, unroll):
    def layer(x, w):
        return x + jax.lax.conv_general_dilated(
            x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        ), None

    return jax.lax.scan(layer, x, weights, unroll=unroll)[0]


MODELS = {
    "mlp": (mlp, (B, D), ((L, D, F), (L, F, D))),
    "attention": (attention, (2, 1024, D), ((L, D, F), (L, F, D))),
    "convolutions": (convolutions, (2, 8, 8, 256), (L, 3, 3, 256, 256)),
}


def flops_of(text):
    module = hlo.parse(text)
    return sum(
        visit.times * products.products(module, visit.computation, visit.instruction).flops
        for visit in loops.schedule(module).visits
    )


@pytest.mark.parametrize("name", MODELS)
def test_parsed_flops_of_a_scan_are_those_xla_counts_in_the_unrolled_program(name):
    model, shape, weights = MODELS[name]
    leaf = lambda dims: jax.ShapeDtypeStruct(dims, jnp.float32)
    arguments = (leaf(shape), jax.tree.map(leaf, weights, is_leaf=lambda w: isinstance(w[0], int)))

    def compiled(unroll):
        step = jax.grad(lambda x, w: jnp.sum(model(x, w, unroll) ** 2), argnums=(0, 1))
        return jax.jit(step).lower(*arguments).compile()

    unrolled = compiled(L)
    counted = unrolled.cost_analysis()["flops"]
    # Wide layers, so that the elementwise operations, which XLA counts too, are few beside them.
    assert flops_of(unrolled.as_text()) == pytest.approx(
        unrolled.cost_analysis()["flops"], rel=5e-3
    )
    assert flops_of(compiled(1).as_text()) == pytest.approx(counted, rel=5e-3)


def placed(**sizes):
    devices = np.array(jax.devices()).reshape(tuple(sizes.values()))
    mesh = Mesh(devices, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))
    places = np.array([[0, i // 4, i % 4, 0] for i in range(8)])
    return mesh, torus.Layout(chips.CHIPS["v5e"], dict(sizes), places, (2, 4, 1))


def collectives_of(function, layout, *arguments):
    module = hlo.parse(jax.jit(function).lower(*arguments).compile().as_text())
    return collectives.collectives(module, loops.schedule(module), layout)


def test_a_fully_sharded_layer_gathers_its_kernel_and_reduces_its_gradient():
    mesh, layout = placed(fsdp=8)
    split = NamedSharding(mesh, P("fsdp"))
    x = jax.ShapeDtypeStruct((64, D), jnp.float32, sharding=split)
    kernel = jax.ShapeDtypeStruct((D, F), jnp.float32, sharding=split)

    def loss(kernel, x):
        hidden = jax.lax.with_sharding_constraint(x @ kernel, split)
        return jnp.sum(hidden**2)

    step = lambda kernel, x: jax.lax.with_sharding_constraint(jax.grad(loss)(kernel, x), split)
    found = collectives_of(step, layout, kernel, x)
    assert all(c.axes == ("fsdp",) and c.group == 8 and c.times == 1 for c in found)
    by_kind = {}
    for c in found:
        by_kind.setdefault(c.kind, []).append(c.bytes)
    assert by_kind.pop("all-gather") == [4 * D * F]
    # The CPU's compiler writes the scatter of the gradient as a whole reduction.
    assert by_kind.pop("all-reduce", None) or by_kind.pop("reduce-scatter") == [4 * D * F]
    assert not by_kind


def test_a_column_and_row_split_layer_reduces_its_output_once():
    mesh, layout = placed(data=2, tensor=4)
    place = lambda *names: NamedSharding(mesh, P(*names))
    x = jax.ShapeDtypeStruct((64, D), jnp.float32, sharding=place("data"))
    up = jax.ShapeDtypeStruct((D, F), jnp.float32, sharding=place(None, "tensor"))
    down = jax.ShapeDtypeStruct((F, D), jnp.float32, sharding=place("tensor"))

    def forward(x, up, down):
        return jax.lax.with_sharding_constraint(jax.nn.relu(x @ up) @ down, place("data"))

    (found,) = collectives_of(forward, layout, x, up, down)
    assert (found.kind, found.axes, found.group) == ("all-reduce", ("tensor",), 4)
    assert found.bytes == 4 * 64 * D / 2


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{{0,2},{1,3}}", [[0, 2], [1, 3]]),
        ("[2,4]<=[8]", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("[4,2]<=[2,4]T(1,0)", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("mesh['a'=4,'b'=2] {'a'}", [[0, 2, 4, 6], [1, 3, 5, 7]]),
        ("mesh['a'=4,'b'=2] {'b'}", [[0, 1], [2, 3], [4, 5], [6, 7]]),
        ("mesh['a'=8] {'a':(2)2}", [[0, 2], [1, 3], [4, 6], [5, 7]]),
        ("mesh['a'=4,'b'=2] {'a','b'}", [[0, 1, 2, 3, 4, 5, 6, 7]]),
        ("{}", [[0, 1, 2, 3, 4, 5, 6, 7]]),
    ],
)
def test_groups_are_read_in_every_syntax(text, expected):
    instruction = hlo.Instruction("r", "all-reduce", (), (), f"channel_id=1, replica_groups={text}")
    assert collectives.groups(instruction, 8) == expected


LOOP = """HloModule loop, is_scheduled=true

%condition (p: (s32[], f32[4])) -> pred[] {
  %limit = s32[] constant(LIMIT)
  %p = (s32[], f32[4]{0:T(128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %less = pred[]{:T(512)} compare(%i, %limit), direction=LT
}

%body (q: (s32[], f32[4])) -> (s32[], f32[4]) {
  %step = s32[] constant(STEP)
  %q = (s32[], f32[4]{0:T(128)}) parameter(0)
  %j = s32[]{:T(128)} get-tuple-element(%q), index=0
  %x = f32[4]{0:T(128)S(1)} get-tuple-element(%q), index=1
  %next = s32[]{:T(128)S(6)} add(%j, %step)
  ROOT %tuple = (s32[], f32[4]{0}) tuple(%next, %x)
}

ENTRY %main (a: f32[4]) -> (s32[], f32[4]) {
  %a = f32[4]{0} parameter(0)
  %zero = s32[] constant(START)
  %start = (s32[], f32[4]{0}) tuple(%zero, %a)
  ROOT %loop = (s32[], f32[4]{0}) while(%start), condition=%condition, body=%body
}
"""


@pytest.mark.parametrize(
    ("limit", "step", "start", "trips"), [(8, 1, 0, 8), (8, 2, 0, 4), (8, 3, 0, 3), (8, 1, 2, 6)]
)
def test_a_loop_without_a_known_trip_count_is_read_from_its_condition_and_step(
    limit, step, start, trips
):
    text = LOOP.replace("LIMIT", str(limit)).replace("STEP", str(step))
    module = hlo.parse(text.replace("START", str(start)))
    found = loops.schedule(module)
    assert found.unknown == ()
    assert {v.times for v in found.visits if v.computation.name == "body"} == {trips}


def test_a_loop_that_cannot_be_read_counts_once_and_is_named():
    text = LOOP.replace("constant(LIMIT)", "custom-call()").replace("STEP", "1")
    found = loops.schedule(hlo.parse(text.replace("START", "0")))
    assert found.unknown == ("loop",)


def test_what_is_no_hlo_is_refused():
    with pytest.raises(ValueError, match="no HLO"):
        hlo.parse("hello")
    with pytest.raises(ValueError, match="ENTRY"):
        hlo.parse("HloModule empty\n")
