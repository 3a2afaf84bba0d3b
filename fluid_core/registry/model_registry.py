"""Versions and aliases of one registered model: candidate, champion, previous; and who may change them.

Two promotions at once: a version's number is given by the registry, one after the other, together with its tag "running".
Of several running promotions the one with the lowest number goes on; the others see it, and say so. A promotion whose process
is gone does not count.
"""

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager

from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from fluid_core.config import RegistryConfig
from fluid_core.registry.mlflow_client import mlflow_client
from fluid_core.registry.models import CANDIDATE, CHAMPION, LEAVING, PREVIOUS

STATE, OWNER, STARTED = "promotion.state", "promotion.owner", "promotion.started"
_STALE_SECONDS = 6 * 3600


@contextmanager
def registry_errors(config: RegistryConfig) -> Iterator[None]:
    """Raises ConnectionError in one line for a registry that does not answer, or refuses."""
    try:
        yield
    except MlflowException as error:
        text = " ".join(str(error).split())
        raise ConnectionError(f"the model registry at {config.tracking_uri} does not answer: {text[:300]}") from error


class PromotionInProgress(ValueError):
    """Somebody else is at it."""


class ModelRegistry:
    """The registered model `config.model_name`."""

    def __init__(self, config: RegistryConfig):
        self.name = config.model_name
        self.client = mlflow_client(config.tracking_uri)
        self._owner = f"{socket.gethostname()}:{os.getpid()}"

    def ensure(self, description: str) -> None:
        """Make the registered model when it does not exist."""
        try:
            self.client.create_registered_model(self.name, description=description)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise

    def aliases(self) -> dict[str, str]:
        """alias -> version; empty for a model that does not exist."""
        try:
            return {alias: str(version) for alias, version in self.client.get_registered_model(self.name).aliases.items()}
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return {}
            raise

    def version(self, alias: str) -> ModelVersion | None:
        number = self.aliases().get(alias)
        return None if number is None else self.client.get_model_version(self.name, number)

    def running(self) -> list[ModelVersion]:
        """Promotions whose process is alive, as far as can be told."""
        found = self.client.search_model_versions(f"name = '{self.name}'")
        return [version for version in found if version.tags.get(STATE) == "running" and _alive(version)]

    def claim(self, source: str, run_id: str | None, tags: dict[str, str], description: str) -> str:
        """Register a version and the right to promote it; returns its number.

        Raises:
            PromotionInProgress: another promotion came first.
        """
        others = self.running()
        if others:
            raise PromotionInProgress(_told(self.name, others[0]))
        mine = {STATE: "running", OWNER: self._owner, STARTED: str(int(time.time()))}
        created = self.client.create_model_version(
            self.name, source=source, run_id=run_id, tags=tags | mine, description=description
        )
        number = int(created.version)
        first = [version for version in self.running() if int(version.version) < number]
        if first:
            self.settle(str(number), "lost")
            raise PromotionInProgress(_told(self.name, first[0]))
        self.client.set_registered_model_alias(self.name, CANDIDATE, str(number))
        return str(number)

    def settle(self, version: str, state: str) -> None:
        """Note how a version's promotion ended."""
        self.client.set_model_version_tag(self.name, version, STATE, state)

    def crown(self, version: str, expected_champion: str | None) -> None:
        """champion -> previous, `version` -> champion. Raises ValueError when the champion is not the one that was compared."""
        champion = self.aliases().get(CHAMPION)
        if champion != expected_champion:
            raise ValueError(f"the champion of {self.name} changed meanwhile to version {champion}: promote again")
        # In this order a kill in between leaves the old champion in place.
        if champion is not None:
            self.client.set_registered_model_alias(self.name, PREVIOUS, champion)
        self.client.set_registered_model_alias(self.name, CHAMPION, version)
        for alias in (CANDIDATE, LEAVING):
            self.client.delete_registered_model_alias(self.name, alias)
        self.settle(version, "promoted")

    def rollback(self) -> tuple[str, str]:
        """Swap champion and previous, or finish a swap that was killed. Returns (new champion, new previous).

        Raises:
            ValueError: there is no previous version, or a promotion is running.
        """
        aliases = self.aliases()
        if LEAVING in aliases and aliases[LEAVING] != aliases.get(CHAMPION):
            return aliases[CHAMPION], self._leave(aliases[LEAVING])
        if CHAMPION not in aliases or PREVIOUS not in aliases or aliases[CHAMPION] == aliases[PREVIOUS]:
            raise ValueError(f"{self.name} has no previous version to go back to")
        others = self.running()
        if others:
            raise PromotionInProgress(_told(self.name, others[0]))
        champion, previous = aliases[PREVIOUS], aliases[CHAMPION]
        # Killed between the two writes, both aliases would name one version, and nothing the other.
        self.client.set_registered_model_alias(self.name, LEAVING, previous)
        self.client.set_registered_model_alias(self.name, CHAMPION, champion)
        return champion, self._leave(previous)

    def _leave(self, version: str) -> str:
        self.client.set_registered_model_alias(self.name, PREVIOUS, version)
        self.client.delete_registered_model_alias(self.name, LEAVING)
        return version


def _told(name: str, version: ModelVersion) -> str:
    who = version.tags.get(OWNER, "someone")
    return f"version {version.version} of {name} is being promoted by {who}: wait until it is done, then promote again"


def _alive(version: ModelVersion) -> bool:
    host, _, pid = version.tags.get(OWNER, "").rpartition(":")
    started = int(version.tags.get(STARTED, "0"))
    if time.time() - started > _STALE_SECONDS:
        return False
    if host != socket.gethostname() or not pid.isdigit():
        return True
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
