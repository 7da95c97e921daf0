"""What a workload and an optimizer change of a shoot-out's config."""

from lamina.platform.sweeps import pairs

CONFIG = {
    "steps": 10,
    "data": {"name": "digits", "batch_size": 32, "seed": 3},
    "optimizer": {"name": "adamw", "learning_rate": 0.1, "weight_decay": 0.5, "rules": {}},
    "evaluation": {"every": 5, "batch_size": 0},
}


def test_a_block_with_a_name_keeps_only_what_every_name_of_its_kind_has():
    changes = {"optimizer": {"name": "lion"}, "data": {"name": "quadratic", "dimensions": 4}}
    found = pairs.changed(CONFIG, changes)
    assert found["optimizer"] == {"name": "lion", "learning_rate": 0.1, "rules": {}}
    assert found["data"] == {"name": "quadratic", "dimensions": 4, "batch_size": 32, "seed": 3}
    assert found["steps"] == 10


def test_a_block_without_a_name_changes_keys():
    found = pairs.changed(CONFIG, {"optimizer": {"weight_decay": 0.0}, "evaluation": {"every": 1}})
    assert found["optimizer"] == {**CONFIG["optimizer"], "weight_decay": 0.0}
    assert found["evaluation"] == {"every": 1, "batch_size": 0}
    assert CONFIG["evaluation"]["every"] == 5
