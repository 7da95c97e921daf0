"""Every shipped experiment is documented, resolves, passes `lamina check` and trains."""

import ast

import pytest

from lamina.platform import cli
from lamina.platform import config as configs
from lamina.platform.programs import table as programs
from lamina.platform.reporting import folder

SHIPPED = configs.shipped_experiments()
VARIANTS = {
    "fashion_mnist": ("convnet", "resnet", "vit"),
    "imagenet_vit": ("", "tiny"),
    "c4_transformer": ("", "tiny", "8b"),
    "cifar10": ("", "synthetic"),
    "optimizers/shootout": ("quick", "targets", "stream"),
}
REFERENCES = [
    f"{name}:{variant}" if variant else name
    for name in SHIPPED
    for variant in VARIANTS.get(name, ("",))
]
AFTER_ANOTHER = ("incremental/prompts",)
"""They start from the run of another experiment."""
FOR_CLUSTERS = ("cifar10:synthetic", "imagenet_vit:tiny", "c4_transformer:tiny")


@pytest.mark.parametrize("reference", REFERENCES)
def test_a_shipped_config_resolves_and_goes_through_json(reference):
    config, _ = configs.load(reference)
    resolve = programs.find(config).resolve
    resolved = resolve(config)
    again = resolve(configs.from_json(configs.to_json(resolved)))
    assert configs.to_json(again) == configs.to_json(resolved)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_config_says_what_it_claims_and_how_to_run_it(name):
    text = ast.get_docstring(ast.parse(SHIPPED[name].read_text()))
    assert f"lamina run --config={name}" in text


@pytest.mark.parametrize("name", SHIPPED)
def test_a_wrong_argument_of_a_config_is_the_users_mistake(name, capsys):
    assert cli.main(["check", f"--config={name}:no_such_variant"]) == 2
    assert "no_such_variant" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("reference", [r for r in REFERENCES if r not in AFTER_ANOTHER])
def test_a_shipped_config_passes_check(reference, capsys):
    assert cli.main(["check", f"--config={reference}"]) == 0
    printed = capsys.readouterr().out
    for part in ("FLOPs per step", "optimizer state, bytes per device", "activations"):
        assert part in printed


@pytest.mark.slow
@pytest.mark.parametrize("reference", FOR_CLUSTERS)
def test_a_config_for_clusters_trains_two_steps_on_data_shaped_like_its_own(reference, tmp_path):
    arguments = [
        f"--config={reference}",
        f"--workdir={tmp_path / 'run'}",
        "--config.trackers=()",
    ]
    assert cli.main(["run", *arguments]) == 0
    assert folder.read_result(tmp_path / "run")["steps"] == 2
