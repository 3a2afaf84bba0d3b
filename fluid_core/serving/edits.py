"""`POST /v1/images/edits`: the multipart form, and user images made safe to work with."""

import dataclasses
import io
import json
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from fastapi import Request
from PIL import Image, ImageOps, UnidentifiedImageError
from pydantic import ValidationError
from starlette.datastructures import UploadFile

from fluid_core.config import ServingConfig
from fluid_core.serving.errors import ApiError, bad_request
from fluid_core.serving.provenance import png_bytes
from fluid_core.serving.schema import GenerationBody, ModelInfo
from fluid_core.serving.tasks import ImageTask

FORMATS = ("PNG", "JPEG", "WEBP")
_NUMBERS = ("n", "seed", "steps", "guidance", "temperature", "deadline", "stream", "partial_images", "output_compression")


def _form_schema() -> dict[str, Any]:
    """The multipart body for OpenAPI: two files beside the fields of a generation."""
    fields = GenerationBody.model_json_schema()["properties"]
    plain = {}
    for name, schema in fields.items():
        # A form has no null: a field that is not sent is not there.
        first = next(one for one in schema.get("anyOf", [schema]) if one.get("type") != "null")
        plain[name] = first | {key: schema[key] for key in ("description",) if key in schema}
    file = {"type": "string", "format": "binary"}
    return {
        "type": "object",
        "required": ["image", "prompt"],
        "properties": {"image": file, "mask": file, **plain},
        "additionalProperties": False,
    }


EDIT_BODY = {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": _form_schema()}}}}


@dataclass
class EditForm:
    """A parsed form; the image files are still as they came."""

    body: GenerationBody
    image: bytes
    mask: bytes | None

    def apply(self, task: ImageTask, info: ModelInfo | None, config: ServingConfig) -> ImageTask:
        """The task with its image and mask, both of the size that will be made.

        Raises:
            ApiError: 400 with the reason.
        """
        assert info is not None
        image = _open(self.image, "image", config.max_image_side)
        if self.mask is not None:
            mask = _open(self.mask, "mask", config.max_image_side)
            if mask.size != image.size:
                raise bad_request(f"mask: its size {_wh(mask.size)} differs from the image's, {_wh(image.size)}", "mask")
        elif _has_alpha(image):
            mask = image
        else:
            raise bad_request("mask: send one, or an image with transparent areas", "mask")
        edited = _edited(mask)
        if not np.asarray(edited).any():
            raise bad_request("mask: nothing is marked; make the areas to change transparent", "mask")
        size = task.size or _natural_size(image.size, info, config.max_image_side)
        flat = _filled(image)
        if size != image.size:
            flat, edited = flat.resize(size, Image.Resampling.LANCZOS), edited.resize(size, Image.Resampling.NEAREST)
        return dataclasses.replace(task, size=size, image=png_bytes(flat), mask=png_bytes(edited))


async def edit_form(request: Request) -> EditForm:
    """FastAPI dependency: read the multipart form by OpenAI's names (`image` or `image[]`)."""
    kind = request.headers.get("content-type", "")
    if not kind.startswith("multipart/form-data"):
        raise bad_request("send the edit as multipart/form-data with the fields image, mask and prompt")
    async with request.form(max_files=2, max_fields=32) as form:
        files: dict[str, bytes] = {}
        values: dict[str, Any] = {}
        for name, value in form.multi_items():
            name = name.removesuffix("[]")
            if isinstance(value, UploadFile):
                if name not in ("image", "mask") or name in files:
                    raise bad_request(f"{name}: one image and at most one mask are taken", name)
                files[name] = await value.read()
            else:
                values[name] = _number(value) if name in _NUMBERS else value
    if "image" not in files:
        raise bad_request("image: this field is needed, as a file", "image")
    try:
        body = GenerationBody.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ApiError(400, first["type"], f"{where}: {first['msg']}", where) from None
    return EditForm(body, files["image"], files.get("mask"))


def _number(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):  # no number: the check of the field says so
        return text


def _open(data: bytes, name: str, max_side: int) -> Image.Image:
    """Decode an uploaded image whole, after its header showed an allowed size. Raises ApiError 400."""
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
        if max(image.size) > max_side:
            raise bad_request(f"{name}: {_wh(image.size)} pixels, at most {max_side} a side are taken", name)
        image.load()
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):
            image = _eight_bits(image)
        return image.convert("RGBA") if _has_alpha(image) or "transparency" in image.info else image
    except ApiError:
        raise
    except UnidentifiedImageError:
        raise bad_request(f"{name}: not a {', '.join(FORMATS)} file", name) from None
    except Exception as error:  # Pillow raises nearly anything on damaged files
        raise bad_request(f"{name}: damaged image file ({error})", name) from None


def _eight_bits(image: Image.Image) -> Image.Image:
    """A grayscale PNG of 16 bits scaled to 8, where Pillow would clip; LA if one of its values stands for transparent."""
    values = np.asarray(image)
    grey = Image.fromarray((values >> 8).astype(np.uint8))
    if "transparency" not in image.info:
        return grey
    alpha = np.where(values == image.info["transparency"], 0, 255).astype(np.uint8)
    return Image.merge("LA", (grey, Image.fromarray(alpha)))


def _has_alpha(image: Image.Image) -> bool:
    return "A" in image.getbands()


def _filled(image: Image.Image) -> Image.Image:
    """RGB. Outside the box of what is visible its border goes on, so that the tokenizer sees something plausible there."""
    colours = image.convert("RGB")
    box = image.getchannel("A").getbbox() if _has_alpha(image) else None
    if box is None or box == (0, 0, *image.size):
        return colours
    left, top, right, bottom = box
    inner = np.asarray(colours)[top:bottom, left:right]
    return Image.fromarray(np.pad(inner, ((top, image.height - bottom), (left, image.width - right), (0, 0)), mode="edge"))


def _edited(mask: Image.Image) -> Image.Image:
    """L image, 255 where the picture is made anew: where the mask is transparent, or white when it has no alpha."""
    if _has_alpha(mask):
        return mask.getchannel("A").point(lambda alpha: 255 if alpha < 128 else 0)
    return mask.convert("L").point(lambda value: 255 if value >= 128 else 0)


def _natural_size(size: tuple[int, int], info: ModelInfo, max_side: int) -> tuple[int, int]:
    """The image's own size where the model can make it, else one of about the model's number of pixels and the image's proportions."""
    unit = info.size_multiple
    if size[0] % unit == 0 and size[1] % unit == 0:
        return size
    width, height = (int(side) for side in info.image_size.split("x"))
    scale = math.sqrt(width * height / (size[0] * size[1]))
    sides = [unit * max(1, min(round(side * scale / unit), max_side // unit)) for side in size]
    return sides[0], sides[1]


def _wh(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
