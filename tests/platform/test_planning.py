"""`lamina compile` and `lamina plan`: what they say of mistakes, and what the TPU compiler says."""

import json

import pytest

from lamina.platform import cli
from lamina.platform import config as configs
from lamina.platform.planning import compiling
from lamina.platform.training import experiment
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
    flops = sum(
        v.times * products.products(module, v.computation, v.instruction).flops
        for v in schedule.visits
    )
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
