"""The shipped experiments: what their docstrings say can be run is a config without mistakes."""

import math
import re
from pathlib import Path

import jax
import pytest

from lamina.platform import config as configs
from lamina.platform.programs import table as programs
from lamina.platform.training import experiment

FOLDER = Path(__file__).parents[2] / "experiments"
WITH_STAND_IN = ("c4_transformer", "cifar10", "imagenet_vit")


def commands() -> list[str]:
    """Returns every shipped --config that a docstring of the folder runs."""
    found = set()
    for file in FOLDER.rglob("*.py"):
        found |= set(re.findall(r"--config=(?!runs/)(\S+)", file.read_text().split('"""')[1]))
    return sorted(found)


def load(reference: str):
    """Returns the resolved config of a shipped experiment."""
    config = configs.load(reference)[0]
    return programs.find(config).resolve(config)


@pytest.mark.parametrize("reference", commands())
def test_the_configs_of_all_commands_have_no_mistakes(reference):
    assert load(reference).program == configs.load(reference)[0].program


@pytest.mark.parametrize("reference", WITH_STAND_IN)
def test_a_cluster_experiment_is_built_without_its_data(reference, monkeypatch, tmp_path):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    config = load(reference)
    dataset, missing = experiment.open_stand_in(config.data, configs.EVERYONE)
    parts = experiment.assemble(config, dataset=dataset)
    assert "is not prepared in" in missing
    assert parts.batch["inputs"].shape[0] == config.data.batch_size


def test_the_billion_parameters_of_c4_are_split_over_all_devices(monkeypatch, tmp_path):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    config = load("c4_transformer")
    dataset, _ = experiment.open_stand_in(config.data, configs.EVERYONE)
    params = jax.tree.leaves(experiment.assemble(config, dataset=dataset).state.params)
    whole = sum(leaf.size for leaf in params)
    part = sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in params)
    assert 0.9e9 < whole < 1.1e9
    assert part < 1.001 * whole / jax.device_count()
