"""Rules turn logical axes and paths into partition specs, and refuse what can't be."""

import jax
import pytest
from jax.sharding import PartitionSpec as P

from lamina.models import placement
from lamina.models.axes import VOCABULARY
from lamina.sharding import mesh as meshes
from lamina.sharding import rules

LINEAR = (("embed", "mlp"), (8, 8))


@pytest.fixture(scope="module")
def mesh():
    return meshes.create(jax.devices(), data=2, fsdp=2, tensor=2)


def spec(mesh, preset, names, shape, path="layers/up/kernel", state=False, **explicit):
    chosen = rules.preset(preset, **explicit)
    return rules.partition_spec(names, shape, chosen, mesh, path, state=state)


@pytest.mark.parametrize(
    ("preset", "parameter", "moment"),
    [
        ("data", P(), P()),
        ("zero1", P(), P(("data", "fsdp"))),
        ("fsdp", P("fsdp"), P("fsdp")),
        ("tensor", P(None, "tensor"), P(None, "tensor")),
        ("fsdp+tensor", P("fsdp", "tensor"), P("fsdp", "tensor")),
        ("sequence", P(None, "tensor"), P(None, "tensor")),
    ],
)
def test_each_preset_splits_the_axes_it_is_about(mesh, preset, parameter, moment):
    assert spec(mesh, preset, *LINEAR) == parameter
    assert spec(mesh, preset, *LINEAR, state=True) == moment


def test_an_axis_of_one_device_splits_nothing():
    mesh = meshes.create(jax.devices())
    assert spec(mesh, "fsdp+tensor", *LINEAR) == P()


def test_between_rules_of_a_preset_the_first_dimension_wins(mesh):
    assert spec(mesh, "fsdp", ("embed", "conv_out"), (8, 8)) == P("fsdp")


def test_an_axis_may_be_split_over_two_mesh_axes(mesh):
    assert spec(mesh, "data", ("embed",), (8,), axes={"embed": ("fsdp", "tensor")}) == P(
        ("fsdp", "tensor")
    )


def test_explicit_rules_stand_over_the_presets(mesh):
    assert spec(mesh, "fsdp", *LINEAR, axes={"embed": ""}) == P()
    assert spec(mesh, "fsdp", *LINEAR, axes={"mlp": "tensor"}) == P("fsdp", "tensor")


def test_a_rule_by_path_stands_over_all_others_and_the_first_counts(mesh):
    paths = ((r"up/kernel$", ("", "fsdp")), (r"kernel", ("tensor", "")))
    by_path = lambda path: spec(mesh, "fsdp", *LINEAR, path=path, paths=paths)
    assert by_path("layers/up/kernel") == P(None, "fsdp")
    assert by_path("layers/down/kernel") == P("tensor")
    assert by_path("embedding") == P("fsdp")


def test_a_rule_by_path_may_leave_out_the_stacked_layers(mesh):
    paths = ((r"kernel", ("tensor", "")),)
    names, shape = ("layers", "mlp", "embed"), (3, 8, 8)
    assert spec(mesh, "data", names, shape, paths=paths) == P(None, "tensor")


def test_a_question_mark_leaves_whole_what_does_not_divide(mesh):
    optional = {"embed": "fsdp?"}
    assert spec(mesh, "data", ("embed",), (8,), axes=optional) == P("fsdp")
    assert spec(mesh, "data", ("embed",), (7,), axes=optional) == P()
    both = {"embed": ("fsdp", "tensor?")}
    assert spec(mesh, "data", ("embed",), (6,), axes=both) == P("fsdp")


def test_arrays_without_names_are_split_along_their_largest_dimension_that_divides(mesh):
    assert spec(mesh, "fsdp", (None, None), (6, 9)) == P("fsdp")
    assert spec(mesh, "zero1", (None, None), (6, 8)) == P()
    assert spec(mesh, "zero1", (None, None), (6, 8), state=True) == P(None, ("data", "fsdp"))
    assert spec(mesh, "fsdp", (None,), (8,)) == P()
    assert spec(mesh, "fsdp", (None, None), (5, 9)) == P()


@pytest.mark.parametrize(
    ("names", "shape", "explicit", "part"),
    [
        (("embed",), (7,), {}, r"'embed' of layers/up/kernel has size 7.*or ask for 'fsdp\?'"),
        (
            ("embed",),
            (6,),
            {"axes": {"embed": ("fsdp", "tensor")}},
            r"doesn't divide by 4 \(fsdp x tensor\)",
        ),
        (("embed",), (8,), {"axes": {"embed": "pipeline"}}, "names no axis of the mesh"),
        (
            *LINEAR,
            {"axes": {"embed": "tensor", "mlp": "tensor"}},
            r"dimensions 0 and 1 of layers/up/kernel \('embed' and 'mlp'\) both ask for the mesh "
            r"axis 'tensor'",
        ),
        (*LINEAR, {"axes": {"mlp": "fsdp"}}, r"both ask for the mesh axis 'fsdp'"),
        (*LINEAR, {"paths": (("up", ("fsdp", "fsdp")),)}, "dimensions 0 and 1"),
        (*LINEAR, {"paths": (("up", ("fsdp",)),)}, "1 dimensions, but layers/up/kernel has 2"),
    ],
)
def test_rules_that_cannot_be_followed_are_refused(mesh, names, shape, explicit, part):
    with pytest.raises(ValueError, match=part):
        spec(mesh, "fsdp", names, shape, **explicit)


def test_the_advice_of_the_message_works(mesh):
    with pytest.raises(ValueError, match=r"sharding.paths") as raised:
        spec(mesh, "fsdp", *LINEAR, axes={"mlp": "fsdp"})
    advice = str(raised.value).partition("sharding.paths = ")[2]
    assert spec(mesh, "fsdp", *LINEAR, axes={"mlp": "fsdp"}, paths=eval(advice)) == P("fsdp")


def test_unknown_presets_and_broken_expressions_are_refused():
    with pytest.raises(ValueError, match=r"'zero3' is unknown: one of data, zero1, fsdp"):
        rules.preset("zero3")
    with pytest.raises(ValueError, match="is no regular expression"):
        rules.preset("data", paths=(("(", ("",)),))


def test_expressions_that_find_no_parameter_are_listed():
    chosen = rules.preset("data", paths=(("up", ("",)), ("missing", ("",))))
    assert rules.unused_paths(chosen, ["layers/up/kernel"]) == ["missing"]


def test_the_presets_speak_of_axes_that_the_models_have():
    for preset in rules.PRESETS.values():
        assert {*preset.parameters, *preset.state} <= VOCABULARY | {rules.UNNAMED}
        assert set(preset.activations) <= placement.VOCABULARY


def test_activations_are_split_by_the_presets_rules(mesh):
    found = rules.of_activations(rules.preset("sequence"), mesh)
    assert found["batch"] == meshes.BATCH_AXES
    assert found["stream"] == ("sequence", "tensor")
    assert found["heads"] == ("tensor",)
    assert "heads" not in rules.of_activations(rules.preset("fsdp"), mesh)


def test_hidden_activations_follow_explicit_rules_but_for_axes_of_the_batch(mesh):
    chosen = rules.preset("data", axes={"mlp": "tensor", "heads": "fsdp"})
    found = rules.of_activations(chosen, mesh)
    assert found["mlp"] == ("tensor",)
    assert found["heads"] == ()


def test_an_activation_rule_for_an_axis_that_the_mesh_lacks_is_refused(mesh):
    with pytest.raises(ValueError, match=r"sharding.activations.stream: 'time' is no axis"):
        rules.of_activations(rules.preset("data", activations={"stream": "time"}), mesh)
