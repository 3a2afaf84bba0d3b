"""One folder of objects, local or on S3: reading, listing, and writes that are atomic and can refuse to overwrite.

Errors come in three kinds, whatever the store: missing (None, or FileNotFoundError where the object is needed), refused
(`AccessError`: bad or expired credentials, raised at once), and passing (`TransientError`, raised after retries with growing,
jittered pauses). Conditional writes: `If-None-Match: *` on S3, link(2) on a local disk.
"""

import contextlib
import errno
import hashlib
import os
import random
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar
from urllib.parse import urlsplit

import pyarrow as pa

T = TypeVar("T")

ATTEMPTS = 6
FIRST_PAUSE_SECONDS = 0.2
CONNECT_TIMEOUT_SECONDS = 10
READ_TIMEOUT_SECONDS = 60
MOST_CONNECTIONS = 32
CHUNK_BYTES = 8 << 20
LARGEST_PUT_BYTES = 4 << 30
PART_BYTES = 256 << 20
"""S3 takes at most 5 GiB in one request, and 10,000 parts of an object."""


class AccessError(PermissionError):
    """The store refuses us: retrying cannot help."""


class TransientError(ConnectionError):
    """The store did not answer properly although we tried several times."""


@dataclass(frozen=True)
class StoredObject:
    """`name` is relative to the storage's root; `version` changes when the object is replaced (mtime, or ETag)."""

    name: str
    size: int
    version: str


class Storage(Protocol):
    root: str

    def uri(self, name: str) -> str: ...
    def scratch(self) -> Path | None: ...
    def clean_scratch(self) -> None: ...
    def list(self, prefix: str = "") -> Iterator[StoredObject]: ...
    def size_or_none(self, name: str) -> int | None: ...
    def read_or_none(self, name: str) -> bytes | None: ...
    def open_input(self, name: str) -> pa.NativeFile: ...
    def read_at(self, name: str, size: int, offset: int) -> bytes: ...
    def fetch(self, name: str, folder: Path, start: int = 0, stop: int | None = None) -> Path: ...
    def put_file(self, local: Path, name: str, overwrite: bool) -> bool: ...
    def put_bytes(self, data: bytes, name: str, overwrite: bool) -> bool: ...
    def delete(self, name: str) -> None: ...


def open_storage(root: str) -> Storage:
    """The storage behind a folder name or `s3://bucket/prefix`. Raises ValueError for other schemes."""
    root = str(root)
    if root.startswith("s3://"):
        return S3Storage(root)
    if "://" in root and not root.startswith("file://"):
        raise ValueError(f"{root}: only local folders and s3:// are supported")
    return LocalStorage(root.removeprefix("file://"))


def absolute(root: str) -> str:
    """The same root for a process with another working directory."""
    return root if "://" in root else str(Path(root).resolve())


class LocalStorage:
    """A folder. A write appears whole under its name or not at all."""

    def __init__(self, root: str):
        self.root = root
        self._path = Path(root)

    def uri(self, name: str) -> str:
        return str(self._path / name)

    def list(self, prefix: str = "") -> Iterator[StoredObject]:
        start = self._path / prefix
        found = sorted(p for p in start.rglob("*") if p.is_file()) if start.is_dir() else []
        for path in found:
            stat = path.stat()
            yield StoredObject(path.relative_to(self._path).as_posix(), stat.st_size, str(stat.st_mtime_ns))

    def size_or_none(self, name: str) -> int | None:
        path = self._path / name
        return path.stat().st_size if path.is_file() else None

    def read_or_none(self, name: str) -> bytes | None:
        try:
            return (self._path / name).read_bytes()
        except FileNotFoundError:
            return None

    def open_input(self, name: str) -> pa.NativeFile:
        return pa.OSFile(str(self._path / name))

    def read_at(self, name: str, size: int, offset: int) -> bytes:
        """Bytes [offset, offset + size) of the object, fewer at its end; `offset` lies before it."""
        with open(self._path / name, "rb") as file:
            file.seek(offset)
            return file.read(size)

    def fetch(self, name: str, folder: Path, start: int = 0, stop: int | None = None) -> Path:
        """A local path that holds the object, or its bytes [start, stop) at their offset: here, its own."""
        return self._path / name

    def scratch(self) -> Path:
        """A folder for unfinished files on the same disk, so that publishing one is a link and not a copy."""
        folder = self._path / "_tmp"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def clean_scratch(self) -> None:
        """Remove unfinished files, of killed runs too."""
        shutil.rmtree(self._path / "_tmp", ignore_errors=True)

    def put_file(self, local: Path, name: str, overwrite: bool) -> bool:
        def fill(temporary: Path) -> None:
            try:
                os.link(local, temporary)
            except OSError as error:
                if error.errno not in (errno.EXDEV, errno.EPERM):
                    raise
                shutil.copyfile(local, temporary)

        return self._put(fill, name, overwrite)

    def put_bytes(self, data: bytes, name: str, overwrite: bool) -> bool:
        return self._put(lambda temporary: temporary.write_bytes(data), name, overwrite)

    def _put(self, fill: Callable[[Path], Any], name: str, overwrite: bool) -> bool:
        target = self._path / name
        for attempt in range(3):
            # Temporary files have a folder of their own, so that a killed writer leaves nothing among the data.
            temporary = self.scratch() / f"{uuid.uuid4().hex}.tmp"
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                fill(temporary)
                return self._publish(temporary, target, overwrite)
            except FileNotFoundError:
                if attempt == 2:  # a second encoder that finishes now removes the scratch folder; three times is no accident
                    raise
            finally:
                temporary.unlink(missing_ok=True)
        raise AssertionError("unreachable")

    def delete(self, name: str) -> None:
        (self._path / name).unlink(missing_ok=True)

    def _publish(self, temporary: Path, target: Path, overwrite: bool) -> bool:
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        if overwrite:
            os.replace(temporary, target)
            return True
        try:
            os.link(temporary, target)
        except FileExistsError:
            return False
        return True


class S3Storage:
    """A prefix of an S3 bucket. Credentials, region and endpoint come from AWS's usual environment variables and files."""

    def __init__(self, root: str):
        parts = urlsplit(root)
        self.root = root.rstrip("/")
        self.bucket, self.prefix = parts.netloc, parts.path.strip("/")
        self._lock = threading.Lock()
        self._boto: Any = None
        self._arrow: Any = None

    def uri(self, name: str) -> str:
        return f"{self.root}/{name}"

    def scratch(self) -> Path | None:
        return None

    def clean_scratch(self) -> None:
        pass

    @property
    def _client(self) -> Any:
        with self._lock:  # threads share the client, as boto3 allows: to make one takes a tenth of a second
            if self._boto is None:
                import boto3
                from botocore.config import Config

                # One attempt: the retries are ours, so that every kind of failure is told apart in one place.
                config = Config(
                    retries={"total_max_attempts": 1},
                    connect_timeout=CONNECT_TIMEOUT_SECONDS,
                    read_timeout=READ_TIMEOUT_SECONDS,
                    max_pool_connections=MOST_CONNECTIONS,
                    s3={"addressing_style": "path"},
                )
                self._boto = boto3.session.Session().client("s3", config=config)
        return self._boto

    def _key(self, name: str) -> str:
        return f"{self.prefix}/{name}".strip("/")

    def list(self, prefix: str = "") -> Iterator[StoredObject]:
        token: dict[str, str] = {}
        full = self._key(prefix)
        base = f"{self.prefix}/" if self.prefix else ""
        while True:
            page = _retry(lambda: self._client.list_objects_v2(Bucket=self.bucket, Prefix=full, **token), self.uri(prefix))  # noqa: B023
            for item in page.get("Contents", []):
                if not item["Key"].endswith("/") and item["Key"].startswith(base):
                    yield StoredObject(item["Key"][len(base) :], item["Size"], item["ETag"].strip('"'))
            if not page.get("IsTruncated"):
                return
            token = {"ContinuationToken": page["NextContinuationToken"]}

    def size_or_none(self, name: str) -> int | None:
        try:
            return int(
                _retry(lambda: self._client.head_object(Bucket=self.bucket, Key=self._key(name)), self.uri(name))[
                    "ContentLength"
                ]
            )
        except FileNotFoundError:
            return None

    def read_or_none(self, name: str) -> bytes | None:
        def get() -> bytes:
            return self._client.get_object(Bucket=self.bucket, Key=self._key(name))["Body"].read()

        try:
            return _retry(get, self.uri(name))
        except FileNotFoundError:
            return None

    def open_input(self, name: str) -> pa.NativeFile:
        if self._arrow is None:
            from pyarrow import fs

            endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
            self._arrow = fs.S3FileSystem(
                endpoint_override=endpoint,
                region=os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION"),
                connect_timeout=CONNECT_TIMEOUT_SECONDS,
                request_timeout=READ_TIMEOUT_SECONDS,
                retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=10),
            )
        return self._arrow.open_input_file(f"{self.bucket}/{self._key(name)}")

    def read_at(self, name: str, size: int, offset: int) -> bytes:
        """Bytes [offset, offset + size) of the object, fewer at its end; `offset` lies before it."""
        wanted = f"bytes={offset}-{offset + size - 1}"

        def get() -> bytes:
            return self._client.get_object(Bucket=self.bucket, Key=self._key(name), Range=wanted)["Body"].read()

        return _retry(get, self.uri(name))

    def fetch(self, name: str, folder: Path, start: int = 0, stop: int | None = None) -> Path:
        """Download into `folder`; after a broken connection it goes on from the byte it had.

        Of a range [start, stop) the bytes lie at the offset that they have in the object, after a hole that takes no space.
        """
        folder.mkdir(parents=True, exist_ok=True)
        target = folder / f"{hashlib.sha256(self.uri(name).encode()).hexdigest()[:16]}-{Path(name).name}"
        last = "" if stop is None else stop - 1
        with open(target, "wb") as file:
            file.seek(start)

            def rest() -> None:
                have = file.tell()
                asked = {"Range": f"bytes={have}-{last}"} if have or last else {}
                answer = self._client.get_object(Bucket=self.bucket, Key=self._key(name), **asked)
                for chunk in answer["Body"].iter_chunks(CHUNK_BYTES):
                    file.write(chunk)
                if file.tell() != have + answer["ContentLength"]:
                    raise ConnectionResetError(f"{file.tell()} of {have + answer['ContentLength']} bytes came")

            if _retry(lambda: self._client.head_object(Bucket=self.bucket, Key=self._key(name)), self.uri(name))[
                "ContentLength"
            ]:
                _retry(rest, self.uri(name))
        return target

    def put_file(self, local: Path, name: str, overwrite: bool) -> bool:
        condition = {} if overwrite else {"IfNoneMatch": "*"}
        if local.stat().st_size > LARGEST_PUT_BYTES:
            return self._put_parts(local, name, condition)

        def put() -> None:
            with open(local, "rb") as body:
                self._client.put_object(Bucket=self.bucket, Key=self._key(name), Body=body, **condition)

        return self._put(put, name)

    def _put_parts(self, local: Path, name: str, condition: dict[str, str]) -> bool:
        """Part by part, each with attempts of its own; the object appears with the last request."""
        where, at = self.uri(name), {"Bucket": self.bucket, "Key": self._key(name)}
        upload = {"UploadId": _retry(lambda: self._client.create_multipart_upload(**at), where)["UploadId"]}
        parts: list[dict[str, Any]] = []
        try:
            with open(local, "rb") as file:
                while data := file.read(PART_BYTES):
                    part = {"PartNumber": len(parts) + 1, "Body": data}
                    tag = _retry(lambda: self._client.upload_part(**at, **upload, **part)["ETag"], where)  # noqa: B023
                    parts.append({"PartNumber": part["PartNumber"], "ETag": tag})
            whole = {"MultipartUpload": {"Parts": parts}, **condition}
            written = self._put(lambda: self._client.complete_multipart_upload(**at, **upload, **whole), name)
        except BaseException:
            self._abort(at | upload)
            raise
        if not written:
            self._abort(at | upload)
        return written

    def _abort(self, upload: dict[str, str]) -> None:
        """Parts of an upload that was not completed are stored, and paid for, until somebody says that it is over."""
        with contextlib.suppress(Exception):
            self._client.abort_multipart_upload(**upload)

    def put_bytes(self, data: bytes, name: str, overwrite: bool) -> bool:
        condition = {} if overwrite else {"IfNoneMatch": "*"}
        return self._put(lambda: self._client.put_object(Bucket=self.bucket, Key=self._key(name), Body=data, **condition), name)

    def _put(self, put: Callable[[], Any], name: str) -> bool:
        try:
            _retry(put, self.uri(name))
        except FileExistsError:
            return False
        return True

    def delete(self, name: str) -> None:
        _retry(lambda: self._client.delete_object(Bucket=self.bucket, Key=self._key(name)), self.uri(name))


_MISSING = {"NoSuchKey", "404", "NotFound"}
_EXISTS = {"PreconditionFailed", "412"}
_PASSING = {
    "InternalError", "SlowDown", "ServiceUnavailable", "RequestTimeout", "Throttling", "ThrottlingException", "TooManyRequests",
    "ConditionalRequestConflict", "OperationAborted", "BadDigest", "IncompleteBody", "500", "502", "503", "504", "429",
}  # fmt: skip


def _retry(call: Callable[[], T], where: str) -> T:
    """Run one S3 call; turn its errors into the module's kinds; repeat while they may pass."""
    from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, PartialCredentialsError
    from urllib3.exceptions import HTTPError

    last: Exception | None = None
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(FIRST_PAUSE_SECONDS * 2 ** (attempt - 1) * (0.5 + random.random()))
        try:
            return call()
        except (NoCredentialsError, PartialCredentialsError) as error:
            raise AccessError(f"{where}: {error}; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or a profile") from None
        except ClientError as error:
            code = str(error.response.get("Error", {}).get("Code", ""))
            status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            if code in _MISSING:
                raise FileNotFoundError(f"{where} does not exist") from None
            if code in _EXISTS or status == 412:
                raise FileExistsError(where) from None
            if code == "NoSuchBucket":
                raise ValueError(f"{where}: the bucket does not exist") from None
            if code not in _PASSING and status < 500 and status != 429:
                if status in (400, 401, 403):
                    raise AccessError(
                        f"{where}: the store refuses access ({code}); renew the credentials or ask for the permission"
                    ) from None
                raise ValueError(f"{where}: {error}") from None
            last = error
        except (BotoCoreError, HTTPError, ConnectionError, TimeoutError) as error:
            last = error
    raise TransientError(
        f"{where}: no proper answer in {ATTEMPTS} attempts ({last}); run the same command again later"
    ) from None
