"""From a name to a folder: which model version `models:/name@alias` means now, and where its bundle lies."""

import re
from dataclasses import dataclass, field
from pathlib import Path

from fluid_core.config import RegistryConfig
from fluid_core.registry.mlflow_client import mlflow_client

CHAMPION, PREVIOUS, CANDIDATE = "champion", "previous", "candidate"
LEAVING = "leaving"  # the champion that a rollback is replacing
_MODEL_URI = re.compile(r"models:/(?P<name>[^/@]+)(?:@(?P<alias>[^/@]+)|/(?P<version>\d+))$")


@dataclass(frozen=True)
class ModelRef:
    """A model version. `version` and `alias` are None for a plain folder."""

    name: str
    version: str | None
    alias: str | None
    path: str
    tags: dict[str, str] = field(default_factory=dict, compare=False)

    @property
    def label(self) -> str:
        """`name:version`, as responses and image metadata name it."""
        return self.name if self.version is None else f"{self.name}:{self.version}"

    def local(self) -> Path:
        """A folder on this machine with the bundle; one on S3 is fetched into the cache first."""
        from fluid_core.registry.bundle_store import local_bundle

        return local_bundle(self.path)


def resolve_model(spec: str | None, registry: RegistryConfig) -> ModelRef:
    """Find a model.

    Args:
        spec: a bundle folder, `models:/name@alias`, `models:/name/version`, or None for the recipe's champion.

    Raises:
        ValueError: nothing of that name, with the command that makes it.
    """
    spec = spec or f"models:/{registry.model_name}@{CHAMPION}"
    if not spec.startswith("models:/"):
        if not (Path(spec) / "config.json").is_file():
            raise ValueError(f"{spec} is not a model bundle (no config.json): give a bundle folder or models:/name@alias")
        return ModelRef(Path(spec).name, None, None, str(Path(spec).absolute()))
    match = _MODEL_URI.match(spec)
    if match is None:
        raise ValueError(f"{spec!r}: write models:/name@alias or models:/name/version")

    from mlflow.exceptions import MlflowException

    client = mlflow_client(registry.tracking_uri)
    name, alias, version = match["name"], match["alias"], match["version"]
    try:
        found = client.get_model_version_by_alias(name, alias) if alias else client.get_model_version(name, version)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise ConnectionError(f"the model registry at {registry.tracking_uri} does not answer: {error}") from None
        raise ValueError(
            f"{spec} is not in the registry at {registry.tracking_uri}: run pipelines/promote.py, "
            "or set serving.model to a bundle folder"
        ) from None
    return ModelRef(name, str(found.version), alias, str(found.source).removeprefix("file://"), dict(found.tags))
