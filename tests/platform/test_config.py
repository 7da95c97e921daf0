"""Configs are checked against signatures, all mistakes at once, and go through JSON unchanged."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import pytest
from ml_collections import ConfigDict

from lamina.platform import config as configs
from lamina.platform.errors import UserError


class Settings(NamedTuple):
    program: str = "train"
    steps: int = 0
    seeds: tuple[int, ...] = (0,)
    precision: Literal["float32", "bfloat16"] = "float32"


class Evaluation(NamedTuple):
    every: int = 0


class Shared(NamedTuple):
    batch_size: int
    seed: int = 0


def network(rngs, *, width: int = 3, rate: float = 0.1):
    if width < 1:
        raise ValueError(f"width = {width} should be positive")
    return rngs, width, rate


def digits(*, classes: int = 10):
    return classes


SCHEMA = configs.Schema(
    Settings,
    {"evaluation": Evaluation},
    {
        "model": configs.Kind({"network": network}),
        "data": configs.Kind({"digits": digits}, shared=Shared),
    },
)


def config(**changes):
    base = {
        "steps": 5,
        "model": {"name": "network", "rate": 1},
        "data": {"name": "digits", "batch_size": 3},
    }
    return ConfigDict(base | changes)


def test_resolving_fills_in_every_default():
    resolved = configs.resolve(config(), SCHEMA)
    assert resolved.model.width == 3
    assert resolved.evaluation.every == 0
    assert resolved.seeds == (0,)
    assert resolved.data.seed == 0
    assert resolved.data.classes == 10


def test_an_int_where_a_float_is_wanted_becomes_one():
    rate = configs.resolve(config(), SCHEMA).model.rate
    assert rate == 1.0
    assert isinstance(rate, float)


def test_a_resolved_config_resolves_to_itself():
    once = configs.resolve(config(), SCHEMA)
    assert configs.to_json(configs.resolve(once, SCHEMA)) == configs.to_json(once)


def test_all_mistakes_are_reported_at_once_with_the_nearest_names():
    wrong = config(
        stepz=1,
        steps="many",
        precision="float31",
        evaluation=3,
        model={"name": "netwrk"},
        data={"name": "digits", "batch": 3},
    )
    with pytest.raises(UserError) as error:
        configs.resolve(wrong, SCHEMA)
    text = str(error.value)
    for part in (
        "7 mistakes",
        "stepz is not a key (did you mean 'steps'?)",
        "steps = 'many' should be an int",
        "'float31' should be one of 'float32', 'bfloat16'",
        "evaluation = 3 should be a block",
        "'netwrk' is unknown (did you mean 'network'?)",
        "data.batch is not a key (did you mean 'batch_size'?)",
        "data.batch_size is missing",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("value", "part"),
    [([1, 2], "list"), (None, "None"), (float("nan"), "not finite"), (object(), "object")],
)
def test_what_json_cannot_hold_is_refused(value, part):
    with pytest.raises(UserError, match=part):
        configs.resolve({"steps": value}, SCHEMA)


def test_true_is_no_number_and_one_is_no_truth():
    with pytest.raises(UserError, match="steps = True should be an int"):
        configs.resolve(config(steps=True), SCHEMA)


def test_json_gives_back_tuples_and_types_exactly():
    original = ConfigDict(
        {"a": (1, 2.0, "x", (True,)), "b": {"c": 1e-3, "d": 1, "e": 1.0, "f": ()}, "g": "1"}
    )
    back = configs.from_json(configs.to_json(original))
    assert back.to_dict() == original.to_dict()
    assert [type(v) for v in back.a] == [int, float, str, tuple]
    assert isinstance(back.b.e, float)
    assert isinstance(back.b.d, int)


@pytest.mark.parametrize("text", ["{", "[1]", '{"a": null}', "nul", '{"a": NaN}'])
def test_bad_json_is_the_users_mistake(text):
    with pytest.raises(UserError):
        configs.from_json(text)


def test_names_of_somebodys_code_need_trust():
    foreign = config(model={"name": "colorsys:rgb_to_hsv"})
    with pytest.raises(UserError, match="--trust=colorsys"):
        configs.resolve(foreign, SCHEMA, trust=())
    with pytest.raises(UserError, match="--trust=colorsys"):
        configs.resolve(foreign, SCHEMA, trust=("color",))
    assert configs.resolve(foreign, SCHEMA, trust=("colorsys",)).model.name


def test_a_name_that_cannot_be_imported_is_named():
    with pytest.raises(UserError, match="no_such_package"):
        configs.resolve(config(model={"name": "no_such_package.models:net"}), SCHEMA)


def test_building_passes_supplied_arguments_and_keys():
    resolved = configs.resolve(config(), SCHEMA)
    built = configs.build(resolved.model, SCHEMA.kinds["model"], "model", (), "keys")
    assert built == ("keys", 3, 1.0)


def test_what_a_factory_refuses_is_the_users_mistake():
    resolved = configs.resolve(config(model={"name": "network", "width": 0}), SCHEMA)
    with pytest.raises(UserError, match=r"model \(network\): width = 0 should be positive"):
        configs.build(resolved.model, SCHEMA.kinds["model"], "model", (), "keys")


def test_a_factory_that_takes_other_arguments_is_told_which_it_is_given():
    kind = SCHEMA.kinds["model"]._replace(takes="keys")
    resolved = configs.resolve(config(), SCHEMA)
    with pytest.raises(UserError, match=r"model \(network\): too many.* takes \(keys, \*, keys of"):
        configs.build(resolved.model, kind, "model", (), "keys", "spec")
    with pytest.raises(UserError, match=r"missing a required argument"):
        configs.build(resolved.model, kind, "model", ())


def test_a_type_error_inside_a_factory_is_not_taken_for_its_signature():
    def broken(*, width: int = 3):
        return width + "1"

    kind = configs.Kind({"broken": broken})
    with pytest.raises(TypeError, match="unsupported operand"):
        configs.build({"name": "broken", "width": 3}, kind, "model", ())


def test_what_a_factory_returns_must_be_of_its_kind():
    kind = SCHEMA.kinds["model"]._replace(makes=(dict, Callable))
    resolved = configs.resolve(config(), SCHEMA)
    with pytest.raises(UserError, match="returns a tuple, not a dict or Callable"):
        configs.build(resolved.model, kind, "model", (), "keys")


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("steps", "7", 7),
        ("seeds", "0,1,2", (0, 1, 2)),
        ("seeds", "(3,)", (3,)),
        ("seeds", "4", (4,)),
        ("names", "sgd, adamw", ("sgd", "adamw")),
        ("names", "sgd", ("sgd",)),
        ("model.rate", "1e-3", 1e-3),
        ("model.name", "17", "17"),
        ("evaluation.every", "20", 20),
        ("flag", "true", True),
        ("words", "a b", "a b"),
    ],
)
def test_an_override_takes_the_type_of_its_text(key, text, value):
    changed = config(seeds=(0,), names=("lion",))
    configs.override(changed, key, text)
    assert configs.flatten(changed)[key] == value


def test_a_tuple_takes_the_place_of_a_block():
    changed = config(space=dict(rate=dict(low=0.1, high=1.0)))
    configs.override(changed, "space.rate", "0.1,0.2")
    assert changed.space.rate == (0.1, 0.2)


def test_an_override_of_a_block_names_its_keys():
    with pytest.raises(UserError, match=r"model\.name, model\.rate"):
        configs.override(config(), "model", "3")


def test_differences_name_keys_with_both_values():
    assert configs.difference(config(), config(steps=6)) == {"steps": (5, 6)}
    assert configs.difference(config(), config(steps=6), free=("steps",)) == {}
    left = configs.difference({"a": {"b": 1}, "ab": 1}, {}, free=("a",))
    assert left == {"ab": (1, configs.MISSING)}
    extra = configs.difference(config(), config(extra=1))
    assert extra == {"extra": (configs.MISSING, 1)}
    assert "(absent) -> 1" in configs.describe_difference(extra)


def test_a_shipped_experiment_is_found_by_its_name():
    loaded, path = configs.load("quickstart")
    assert loaded.data.name == "digits"
    assert path.name == "quickstart.py"


def test_a_config_file_takes_its_argument(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def get_config(arg='x'):\n    return {'arg': arg}\n")
    assert configs.load(str(file))[0].arg == "x"
    assert configs.load(f"{file}:wide")[0].arg == "wide"


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("x = 1", "no get_config"),
        ("def get_config(): return 3", "gave int"),
        ("def get_config(): raise KeyError('k')", "KeyError"),
        ("import no_such_module", "no_such_module"),
        ("def get_config(:", "SyntaxError"),
    ],
)
def test_a_broken_config_file_is_named(tmp_path, content, part):
    file = tmp_path / "broken.py"
    file.write_text(content)
    with pytest.raises(UserError, match=part) as error:
        configs.load(str(file))
    assert str(file) in str(error.value)


def test_an_unknown_experiment_names_the_nearest():
    with pytest.raises(UserError, match="did you mean 'quickstart'"):
        configs.load("quikstart")


def test_an_argument_that_a_file_does_not_take_is_refused(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def get_config():\n    return {}\n")
    with pytest.raises(UserError, match="takes no argument"):
        configs.load(f"{file}:wide")


def test_contradictions_are_reported_with_the_other_mistakes():
    schema = SCHEMA._replace(contradictions=lambda c: ["steps are odd"] if c.steps % 2 else [])
    with pytest.raises(UserError) as error:
        configs.resolve(config(stepz=1), schema)
    assert "stepz" in str(error.value)
    assert "steps are odd" in str(error.value)


def test_keys_that_only_the_old_name_had_are_dropped_with_it():
    block = ConfigDict({"name": "network", "rate": 0.5, "filters": 3, "wrong": 1})
    configs.drop_foreign(block, SCHEMA.kinds["model"], "model", (), given=["wrong"])
    assert block.to_dict() == {"name": "network", "rate": 0.5, "wrong": 1}


@pytest.mark.parametrize(
    "wrong",
    [
        {"data": {"name": "digit", "batch_size": 3}},
        {"data": {"name": "digits", "batch_size": "3"}},
        {"data": {"name": "numpy:ones"}},
        {"model": {"name": ":x"}},
        {"model": {"name": "numpy:pi"}},
    ],
)
def test_contradictions_are_not_looked_for_in_a_config_with_holes(wrong):
    needs_all = SCHEMA._replace(contradictions=lambda c: [str(c.data.batch_size + c.model.width)])
    with pytest.raises(UserError):
        configs.resolve(config(**wrong), needs_all, trust=("numpy",))
