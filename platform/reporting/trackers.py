"""Writers for experiment trackers, each an optional extra: Weights & Biases and MLflow.

The tracker's own id of a run is kept in `trackers.json` in the run folder, so that a resumed run
goes on in the same place there.
"""

import importlib
import os
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from lamina.platform.errors import UserError
from lamina.platform.reporting import folder, storage
from lamina.platform.reporting.protocol import RunInfo, Writer, tag
from lamina.platform.reporting.records import Record


def wandb(run: RunInfo, *, project: str = "lamina", entity: str = "", mode: str = "") -> Writer:
    """Logs to Weights & Biases; needs `pip install 'lamina[wandb]'`.

    A resumed run sends some steps again; W&B keeps the first, which is the same number.

    Args:
        run: what to log for.
        project: the W&B project; our name by default.
        entity: the W&B user or team; "" is the user's default.
        mode: "online", "offline" (files in the run folder, for `wandb sync`), "disabled"; "" is
            what the environment (WANDB_MODE) says.

    Raises:
        UserError: wandb is not installed.
    """
    package = _package("wandb", "wandb")
    session = package.init(
        project=project,
        entity=entity or None,
        mode=mode or None,
        name=_name(run),
        id=_tracker_id(run, "wandb", secrets.token_hex(4)),
        resume="allow",
        # W&B can write to local folders only
        dir=None if storage.is_remote(run.workdir) else os.fspath(run.workdir),
        config=storage.plain(run.config),
    )

    def write(records: Sequence[Record]) -> None:
        for step, values in _by_step(records, run.seeds).items():
            session.log(values, step=step)

    return Writer(write, lambda: None, session.finish)


def mlflow(run: RunInfo, *, experiment: str = "lamina", tracking_uri: str = "") -> Writer:
    """Logs to MLflow; needs `pip install 'lamina[mlflow]'`.

    MLflow keeps every value that it is sent, so a resumed run leaves out the steps that MLflow has.

    Args:
        run: what to log for.
        experiment: the MLflow experiment; our name by default.
        tracking_uri: a server or a database; "" is what the environment (MLFLOW_TRACKING_URI) says.

    Raises:
        UserError: mlflow is not installed.
    """
    package = _package("mlflow", "mlflow")
    client = package.MlflowClient(tracking_uri=tracking_uri or None)
    run_id = _tracker_id(run, "mlflow")
    if run_id:
        client.update_run(run_id, status="RUNNING")
    else:
        found = client.get_experiment_by_name(experiment)
        experiment_id = found.experiment_id if found else client.create_experiment(experiment)
        run_id = client.create_run(experiment_id, run_name=_name(run)).info.run_id
        for name, value in storage.flatten(storage.plain(run.config)).items():
            client.log_param(run_id, name, str(value)[:500])  # 500: the older servers' limit
        _tracker_id(run, "mlflow", run_id)
    reached: dict[str, int] = {}

    def last_step(name: str) -> int:
        """The last step that MLflow has of a metric; asked once, and only by a resumed run."""
        if name not in reached:
            history = client.get_metric_history(run_id, name) if run.start_step else []
            reached[name] = max((metric.step for metric in history), default=-1)
        return reached[name]

    def write(records: Sequence[Record]) -> None:
        for step, values in _by_step(records, run.seeds).items():
            for name, value in values.items():
                if step > last_step(name):
                    client.log_metric(run_id, name, value, step=step)

    def close() -> None:
        client.set_terminated(run_id)

    return Writer(write, lambda: None, close)


def _package(name: str, extra: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"The writer '{name}' needs the package {name}: pip install 'lamina[{extra}]'"
        ) from error


def _name(run: RunInfo) -> str:
    return run.name or storage.as_path(run.workdir).name or "run"


def _tracker_id(run: RunInfo, tracker: str, new: str = "") -> str:
    """The tracker's id of this run; `new` is kept where there is none yet."""
    path = storage.as_path(run.workdir) / folder.TRACKERS
    known = storage.read_object(path)
    if new and not known.get(tracker):
        known[tracker] = new
        storage.write_json(path, known)
    return str(known.get(tracker, ""))


def _by_step(records: Sequence[Record], seeds: Sequence[int]) -> Mapping[int, dict[str, float]]:
    """Finite values by step and name."""
    steps: dict[int, dict[str, float]] = {}
    for record in records:
        if record.value is not None:
            steps.setdefault(record.step, {})[tag(record, seeds)] = record.value
    return steps
