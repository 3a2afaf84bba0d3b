"""PNG files that say how they were made: prompt, seed, settings, model version and licence in text chunks."""

import io
import json
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo


def png_bytes(image: Image.Image, details: dict[str, Any] | None = None) -> bytes:
    """The image as PNG. `details` goes into a `fluid` chunk as JSON and, one by one, into `fluid:<name>` chunks.

    The same image and details give the same bytes.
    """
    info = PngInfo()
    if details:
        info.add_text("Software", "Fluid")
        info.add_itxt("fluid", json.dumps(details, sort_keys=True, ensure_ascii=False))
        for name in ("prompt", "model", "licence", "attribution"):
            if details.get(name):
                info.add_itxt(f"fluid:{name}", str(details[name]))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def read_provenance(image: Image.Image) -> dict[str, Any] | None:
    """What `png_bytes` wrote, or None for another image."""
    text = image.info.get("fluid")
    return None if text is None else json.loads(text)
