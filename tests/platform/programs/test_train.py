"""A training run gives the same numbers however it is cut, split, fed or interrupted."""

import dataclasses

import jax
import numpy as np
import psutil
import pytest

from lamina.platform.checkpoints import names, restoring
from lamina.platform.training import trained


def losses(result, split="train", name="loss"):
    """Returns [record, seed]."""
    steps = sorted({r.step for r in result.metrics if r.split == split})
    found = {
        (r.step, r.seed): r.value for r in result.metrics if (r.split, r.name) == (split, name)
    }
    return np.array([[found[step, seed] for seed in result.seeds] for step in steps])


def records(result):
    return [r._replace(time=0.0) for r in result.metrics]


def arrays(result, *prefixes):
    found = restoring.restore_subtree(f"{result.workdir}/checkpoints", prefixes or ("params",))
    return names.flatten(found.state)


def assert_same_arrays(left, right):
    assert left.keys() == right.keys()
    for name, array in left.items():
        np.testing.assert_array_equal(array, right[name], err_msg=name)


def test_a_run_learns_and_reports(train, digits):
    result = train(digits(steps=150, evaluation__every=50, optimizer__learning_rate=5e-3))
    assert result.status == "done"
    assert result.final["test/accuracy"].mean > 0.9
    assert result.summary["steps"] == 150
    assert {r.step for r in result.metrics if r.split == "validation"} == {50, 100, 150}
    assert {r.step for r in result.metrics if r.split == "test"} == {150}


def test_device_and_grain_placement_give_identical_losses(train, digits):
    device = train(digits(data__placement="device"), "device")
    grain = train(digits(data__placement="grain"), "grain")
    assert records(device) == records(grain)


def test_three_seeds_equal_three_single_runs_bit_for_bit(train, digits):
    together = train(digits(seeds=(3, 1, 7), model__dropout=0.1), "together")
    params = arrays(together, "params", "optimizer_state")
    for i, seed in enumerate(together.seeds):
        alone = train(digits(seeds=(seed,), model__dropout=0.1), f"alone_{seed}")
        np.testing.assert_array_equal(losses(together)[:, i], losses(alone)[:, 0])
        assert_same_arrays(
            {name: array[i] for name, array in params.items()},
            arrays(alone, "params", "optimizer_state"),
        )


@pytest.mark.slow
def test_seeds_with_their_own_order_differ_from_a_shared_one(train, digits):
    shared = train(digits(seeds=(0, 1)), "shared")
    own = train(digits(seeds=(0, 1), data__order="per_seed"), "own")
    assert own.status == "done"
    assert not np.allclose(losses(shared), losses(own), rtol=1e-4)


def test_accumulating_four_parts_equals_the_whole_batch(train, digits):
    whole = train(digits(log_every=1, steps_per_call=1), "whole")
    parts = train(digits(log_every=1, steps_per_call=1, accumulation=4), "parts")
    np.testing.assert_allclose(losses(parts), losses(whole), rtol=1e-5)


@pytest.mark.parametrize("rules", [pytest.param("data", marks=pytest.mark.slow), "fsdp"])
def test_eight_devices_give_the_losses_of_one(train, digits, rules):
    mesh = {"data": -1} if rules == "data" else {"data": 2, "fsdp": 4}
    changes = {"log_every": 1, "steps_per_call": 1, "mesh": mesh, "sharding__rules": rules}
    one = train(digits(log_every=1, steps_per_call=1), "one")
    eight = train(digits(**changes), "eight", devices=8)
    np.testing.assert_allclose(losses(eight), losses(one), rtol=1e-5)
    np.testing.assert_allclose(
        eight.final["test/accuracy"].mean, one.final["test/accuracy"].mean, atol=1e-6
    )


@pytest.mark.slow
def test_packed_documents_balanced_over_devices_give_the_losses_of_one(train, digits, tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number, length in enumerate(np.clip(rng.lognormal(3, 1, 200), 1, 60).astype(int)):
        (folder / f"{number:03d}.txt").write_text("ab cd, "[: 1 + number % 7] * length)
    text = {"name": "text", "path": str(folder), "context": 64, "packed": True, "batch_size": 16}
    model = {"name": "transformer", "depth": 1, "embed": 16, "heads": 2, "mlp": 32}
    config = digits(steps=10, data=text, model=model, task={"name": "language_modeling"})
    one = train(config, "one")
    config.data.balance_length = 12.0 * 16
    eight = train(config, "eight", devices=8)
    np.testing.assert_allclose(losses(eight), losses(one), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "schedule_free_adamw"])
def test_seeds_split_over_devices_give_the_losses_of_unrolled_ones(train, digits, optimizer):
    own = {"seeds": (0, 1), "optimizer": {"name": optimizer, "learning_rate": 1e-3}}
    unrolled = train(digits(**own), "unrolled")
    mapped = train(digits(**own, mesh={"seed": 2}), "mapped", devices=2)
    np.testing.assert_allclose(losses(mapped), losses(unrolled), rtol=1e-4)
    np.testing.assert_allclose(
        mapped.final["test/loss"].values, unrolled.final["test/loss"].values, rtol=1e-4
    )


def test_chunks_of_any_length_give_the_same_losses(train, digits):
    single = train(digits(log_every=10, steps_per_call=1), "single")
    chunked = train(digits(log_every=10, steps_per_call=10), "chunked")
    np.testing.assert_allclose(losses(chunked), losses(single), rtol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        pytest.param({"seeds": (0, 1)}, marks=pytest.mark.slow),
        {"ema__decay": 0.9},
        pytest.param({"accumulation": 4}, marks=pytest.mark.slow),
        pytest.param({"data__placement": "grain"}, marks=pytest.mark.slow),
        pytest.param({"checkpoint__every": 15, "log_every": 10}, marks=pytest.mark.slow),
        pytest.param({"optimizer__name": "schedule_free_adamw"}, marks=pytest.mark.slow),
    ],
    ids=["plain", "seeds", "ema", "accumulation", "grain", "between_records", "schedule_free"],
)
def test_a_run_stopped_in_the_middle_ends_bit_identical(train, digits, changes, monkeypatch):
    base = {"steps": 30, "checkpoint__every": 10, "evaluation__every": 10}
    undisturbed = train(digits(**base | changes), "undisturbed")

    from lamina.platform.training.signals import StopRequest

    monkeypatch.setattr(StopRequest, "agreed", lambda self, dispatch: dispatch == 4)
    stopped = train(digits(**base | changes), "stopped")
    assert stopped.status == "interrupted"
    monkeypatch.undo()
    resumed = train(digits(**base | changes), "stopped")
    assert resumed.status == "done"
    assert records(resumed) == records(undisturbed)
    parts = ("params", "optimizer_state", "ema?", "metrics", "step")
    assert_same_arrays(arrays(resumed, *parts), arrays(undisturbed, *parts))


def test_a_finished_run_gives_its_result_again_without_training(train, digits):
    first = train(digits())
    again = train(digits())
    assert again.status == "done"
    assert again.state is None
    assert records(again) == records(first)


@pytest.mark.slow
def test_a_longer_run_goes_on_where_its_schedule_allows_it(train, digits):
    constant = {"name": "constant", "warmup_steps": 5}
    train(digits(schedule=constant), "grown")
    grown = train(digits(schedule=constant, steps=40), "grown")
    whole = train(digits(schedule=constant, steps=40), "whole")
    assert_same_arrays(arrays(grown), arrays(whole))


def test_weights_of_the_moving_average_are_evaluated(train, digits):
    plain = train(digits(), "plain")
    averaged = train(digits(ema__decay=0.9), "averaged")
    np.testing.assert_array_equal(losses(averaged), losses(plain))
    assert averaged.final["test/loss"].mean != plain.final["test/loss"].mean


def test_half_precision_accumulates(train, digits):
    result = train(
        digits(precision="float16", accumulation=4, steps=40, optimizer__learning_rate=5e-3)
    )
    assert result.final["train/loss"].mean < 2.1
    assert result.final["train/loss_scale"].mean >= 2.0**14


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_low_precision_trains_with_float32_parameters(train, digits, precision):
    result = train(digits(precision=precision, steps=60, optimizer__learning_rate=5e-3), precision)
    assert {array.dtype for array in arrays(result).values()} == {np.dtype("float32")}
    assert result.final["train/loss"].mean < 2.0


@pytest.mark.slow
def test_frozen_parameters_do_not_move(train, digits):
    before = train(digits(steps=5, optimizer__learning_rate=0.0), "before")
    after = train(
        digits(
            init_from=f"{before.workdir}",
            init_from_rules={"freeze": ("layers/0/",)},
            optimizer__weight_decay=0.1,
        ),
        "after",
    )
    old, new = arrays(before), arrays(after, "params", "frozen")
    frozen = {k.removeprefix("frozen/"): v for k, v in new.items() if k.startswith("frozen/")}
    assert set(frozen) == {"layers/0/kernel", "layers/0/bias"}
    for name, array in frozen.items():
        np.testing.assert_array_equal(array, old[f"params/{name}"])
    assert not np.array_equal(new["params/head/kernel"], old["params/head/kernel"])


@pytest.mark.slow
def test_adapters_alone_are_trained(train, digits):
    base = train(digits(steps=50), "base")
    tuned = train(
        digits(
            init_from=str(base.workdir),
            adapters={"rank": 2, "paths": ("kernel",)},
            optimizer__learning_rate=1e-2,
        ),
        "tuned",
    )
    found = arrays(tuned, "frozen")
    old = arrays(base)
    for name, array in found.items():
        np.testing.assert_array_equal(array, old[name.replace("frozen/", "params/")])
    assert tuned.final["train/loss"].mean < base.final["train/loss"].mean


def test_init_from_takes_a_part_under_other_names(train, digits):
    base = train(digits(steps=40), "base")
    new = train(
        digits(
            steps=5,
            optimizer__learning_rate=0.0,
            init_from=str(base.workdir),
            init_from_rules={"exclude": ("head",)},
        ),
        "new",
    )
    old, taken = arrays(base), arrays(new)
    np.testing.assert_array_equal(taken["params/layers/0/kernel"], old["params/layers/0/kernel"])
    assert not np.array_equal(taken["params/head/kernel"], old["params/head/kernel"])


@pytest.mark.slow
def test_init_from_reads_its_source_split_over_all_devices(train, digits, monkeypatch):
    source = train(digits(steps=5, seeds=(3, 4), ema__decay=0.9), "source")
    seen = []

    def read(*args, **kwargs):
        found = trained_of(*args, **kwargs)
        seen.append(jax.tree.leaves(found.params))
        return found

    trained_of = trained.read
    monkeypatch.setattr(trained, "read", read)
    config = digits(steps=5, init_from=str(source.workdir), mesh__data=2, mesh__fsdp=4)
    config.optimizer = {"name": "sgd", "learning_rate": 0.0}
    config.sharding = {"rules": "fsdp"}
    result = train(config, "next", devices=8)
    split = [leaf for leaf in seen[0] if any(n % 8 == 0 for n in leaf.shape)]
    assert len(split) >= 5
    for leaf in split:
        assert leaf.addressable_shards[0].data.size * 8 == leaf.size
    averages = {name: array[0] for name, array in arrays(source, "ema").items()}
    assert_same_arrays(
        {name.removeprefix("ema/"): array for name, array in averages.items()},
        {name.removeprefix("params/"): array for name, array in arrays(result).items()},
    )


def test_training_stops_early_when_the_metric_stalls(train, digits):
    result = train(
        digits(
            steps=100,
            optimizer__learning_rate=0.0,
            evaluation__every=10,
            early_stopping={"metric": "validation/loss", "patience": 2},
        )
    )
    assert result.summary["steps"] == 30
    assert result.summary["stopped_early"] is True
    assert result.final["test/loss"].mean is not None


def test_the_best_checkpoint_is_kept(train, digits):
    result = train(
        digits(
            steps=60,
            checkpoint={"every": 10, "keep": 1, "best": "validation/loss", "mode": "max"},
            evaluation__every=10,
        )
    )
    assert result.summary["best_step"] == 10
    assert restoring.list_steps(f"{result.workdir}/checkpoints") == (10, 60)


def test_further_evaluators_have_their_own_data_and_cadence(train, digits):
    own = {"data": {"name": "digits"}, "split": "train", "every": 10, "batch_size": 100}
    result = train(digits(evaluators={"memorised": own}))
    assert {r.step for r in result.metrics if r.split == "memorised"} == {10, 20}


def test_a_diverged_run_names_the_step_and_what_was_not_finite(train, digits):
    wild = {"name": "sgd", "learning_rate": 1e30}
    result = train(digits(optimizer=wild, schedule={"name": "constant"}))
    assert result.status == "diverged"
    assert "seed 0" in result.message
    assert "step 1" in result.message or "step 2" in result.message
    assert "not finite" in result.message


def test_one_diverging_seed_does_not_stop_the_others(train, digits, monkeypatch):
    from lamina.platform.training import step

    real = step.init

    def init(recipe, batch, seed, *loaded):
        state = real(recipe, batch, seed, *loaded)
        scale = jax.numpy.where(state.seed == 1, jax.numpy.inf, 1.0)
        params = jax.tree.map(lambda a: a * scale, state.params)
        return dataclasses.replace(state, params=params)

    monkeypatch.setattr(step, "init", init)
    result = train(digits(seeds=(0, 1, 2)))
    assert result.status == "done"
    assert result.summary["diverged"] == {"1": 0}
    values = result.final["test/loss"].values
    assert values[0] is not None
    assert values[1] is None
    assert values[2] is not None


def test_overfitting_one_batch_drives_its_loss_down(train, digits):
    result = train(
        digits(steps=100, debug={"overfit_one_batch": True}, optimizer__learning_rate=1e-2)
    )
    assert result.final["train/loss"].mean < 0.01


def test_checking_for_nans_names_the_operation(train, digits, monkeypatch):
    from lamina.platform.training import tasks

    wrong = tasks.TASKS["classification"]

    def taking_a_root(spec, *, label_smoothing: float = 0.0):
        task = wrong(spec, label_smoothing=label_smoothing)
        return task._replace(
            loss=lambda output, batch: (
                jax.numpy.sqrt(-jax.numpy.abs(output.logits).sum(-1) - 1.0),
                jax.numpy.ones(output.logits.shape[0]),
            )
        )

    monkeypatch.setitem(tasks.TASKS, "classification", taking_a_root)
    result = train(digits(debug={"check_nans": True}, steps_per_call=1))
    assert result.status == "diverged"
    assert "sqrt" in result.message


def test_norms_are_recorded_for_each_group_of_parameters(train, digits):
    result = train(digits())
    names_ = {r.name for r in result.metrics if r.split == "train"}
    assert {"gradient_norm", "update_norm", "gradient_norm/head", "learning_rate"} <= names_


def test_one_chunk_program_serves_the_whole_run(train, digits, monkeypatch):
    from lamina.platform.training import compiled

    compilations = []
    real = compiled.compile_program

    def counting(jitted, *arguments):
        compilations.append(jitted)
        return real(jitted, *arguments)

    monkeypatch.setattr(compiled, "compile_program", counting)
    train(digits(steps=23))  # with a partial last chunk
    assert len(compilations) == 3  # the chunk, validation, test


@pytest.mark.slow
def test_memory_does_not_grow_over_2000_steps(train, digits, monkeypatch):
    from lamina.platform.training.recorder import Recorder

    process, sizes, alive = psutil.Process(), [], []
    real = Recorder.record

    def watched(self, chunk, summary):
        real(self, chunk, summary)
        sizes.append(process.memory_info().rss)
        alive.append(len(jax.live_arrays()))

    monkeypatch.setattr(Recorder, "record", watched)
    train(digits(steps=2000, checkpoint__every=200, evaluation__every=200))
    half = len(sizes) // 2
    assert max(sizes[half:]) - max(sizes[:half]) < 16 * 2**20
    assert max(alive[half:]) <= max(alive[:half])
