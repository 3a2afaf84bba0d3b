"""The place where a deployment's safety checks go, and a plain default.

The default refuses prompts that hold a word or phrase of a block list. It is a courtesy, not a safety system: it does not
understand language, other spellings or other tongues, and it does not look at images. A service for the public replaces it:
`serving.safety_hook: package.module:factory` names a callable without arguments that returns a `SafetyHook`.
"""

import importlib
import re
import unicodedata
from pathlib import Path
from typing import Protocol

from PIL import Image

BUILT_IN_WORDS = ("child porn", "child sexual", "csam", "nude child", "naked child", "nude children", "naked children")


class SafetyHook(Protocol):
    """Both methods return None to let pass, or the reason (told to the client) to refuse."""

    def check_prompt(self, prompt: str, user: str | None) -> str | None: ...

    def check_image(self, image: Image.Image, prompt: str, user: str | None) -> str | None: ...


class BlockList:
    """Refuses prompts that hold one of some words or phrases, whatever the case, accents and spacing."""

    def __init__(self, words: tuple[str, ...] | list[str] = BUILT_IN_WORDS):
        normal = [re.escape(_normalise(word)) for word in words if word.strip()]
        self._pattern = re.compile(rf"\b(?:{'|'.join(normal)})\b") if normal else None

    @classmethod
    def from_file(cls, path: str) -> "BlockList":
        """One word or phrase a line; `#` starts a comment."""
        if not Path(path).is_file():
            raise ValueError(f"serving.blocked_words_file {path} does not exist")
        lines = (line.partition("#")[0].strip() for line in Path(path).read_text().splitlines())
        return cls([line for line in lines if line])

    def check_prompt(self, prompt: str, user: str | None) -> str | None:
        if self._pattern is not None and self._pattern.search(_normalise(prompt)):
            return "the prompt was refused by this server's block list"
        return None

    def check_image(self, image: Image.Image, prompt: str, user: str | None) -> str | None:
        return None


def load_safety_hook(spec: str | None, blocked_words_file: str | None) -> SafetyHook:
    """The hook that the recipe names; without one, the block list.

    Raises:
        ValueError: the module or the factory cannot be imported.
    """
    if spec is None:
        return BlockList.from_file(blocked_words_file) if blocked_words_file else BlockList()
    module, _, factory = spec.partition(":")
    try:
        return getattr(importlib.import_module(module), factory)()
    except (ImportError, AttributeError) as error:
        raise ValueError(f"serving.safety_hook {spec!r} cannot be loaded ({error}): write package.module:factory") from None


def _normalise(text: str) -> str:
    plain = "".join(c for c in unicodedata.normalize("NFKD", text.lower()) if not unicodedata.combining(c))
    return " ".join(re.sub(r"[^\w]+", " ", plain).split())
