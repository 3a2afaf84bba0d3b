"""What the gateway hands to a replica, and what comes back: plain values that travel between processes."""

from dataclasses import dataclass
from typing import Any, Literal

from fluid_core.serving.schema import MAX_SEED


@dataclass(frozen=True)
class ImageTask:
    """The images of one request. `image` and `mask` (PNG bytes, same size; white in the mask is made anew) make it an edit."""

    prompt: str
    count: int
    seed: int
    model: str | None = None  # name, name:version or name@alias that must make the images; None: the one that is served
    size: tuple[int, int] | None = None  # width, height; None: the model's own
    steps: int | None = None
    guidance: float | None = None
    temperature: float | None = None
    negative_prompt: str | None = None
    stream: bool = False  # events are sent as they happen, not all at the end
    partial_images: int = 0
    image: bytes | None = None
    mask: bytes | None = None
    user: str | None = None
    deadline: float | None = None
    background: bool = False

    def seed_of(self, index: int) -> int:
        return (self.seed + index) % (MAX_SEED + 1)


@dataclass
class TaskEvent:
    """What a replica has to say about a task.

    started: the task was admitted to a batch; `details`: text_tokens, image_tokens, size, model
    partial, image: `png` of image `index`; partial has `details`: step, steps, known (row-major tokens)
    done: `details`: queue_seconds, generation_seconds, batch_size
    error: `details`: the fields of an ApiError
    """

    kind: Literal["started", "partial", "image", "done", "error"]
    index: int = 0
    png: bytes = b""
    seed: int = 0
    details: dict[str, Any] | None = None
