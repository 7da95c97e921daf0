"""`lamina compile` and `lamina plan`: what they say of mistakes, and what the TPU compiler says."""

import json

import pytest

from lamina.platform import cli
from lamina.platform import config as configs
from lamina.platform.planning import compiling, search
from lamina.platform.training import experiment
from lamina.sharding import rules as rules_of
from lamina.sharding.pods import buffers, hlo, loops, products, topologies

needs_libtpu = pytest.mark.skipif(
    topologies.compiler_missing(), reason="libtpu isn't installed (extra tpu-aot)"
)
TINY = "c4_transformer:tiny"


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--config=quickstart"], "--topology is missing"),
        (["--config=quickstart", "--topology=v5e"], "as in v5e:16x16"),
        (["--config=quickstart", "--topology=v9:4x4"], "no chip 'v9' is known"),
        (["--config=quickstart", "--topology=v5e:4x4", "--slices=0"], "at least 1"),
        (["--config=quickstart", "--topology=v5e:4x4", "--config.mesh.dat=2"], "dat"),
        (["--config=nothing", "--topology=v5e:4x4"], "nothing"),
    ],
)
def test_a_mistake_ends_with_2_and_a_message(arguments, part, capsys):
    assert cli.main(["compile", *arguments]) == 2
    said = capsys.readouterr().err
    assert part in said
    assert "Traceback" not in said


def test_a_missing_compiler_is_named_with_its_extra(monkeypatch, capsys):
    monkeypatch.setattr(topologies, "compiler_missing", lambda: True)
    assert cli.main(["compile", f"--config={TINY}", "--topology=v5e:2x2"]) == 2
    assert "tpu-aot" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("message", "sizes"),
    [
        (
            "RESOURCE_EXHAUSTED: CompileTimeHbmOom: required (16.00G) exceeds available HBM "
            "(15.75G)",
            (16 * 2**30, 15.75 * 2**30),
        ),
        (
            "Ran out of memory on HBM, the total memory required for HLO temporaries (133.57G) "
            "exceeds available HBM (15.75G).",
            (133.57 * 2**30, 15.75 * 2**30),
        ),
        ("Ran out of memory. Used 20.50G of 15.75G hbm.", (20.5 * 2**30, 15.75 * 2**30)),
        ("INTERNAL: something else", None),
    ],
)
def test_need_and_limit_are_read_from_the_compilers_refusal(message, sizes):
    assert compiling.demand(message) == sizes


@pytest.mark.parametrize(("devices", "slices"), [(1, 1), (8, 1), (12, 1), (256, 1), (32, 2)])
def test_layouts_use_all_devices_and_differ(devices, slices):
    found = search.layouts(devices, slices)
    assert found
    assert len(found) == len(set(found))
    for sizes, rules in found:
        assert sizes[0] * sizes[1] * sizes[2] == devices
        assert rules in rules_of.PRESETS
    assert ((devices, 1, 1), "data") in found


def test_a_layout_keeps_the_batch_and_cuts_it_as_far_as_it_goes():
    config, _ = configs.load("c4_transformer")  # 1024 rows in 2 parts
    for candidate in search.first_round(experiment.resolve(config), 512):
        assert 1024 % (candidate.sizes[0] * candidate.sizes[1] * candidate.accumulation) == 0
        assert 1 <= candidate.accumulation <= 2
    assert search.first_round(experiment.resolve(config), 4096) != []


def test_the_second_round_changes_remat_and_accumulation_of_the_best():
    config, _ = configs.load("c4_transformer")
    base = search.Candidate((1, 16, 1), "fsdp", "full", 2)
    found = search.second_round(experiment.resolve(config), [search.Tried(base, None, "")])
    assert {c.remat for c in found} == {"full", "dots", "none"}
    assert {c.accumulation for c in found} == {1, 2, 4}
    assert all(c.sizes == base.sizes for c in found)
    assert base.flags.startswith("--config.mesh.data=1 --config.mesh.fsdp=16 ")


def test_plan_refuses_what_it_cannot_do(capsys):
    for flags, part in (
        (["--topology=v5e:4x4", "--seconds=0"], "--seconds"),
        (["--topology=nowhere"], "as in v5e:16x16"),
    ):
        assert cli.main(["plan", "--config=quickstart", *flags]) == 2
        said = capsys.readouterr().err
        assert part in said or "tpu-aot" in said


@needs_libtpu
@pytest.mark.slow
def test_a_plan_ranks_layouts_and_names_the_best(tmp_path, capsys):
    out = tmp_path / "plan.json"
    flags = [f"--config={TINY}", "--topology=v5e:2x2", "--layouts=2", f"--out={out}"]
    assert cli.main(["plan", *flags]) == 0
    said = capsys.readouterr().out
    assert "The best:" in said
    assert "--config.sharding.rules=" in said
    times = [
        each["report"]["seconds"]["estimate"]
        for each in json.loads(out.read_text())
        if each["report"] and each["report"]["fits"]
    ]
    assert times == sorted(times)
    assert times


@needs_libtpu
@pytest.mark.slow
def test_a_step_is_compiled_for_a_pod_and_the_figures_are_the_compilers():
    config, _ = configs.load(TINY)
    resolved = experiment.resolve(config)
    wanted = compiling.topology("v5e:2x2", 1)
    outcome = compiling.compile_step(resolved, configs.EVERYONE, wanted, full=True)
    module = hlo.parse(outcome.program)
    read = buffers.memory(outcome.assignment, module)
    assert outcome.memory is not None
    assert read.total == pytest.approx(outcome.memory.total - outcome.memory.code, rel=0.01)
    assert read.activations <= read.temporary
    schedule = loops.schedule(module)
    assert not schedule.unknown
    work = [
        (v.times, products.products(module, v.computation, v.instruction)) for v in schedule.visits
    ]
    flops = sum(times * (found.flops + found.kernel) for times, found in work)
    assert flops * 4 >= outcome.facts.model_flops > 0
    for leaf in outcome.facts.leaves:
        large = len(leaf.shape) >= 2 and "norm" not in leaf.path
        if large and leaf.part in ("parameters", "moments"):
            assert leaf.bytes * 4 == leaf.itemsize * _count(leaf.shape), leaf.path


def _count(shape):
    total = 1
    for extent in shape:
        total *= extent
    return total


@needs_libtpu
@pytest.mark.slow
def test_compile_writes_its_report(tmp_path, capsys):
    out = tmp_path / "report.json"
    flags = [f"--config={TINY}", "--topology=v5e:2x2", f"--out={out}"]
    assert cli.main(["compile", *flags]) == 0
    report = json.loads(out.read_text())
    assert report["fits"]
    assert report["devices"] == 4
    assert report["mfu"]["lower"] <= report["mfu"]["estimate"] <= report["mfu"]["upper"]
    assert {row["kind"] for row in report["collectives"]} >= {"all-gather"}
    assert not report["cross_slice"]
    assert "fits" in capsys.readouterr().out


@needs_libtpu
@pytest.mark.slow
def test_a_mesh_that_does_not_fit_the_topology_is_a_mistake(capsys):
    flags = [f"--config={TINY}", "--topology=v5e:2x2", "--config.mesh.fsdp=3"]
    assert cli.main(["compile", *flags]) == 2
    assert "devices" in capsys.readouterr().err
