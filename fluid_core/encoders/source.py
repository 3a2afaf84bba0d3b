"""Where an encoder comes from: a local folder or a hub id, and the hash of the weights that were loaded."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fluid_core.workflow.stage import file_sha256

WEIGHT_SUFFIXES = (".safetensors", ".bin")


def load_pretrained(load: Callable[..., Any], path: str, revision: str | None, what: str) -> tuple[Any, Path, str | None]:
    """Load with a library's `from_pretrained` and find the folder that the files came from.

    Args:
        load: `from_pretrained` of diffusers or transformers, with `output_loading_info=True` bound.
        path: a local folder, `organisation/name` on the hub, or `organisation/name/subfolder`.
        revision: branch, tag or commit on the hub; None for a local folder.
        what: the name of the recipe's section, for messages.

    Returns:
        (the model, the local folder with its files, the hub commit or None).

    Raises:
        ValueError: nothing there, not loadable, or weights missing from the files.
    """
    local = Path(path)
    if local.is_dir():
        if revision is not None:
            raise ValueError(f"{what}: {path} is a local folder, so revision {revision!r} has no meaning; remove it")
        if not (local / "config.json").is_file():
            inner = sorted(p.parent.name for p in local.glob("*/config.json"))
            hint = f"; name one of its subfolders: {', '.join(inner)}" if inner else ""
            raise ValueError(f"{what}: {path} holds no config.json{hint}")
        arguments: dict[str, Any] = {"pretrained_model_name_or_path": str(local), "local_files_only": True}
    else:
        parts = path.split("/")
        if len(parts) < 2 or path.startswith(("/", ".")) or not all(parts):
            raise ValueError(f"{what}: folder {path} does not exist; run the stage that makes it, or name a hub id")
        arguments = {"pretrained_model_name_or_path": "/".join(parts[:2]), "revision": revision}
        if len(parts) > 2:
            arguments["subfolder"] = "/".join(parts[2:])
    try:
        model, info = load(**arguments)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{what}: could not load {path}: {reason}") from None
    missing = sorted(info.get("missing_keys") or []) + sorted(str(key) for key in info.get("mismatched_keys") or [])
    if missing:
        raise ValueError(f"{what}: {path} lacks {len(missing)} weights of this architecture, the first is {missing[0]}")
    if local.is_dir():
        return model, local, None
    from huggingface_hub import snapshot_download

    snapshot = Path(snapshot_download("/".join(parts[:2]), revision=revision, local_files_only=True))
    return model, snapshot / arguments.get("subfolder", ""), snapshot.name


def weights_sha256(folder: Path) -> str:
    """One hash over config.json and the weight files of a folder, by name: the identity of an encoder."""
    import hashlib

    digest = hashlib.sha256()
    config = json.loads((folder / "config.json").read_text())
    # Library versions and the folder's own path are written into config.json without meaning for the result.
    digest.update(json.dumps({k: v for k, v in config.items() if not k.startswith("_")}, sort_keys=True).encode())
    files = sorted(p for p in folder.iterdir() if p.suffix in WEIGHT_SUFFIXES)
    if any(p.suffix == ".safetensors" for p in files):
        files = [p for p in files if p.suffix == ".safetensors"]
    if not files:
        raise ValueError(f"{folder} holds no weights (*.safetensors or *.bin)")
    for file in files:
        digest.update(f"{file.name} {file_sha256(file)}\n".encode())
    return digest.hexdigest()
