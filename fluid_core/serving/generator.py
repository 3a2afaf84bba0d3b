"""The Ray Serve deployment that owns the model: loading, continuous batching, changing to a new version in flight."""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from PIL import Image

from fluid_core.config import Recipe
from fluid_core.registry.models import ModelRef, resolve_model
from fluid_core.serving.batching import Closed, ContinuousBatcher, Expired, Job, known_cells
from fluid_core.serving.errors import ApiError, bad_request, deadline_exceeded, model_not_found
from fluid_core.serving.provenance import png_bytes
from fluid_core.serving.requests import ServedModel
from fluid_core.serving.safety import load_safety_hook
from fluid_core.serving.tasks import ImageTask, TaskEvent

if TYPE_CHECKING:
    from fluid_core.generation.engine import DecodeSlot, GenerationRequest

logger = logging.getLogger(__name__)

STALLED_SECONDS = 600.0
FIRST_PAUSE, LONGEST_PAUSE = 10.0, 600.0
"""Seconds between two attempts to load a version that could not be loaded."""


class _Version:
    """A loaded model version with the batcher that runs it."""

    def __init__(self, ref: ModelRef, recipe: Recipe):
        self.served = ServedModel(ref, recipe)
        self.batcher = ContinuousBatcher(self.served.pipeline, recipe.serving.max_batch_size)

    def warm_up(self) -> None:
        """Make a real image: a model that cannot is never put in front of clients. Raises what went wrong."""
        ended, problem = threading.Event(), []
        task = ImageTask("a red circle", 1, seed=0, steps=1)

        def on_end(error: BaseException | None) -> None:
            problem.append(error)
            ended.set()

        self.batcher.submit(Job(1, lambda: self.served.requests(task), lambda *_: None, on_end))
        ended.wait()
        if problem[0] is not None:
            raise problem[0]


class Generator:
    """One replica. `recipe` is the recipe as a plain dict, its addresses absolute."""

    def __init__(self, recipe: dict[str, Any]):
        self._recipe = Recipe.model_validate(recipe)
        self._config = self._recipe.serving
        self._safety = load_safety_hook(self._config.safety_hook, self._config.blocked_words_file)
        self._version = self._load(resolve_model(self._config.model, self._recipe.registry))
        follows = self._config.model is None or "@" in self._config.model
        if follows:
            threading.Thread(target=self._follow_alias, name="fluid-alias", daemon=True).start()

    def _load(self, ref: ModelRef) -> _Version:
        version = _Version(ref, self._recipe)
        try:
            version.warm_up()
        except BaseException:
            version.batcher.close()  # its thread would keep the model in memory
            raise
        return version

    def _follow_alias(self) -> None:
        """Where the alias moved, load the version beside the present one and let new requests go there.

        What the present version has begun it finishes. A version that cannot be loaded changes nothing and is tried again, after
        pauses that grow: the bundle store may be away for a while, or the bundle broken for good.
        """
        broken: ModelRef | None = None
        pause = again = 0.0
        while True:
            time.sleep(self._config.follow_alias_seconds)
            ref = None
            try:
                ref = resolve_model(self._config.model, self._recipe.registry)
                if ref == self._version.served.ref:
                    broken = None
                    continue
                if ref == broken and time.monotonic() < again:
                    continue
                fresh = self._load(ref)
            except Exception as error:
                logger.error("the model stays %s: %s", self._version.served.ref.label, error)
                if ref is not None:
                    pause = min(2 * pause, LONGEST_PAUSE) if ref == broken else FIRST_PAUSE
                    broken, again = ref, time.monotonic() + pause
                continue
            old, self._version, broken = self._version, fresh, None
            old.batcher.close()
            logger.warning("now serving %s instead of %s", ref.label, old.served.ref.label)

    def describe(self) -> dict[str, Any]:
        """The fields of /v1/models."""
        return self._version.served.describe()

    def check_health(self) -> None:
        """Called by Ray Serve; a raise makes it replace the replica."""
        if not self._version.batcher.healthy(STALLED_SECONDS):
            raise RuntimeError("the batching thread is dead or stuck")

    async def stream(self, task: ImageTask, seconds: float) -> AsyncIterator[TaskEvent]:
        """The events of a task (tasks.py), `error` last where there is one. Leaving the generator cancels the task."""
        async with aclosing(self._events(task, seconds)) as events:
            async for event in events:
                yield event

    async def generate(self, task: ImageTask, seconds: float) -> list[TaskEvent]:
        """The same events in one answer: each message takes time from the thread that runs the model."""
        return [event async for event in self.stream(task, seconds)]

    async def _events(self, task: ImageTask, seconds: float) -> AsyncGenerator[TaskEvent, None]:
        loop = asyncio.get_running_loop()
        happened: deque[tuple[str, int, Any, Any]] = deque()
        news = asyncio.Event()

        def post(kind: str, index: int = 0, value: Any = None, more: Any = None) -> None:
            """From the batching thread. To wake the loop takes the interpreter away from it: without a stream once, at the end."""
            happened.append((kind, index, value, more))
            if task.stream or kind == "end":
                loop.call_soon_threadsafe(news.set)

        while True:
            version = self._version
            served = version.served
            if task.model is not None and task.model not in served.names:
                yield TaskEvent("error", details=asdict(model_not_found(task.model, served.ref.name)))
                return

            def make_requests(served: ServedModel = served) -> list[Any]:
                requests = served.requests(task)
                post("started", value=served.started(task, requests[0]))
                return requests

            job = Job(
                count=task.count,
                make_requests=make_requests,
                on_image=lambda index, image, slot: post("image", index, image, settings_of(slot.request)),
                on_partial=lambda index, image, slot: post(
                    "partial", index, image, (settings_of(slot.request), progress_of(slot))
                ),
                on_end=lambda error: post("end", value=error),
                partial_images=task.partial_images,
                deadline=time.monotonic() + seconds,
                background=task.background,
            )
            try:
                version.batcher.submit(job)
                break
            except Closed:
                continue  # the version changed in between
        try:
            while True:
                while not happened:
                    news.clear()
                    await news.wait()
                kind, index, value, more = happened.popleft()
                if kind == "started":
                    yield TaskEvent("started", details=value)
                elif kind == "partial":
                    settings, progress = more
                    png = await asyncio.to_thread(self._checked_png, task, index, value, settings, served)
                    yield TaskEvent("partial", index, png, task.seed_of(index), progress)
                elif kind == "image":
                    png = await asyncio.to_thread(self._checked_png, task, index, value, more, served)
                    yield TaskEvent("image", index, png, task.seed_of(index))
                elif value is not None:
                    yield _error(value, seconds)
                    return
                else:
                    now = time.monotonic()
                    yield TaskEvent(
                        "done",
                        details={
                            "model": served.ref.label,
                            "queue_seconds": job.admitted - job.submitted,
                            "generation_seconds": now - job.admitted,
                            "batch_size": version.batcher.last_batch,
                        },
                    )
                    return
        except ApiError as error:
            yield _error(error, seconds)
        finally:
            job.cancel()

    def _checked_png(
        self, task: ImageTask, index: int, image: Image.Image, settings: dict[str, Any], served: ServedModel
    ) -> bytes:
        """A preview or an image, with where it comes from. Raises ApiError when the safety hook refuses it: a preview shows enough."""
        refusal = self._safety.check_image(image, task.prompt, task.user)
        if refusal is not None:
            raise ApiError(400, "content_policy_violation", refusal, "prompt")
        return png_bytes(image, served.provenance(task, index, settings))


def settings_of(request: "GenerationRequest") -> dict[str, Any]:
    """What made an image, for its provenance."""
    names = ("num_steps", "head_steps", "guidance_scale", "guidance_schedule", "temperature", "solver")
    return {name: getattr(request, name) for name in names}


def progress_of(slot: "DecodeSlot") -> dict[str, Any]:
    return {"step": slot.step, "steps": len(slot.counts), "known": known_cells(slot)}


def _error(error: BaseException, seconds: float) -> TaskEvent:
    if isinstance(error, Expired):
        error = deadline_exceeded(seconds)
    elif isinstance(error, ValueError):
        error = bad_request(str(error))
    elif not isinstance(error, ApiError):
        logger.error("generation failed: %r", error)
        error = ApiError(500, "generation_failed", "the images could not be made; the server's log says why", retry_after=1)
    return TaskEvent("error", details=asdict(error))
