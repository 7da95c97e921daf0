"""Incremental runs: one program for the whole stream, cut anywhere, on any number of devices."""

import json

import jax
import numpy as np
import pytest

from lamina.platform.errors import UserError
from lamina.platform.incremental import memory as memories
from lamina.platform.incremental import metrics, results
from lamina.platform.programs import incremental
from lamina.platform.run import restore


def params_of(result):
    return jax.tree.map(np.asarray, result.state.params)


def assert_same(one, two):
    jax.tree.map(np.testing.assert_array_equal, one, two)


def test_a_run_records_its_accuracies_and_its_scores(learn, tmp_path):
    result, accuracy = learn("er", seeds=(0, 1))
    assert accuracy.shape == (2, 3, 3)
    for name, function in metrics.METRICS.items():
        if name != "forward_transfer":
            np.testing.assert_allclose(result.final[name].values, function(accuracy), err_msg=name)
    recorded = [r.value for r in result.metrics if r.split == "task_1" and r.seed == 1]
    np.testing.assert_allclose(recorded[1:], accuracy[1, :, 0])
    assert [r.step for r in result.metrics if r.name == "loss" and r.seed == 0][:2] == [7, 14]
    report = (tmp_path / "run" / "report.html").read_text()
    assert "Accuracy on each task" in report
    assert restore(tmp_path / "run", seed=1).predict(np.zeros((2, 8, 8, 1))).shape == (2,)


@pytest.mark.slow
def test_replay_forgets_less_than_fine_tuning_and_cumulative_training_least(learn):
    final = {
        name: learn(name, name)[0].final["final_average_accuracy"].mean
        for name in ("finetune", "er", "cumulative")
    }
    assert final["finetune"] + 0.1 < final["er"] < final["cumulative"]


@pytest.mark.parametrize("learner", ["er", pytest.param("derpp", marks=pytest.mark.slow)])
def test_parts_of_any_length_give_the_same_numbers_bit_for_bit(learner, learn):
    whole, accuracy = learn(learner, "whole")
    parts, again = learn(learner, "parts", steps_per_call=5, checkpoint={"every": 5})
    np.testing.assert_array_equal(accuracy, again)
    assert_same(params_of(whole), params_of(parts))


@pytest.mark.parametrize("learner", ["er", pytest.param("ewc", marks=pytest.mark.slow)])
def test_a_run_that_was_cut_inside_an_experience_goes_on_as_if_it_had_not(
    learner, learn, tmp_path, monkeypatch
):
    keys = {"steps_per_call": 4, "checkpoint": {"every": 4}, "seeds": (0, 1)}
    whole, accuracy = learn(learner, "whole", **keys)
    calls = []

    def stops(request, dispatch):
        calls.append(dispatch)
        return len(calls) == 4

    with monkeypatch.context() as patched:
        patched.setattr("lamina.platform.training.signals.StopRequest.agreed", stops)
        result, _ = run_cut(learn, learner, keys, tmp_path)
    assert result.status == "interrupted"
    resumed, again = learn(learner, "cut", **keys)
    np.testing.assert_array_equal(accuracy, again)
    assert_same(params_of(whole), params_of(resumed))
    key = lambda r: (r.step, r.split, r.name, r.seed, r.value)
    assert [key(r) for r in whole.metrics] == [key(r) for r in resumed.metrics]


@pytest.mark.slow
def test_a_run_that_ends_before_its_first_checkpoint_leaves_no_record_twice(
    learn, tmp_path, monkeypatch
):
    keys = {"steps_per_call": 4, "checkpoint": {"every": 0}}
    whole, _ = learn("er", "whole", **keys)

    def fails(request, dispatch):
        raise UserError("a host went away")

    with monkeypatch.context() as patched:
        patched.setattr("lamina.platform.training.signals.StopRequest.agreed", fails)
        with pytest.raises(UserError, match="went away"):
            learn("er", "cut", **keys)
    left = (tmp_path / "cut" / "metrics.jsonl").read_text()
    assert '"step": 0' in left or '"step":0' in left
    resumed, _ = learn("er", "cut", **keys)
    key = lambda r: (r.step, r.split, r.name, r.seed, r.value)
    assert [key(r) for r in whole.metrics] == [key(r) for r in resumed.metrics]


# Of several tests, which thus share a compilation.
FINE = {"stream": {"name": "class_incremental", "experiences": 2}, "evaluation": {"every": 10}}


PAST = {"name": "er", "memory": 40, "replay": 8, "policy": "reservoir", "past_only": True}


@pytest.mark.parametrize(
    "learner", [pytest.param(n, marks=pytest.mark.slow) for n in (PAST, "ewc")] + ["icarl"]
)
def test_data_that_stay_on_the_host_give_the_same_numbers(learner, learn):
    held, accuracy = learn(learner, "held", **FINE)
    placed = {"data__placement": "grain", "steps_per_call": 7, "checkpoint": {"every": 7}}
    read, again = learn(learner, "read", **FINE, **placed)
    np.testing.assert_allclose(accuracy, again, atol=0.01)
    close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-5)
    jax.tree.map(close, params_of(held), params_of(read))
    value = lambda r: (r.step, r.split, r.name)
    assert sorted(map(value, held.metrics)) == sorted(map(value, read.metrics))
    losses = [[r.value for r in run.metrics if r.name == "loss"] for run in (held, read)]
    np.testing.assert_allclose(*losses, rtol=1e-4)


def test_a_memory_of_the_past_is_full_of_earlier_experiences_at_every_step(learn, monkeypatch):
    held, real = {}, results.record_evaluations

    def looked(recorder, cut, span, states, streams):
        memory = states[0].learner["memory"]
        there = np.asarray(memory["priority"]) < memories.EMPTY
        held[int(span[1])] = np.bincount(np.asarray(memory["task"])[there], minlength=3)
        real(recorder, cut, span, states, streams)

    monkeypatch.setattr("lamina.platform.incremental.results.record_evaluations", looked)
    learn(PAST, steps_per_call=20)
    assert [held[20].sum(), held[40].tolist(), held[60][2]] == [0, [40, 0, 0], 0]
    last = held[max(held)]
    assert [held[60].sum(), last.sum()] == [40, 40]
    assert (last > 4).all()  # a uniform sample of the stream


def run_cut(learn, learner, keys, tmp_path):
    (tmp_path / "cut").mkdir()
    np.save(tmp_path / "cut" / "accuracy.npy", np.zeros(1))  # so that `learn` finds one
    return learn(learner, "cut", **keys)


@pytest.mark.slow
def test_a_penalty_does_not_depend_on_the_length_of_other_seeds_experiences(learn):
    stream = {"name": "class_incremental", "experiences": 4, "classes": 9, "epochs": 1}
    keys = {"stream": stream | {"class_order": "shuffled"}, "data__batch_size": 2}
    together, _ = learn("ewc", "both", seeds=(0, 3), learner__strength=1e3, **keys)
    alone, _ = learn("ewc", "alone", seeds=(3,), learner__strength=1e3, **keys)
    second = jax.tree.map(lambda a: np.asarray(a)[1], together.state.params)
    assert_same(second, params_of(alone))


@pytest.mark.slow
@pytest.mark.parametrize(
    "stream",
    [
        {"name": "class_incremental", "experiences": 3, "class_order": "shuffled"},
        {"name": "si_blurry", "experiences": 3},
        pytest.param(
            {"name": "domain_incremental", "experiences": 3, "transform": "rotated"},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_seeds_together_equal_seeds_alone(learn, stream):
    together, accuracy = learn("er", "both", seeds=(0, 3), stream=stream)
    alone, single = learn("er", "alone", seeds=(3,), stream=stream)
    np.testing.assert_array_equal(accuracy[1:], single)
    second = jax.tree.map(lambda a: np.asarray(a)[1], together.state.params)
    assert_same(second, params_of(alone))


@pytest.mark.parametrize(
    "learner",
    ["er", *(pytest.param(name, marks=pytest.mark.slow) for name in ("derpp", "gem", "icarl"))],
)
def test_eight_devices_with_a_split_memory_equal_one(learner, learn):
    one, accuracy = learn(learner, "one")
    eight, again = learn(learner, "eight", devices=8)
    slots = eight.state.learner["memory"]["rows"]["inputs"]
    assert slots.sharding.shard_shape(slots.shape)[0] == slots.shape[0] // 8
    np.testing.assert_allclose(accuracy, again, atol=0.02)  # one example of a task
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5),
        params_of(one),
        params_of(eight),
    )


CHAIN = {
    "name": "chain",
    "links": ("er", "ewc", "ema_merge"),
    "options": {"er": {"memory": 64, "replay": 16, "policy": "reservoir"}},
}


def chained(**options):
    return CHAIN | {"options": CHAIN["options"] | options}


@pytest.mark.slow
def test_replay_a_penalty_and_merging_are_one_learner_from_a_config_alone(learn):
    off = chained(ewc={"strength": 0.0}, ema_merge={"decay": 0.0})
    nothing, accuracy = learn(off, "nothing")
    er, expected = learn("er", "er", learner__policy="reservoir")
    np.testing.assert_allclose(accuracy, expected, atol=0.02)  # one example of a task
    close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5)
    jax.tree.map(close, params_of(nothing), params_of(er))
    on = chained(ewc={"strength": 10.0}, ema_merge={"decay": 0.4})
    all_three, _ = learn(on, "all")
    own = all_three.state.learner["own"]
    assert_same(own["ema_merge"]["old"], params_of(all_three))  # the last thing was the merge
    assert own["ewc"]["importance"]["head"]["kernel"].any()
    assert not np.allclose(params_of(all_three)["head"]["bias"], params_of(er)["head"]["bias"])


@pytest.mark.slow
def test_frozen_features_are_classified_and_task_vectors_added(learn, tmp_path):
    base, before = learn("joint", "base", model__widths=(64,))
    keys = {"init_from": str(tmp_path / "base"), "model__widths": (64,)}
    found, accuracy = learn("slda", "slda", **keys)
    assert_same(params_of(base), params_of(found))
    assert accuracy[0, -1].mean() > before[0, -1].mean() - 0.05
    added, _ = learn("task_arithmetic", "added", **keys)
    own = added.state.learner["own"]
    third = lambda first, total: first + (total - first) / 3
    close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6)
    jax.tree.map(close, jax.tree.map(third, own["base"], own["sum"]), params_of(added))


VIT = {"name": "vit", "patch": 4, "depth": 1, "embed": 16, "heads": 2, "prompts": 6}
PROMPTED = {
    "model": VIT | {"prompts_chosen": 2, "prompt_length": 2},
    "init_from_rules": {"exclude": ("^head", "^prompts"), "freeze": ("^(?!prompts|head)",)},
}


@pytest.mark.slow
def test_prompts_are_trained_on_a_frozen_backbone_also_on_eight_devices(learn, tmp_path):
    base, _ = learn("finetune", "base", model=VIT | {"prompts": 0})
    keys = PROMPTED | {"init_from": str(tmp_path / "base")}
    one, accuracy = learn("l2p", "one", **keys)
    backbone = jax.tree.map(np.asarray, one.state.frozen)
    assert_same(backbone["layers"], params_of(base)["layers"])
    assert set(one.state.params) == {"prompts", "head"}
    eight, again = learn("l2p", "eight", devices=8, **keys)
    np.testing.assert_allclose(accuracy, again, atol=0.02)  # one example of a task
    close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5)
    jax.tree.map(close, params_of(one), params_of(eight))


def test_a_model_without_prompts_is_refused(learn, tmp_path):
    (tmp_path / "base").mkdir()
    with pytest.raises(UserError, match="'l2p' needs a model with a pool of prompts"):
        learn("l2p", init_from=str(tmp_path / "base"))


DOMAINS = {
    "stream": {"name": "domains", "experiences": 2},
    "data": {
        "name": "python_domains",
        "context": 16,
        "budget": 2000,
        "held_out": 400,
        "batch_size": 25,
    },
    "model": {"name": "transformer", "depth": 1, "embed": 16, "heads": 2},
    "task": {"name": "language_modeling"},
}


@pytest.mark.slow
def test_texts_of_several_domains_come_one_after_the_other(learn):
    replay = {"name": "er", "memory": 40, "replay": 8, "policy": "reservoir"}
    result, accuracy = learn(replay, **DOMAINS)
    assert accuracy.shape == (1, 2, 2)
    assert result.state.learner["memory"]["rows"]["labels"].shape == (40, 16)
    counts = accuracy * 25 * 16  # tokens are counted: 400 bytes of each domain
    np.testing.assert_allclose(counts, counts.round(), atol=1e-6)
    assert 0 <= accuracy.min() <= accuracy.max() < 0.6
    for learner in ("lwf", {"name": "er", "memory": 40, "replay": 8}):
        with pytest.raises(UserError, match="needs one class for each example"):
            learn(learner, "refused", **DOMAINS)


def test_exemplars_are_herded_and_their_means_answer(learn):
    result, accuracy = learn("icarl", **FINE)
    memory, own = result.state.learner["memory"], result.state.learner["own"]
    labels = np.asarray(memory["rows"]["labels"])[np.asarray(memory["priority"]) < 1]
    assert set(np.bincount(labels, minlength=10)) == {6, 7}
    assert len(labels) == 64
    np.testing.assert_allclose(np.linalg.norm(own["mean"], axis=-1), 1, rtol=1e-5)
    assert accuracy[0, -1].mean() > 0.6


@pytest.mark.slow
def test_a_vmapped_seed_axis_equals_single_seeds(learn):
    mesh = {"seed": 2, "data": 1}
    together, accuracy = learn("er", "both", devices=2, seeds=(0, 3), mesh=mesh)
    _, single = learn("er", "alone", seeds=(3,))
    np.testing.assert_allclose(accuracy[1:], single, atol=0.03)
    assert together.state.params["head"]["bias"].shape == (2, 10)


def test_a_numeric_hyper_parameter_is_no_part_of_the_program(digits_like_texts):
    weak, strong = digits_like_texts
    assert weak == strong


@pytest.fixture
def digits_like_texts(monkeypatch, stream_config):
    """The lowered programs of two runs that differ in a number."""
    texts = []
    real = incremental.compiled.compile_program

    def lowered(jitted, *arguments):
        texts.append(jitted.lower(*arguments).as_text())
        return real(jitted, *arguments)

    monkeypatch.setattr("lamina.platform.training.compiled.compile_program", lowered)
    for strength in (1.0, 1e3):
        config = stream_config("ewc", learner__strength=strength)
        resolved = incremental.resolve(config)
        prepared = incremental.prepare(resolved, ("*",), jax.devices()[:1], True)
        incremental.open_runner(prepared)
    return texts


@pytest.mark.parametrize(
    ("learner", "changes", "message"),
    [
        ("er", {"learner__memory": 8}, "learner.memory = 8 is smaller than the 16 rows"),
        ("er", {"learner__replay": 0, "learner__memory": 20}, "smaller than the 32 rows"),
        ("er", {"learner__memory": 10**12}, "a memory of 1000000000000 rows is too large"),
        ("gem", {"learner__per_task": 10**12}, "a memory of 3000000000000 rows is too large"),
        ("ewc", {"stream": {"name": "online"}}, "'ewc' needs to know where an experience begins"),
        ("er", {"stream__experiences": 11}, "stream.experiences = 11 should lie between 1 and 10"),
        ("er", {"steps": 100}, "steps = 100: an incremental run doesn't have it"),
        ("er", {"learner__memroy": 8}, "did you mean 'memory'"),
        ("erz", {}, "learner.name = 'erz' is unknown"),
        ("slda", {}, "'slda' needs a model that was trained before: set init_from"),
        ("task_arithmetic", {}, "needs a model that was trained before"),
        ("icarl", {"stream": {"name": "online"}}, "'icarl' needs to know where an experience"),
    ],
)
def test_what_is_wrong_is_named_before_there_is_a_folder(
    learner, changes, message, train, stream_config, tmp_path
):
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        train(stream_config(learner, **changes))
    assert not (tmp_path / "run").exists()


def test_result_json_has_the_matrix_of_the_report(learn, tmp_path):
    _, accuracy = learn("er", seeds=(0, 1))
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    np.testing.assert_allclose(result["accuracy"]["mean"], accuracy.mean(0))
    assert result["accuracy"]["ends"] == [0, 1, 2]


def test_a_finer_grid_of_evaluations_shows_what_falls_between(learn):
    result, accuracy = learn("icarl", **FINE)
    assert accuracy.shape[1] > 2
    coarse = metrics.minimum_accuracy(accuracy[0][[i for i in ends_of(result)]])
    assert result.final["minimum_accuracy"].mean <= coarse


def ends_of(result):
    return result.summary["accuracy"]["ends"]
