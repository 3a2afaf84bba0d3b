"""One place where MLflow is imported, quietly, and where its addresses are made absolute."""

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlflow import MlflowClient

_SQLITE = "sqlite:///"


def absolute_uri(uri: str) -> str:
    """A tracking address that means the same in every process: a relative SQLite path becomes absolute.

    Ray workers run in folders of their own, so a driver resolves the address before it hands it out.
    """
    if uri.startswith(_SQLITE) and ":memory:" not in uri:
        return _SQLITE + str(Path(uri.removeprefix(_SQLITE)).absolute())
    if "://" not in uri:
        raise ValueError(f"registry.tracking_uri {uri!r} is not an address: use sqlite:///runs/mlflow.db or http://host:port")
    return uri


def artifact_root(uri: str) -> str | None:
    """Where the artifacts of a SQLite store go: `mlartifacts` beside the database. None: the server decides."""
    if not uri.startswith(_SQLITE):
        return None
    return str(Path(absolute_uri(uri).removeprefix(_SQLITE)).parent / "mlartifacts")


def mlflow_client(uri: str) -> "MlflowClient":
    """A client of the tracking server and registry at `uri`. Makes the SQLite file's folder when it is missing."""
    # A dead server must be noticed in seconds: the callers have a spool or a user to tell.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    from mlflow import MlflowClient

    for name in ("alembic", "mlflow"):
        logging.getLogger(name).setLevel(logging.WARNING)
    uri = absolute_uri(uri)
    if uri.startswith(_SQLITE):
        Path(uri.removeprefix(_SQLITE)).parent.mkdir(parents=True, exist_ok=True)
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def experiment_id(client: "MlflowClient", name: str) -> str:
    """The id of the experiment `name`, made when it does not exist (two processes may race for it)."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            root = artifact_root(client.tracking_uri)
            # By it a page without the Model training switch shows runs as such, and not as evaluations of a language model.
            kind = {"mlflow.experimentKind": "custom_model_development"}
            return client.create_experiment(name, artifact_location=f"{root}/{name}" if root else None, tags=kind)
        except MlflowException:
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    if found.lifecycle_stage == "deleted":
        raise ValueError(f"MLflow experiment {name!r} is deleted: restore it, or set registry.experiment to another name")
    return found.experiment_id
