"""The files of `/v1/files`: bytes and a record under `files/<owner>/` of the serving storage. Clients know ids, never paths."""

import hashlib
import re
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from fluid_core.data.storage import Storage
from fluid_core.serving.errors import ApiError
from fluid_core.serving.schema import FileObject

_ID = re.compile(r"file-[A-Za-z0-9-]{1,56}$")
_CHUNK = 1 << 20


class FileStore:
    """Every method blocks on the storage: call it from a thread."""

    def __init__(self, storage: Storage):
        self.storage = storage

    def create(
        self, source: Path, filename: str, purpose: Literal["batch", "batch_output"], owner: str, file_id: str | None = None
    ) -> FileObject:
        """Keep a local file. With `file_id` the same file may be stored twice, with the same outcome."""
        record = FileObject(
            id=file_id or f"file-{secrets.token_hex(16)}",
            bytes=source.stat().st_size,
            created_at=int(time.time()),
            filename=Path(filename).name[:200] or "upload.jsonl",
            purpose=purpose,
        )
        folder = _folder(owner)
        self.storage.put_file(source, f"{folder}/{record.id}.bin", overwrite=True)
        self.storage.put_bytes(record.model_dump_json().encode(), f"{folder}/{record.id}.json", overwrite=True)
        return record

    def get(self, file_id: str, owner: str) -> FileObject:
        """Raises ApiError 404."""
        data = None
        if _ID.match(file_id):
            data = self.storage.read_or_none(f"{_folder(owner)}/{file_id}.json")
        if data is None:
            raise ApiError(404, "file_not_found", "no file of that id", "file_id")
        return FileObject.model_validate_json(data)

    def of_owner(self, owner: str) -> list[FileObject]:
        records = []
        for entry in self.storage.list(f"{_folder(owner)}/"):
            if entry.name.endswith(".json"):
                data = self.storage.read_or_none(entry.name)
                if data is not None:
                    records.append(FileObject.model_validate_json(data))
        return sorted(records, key=lambda record: (-record.created_at, record.id))

    def delete(self, file_id: str, owner: str) -> None:
        """Raises ApiError 404."""
        self.get(file_id, owner)
        self.storage.delete(f"{_folder(owner)}/{file_id}.json")
        self.storage.delete(f"{_folder(owner)}/{file_id}.bin")

    def fetch(self, file_id: str, owner: str, folder: Path) -> Path:
        """A local copy of the file (its own path when the storage is local)."""
        self.get(file_id, owner)
        return self.storage.fetch(f"{_folder(owner)}/{file_id}.bin", folder)

    def content(self, file_id: str, owner: str) -> Iterator[bytes]:
        self.get(file_id, owner)
        with self.storage.open_input(f"{_folder(owner)}/{file_id}.bin") as source:
            while data := source.read(_CHUNK):
                yield data


def _folder(owner: str) -> str:
    return f"files/{hashlib.sha256(owner.encode()).hexdigest()[:16]}"
