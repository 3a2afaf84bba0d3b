"""Run a pipeline as a subprocess: all it says goes to a log file, its lines and progress bars also to the terminal.

Ray, DeepSpeed and MLflow write a great deal to stderr. Of stderr only progress bars and `error:` lines are shown; the rest
is in the log.
"""

import ctypes
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from pathlib import Path
from typing import IO, Any

_BAR = re.compile(r"\d+%\||\d+(\.\d+)?\s*(it|s|[a-z]+)/s\b|s/(it|step|[a-z]+)\b.*\]")
_CHATTER = re.compile(r"(\x1b\[\d+m)?\((raylet|autoscaler|pid=|\w+ pid=)")  # Ray writes some of it to stdout
_QUIET_SECONDS = 15.0
"""Between two states of one bar when the output is no terminal: a log needs fewer of them."""
_STOP_SECONDS = 90.0
_PRCTL = ctypes.CDLL(None).prctl  # looked up here: between fork and exec a lock of another thread may be held


class StageFailed(Exception):
    """A pipeline ended with an exit code other than 0; `code` is that."""

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.code = code


def run_child(command: list[str], log_path: Path, env: dict[str, str]) -> None:
    """Run `command` to its end.

    Raises:
        StageFailed: it ended with another exit code than 0; the message has its last lines and where the log is.
        KeyboardInterrupt: this process was interrupted or terminated; the child was given time to end by itself.
    """
    log_path.parent.mkdir(parents=True, exist_ok=True)
    width, height = shutil.get_terminal_size((100, 24))
    env = env | {"PYTHONUNBUFFERED": "1", "COLUMNS": str(min(width, 120)), "LINES": str(height)}
    with open(log_path, "ab") as log:
        log.write(f"\n--- {time.strftime('%Y-%m-%d %H:%M:%S')} {' '.join(command)}\n".encode())
        log.flush()
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=env,
            preexec_fn=_die_with_parent,
            start_new_session=True,
        )
        assert process.stdout and process.stderr
        screen = _Screen()
        tail: deque[str] = deque(maxlen=12)
        readers = [
            threading.Thread(target=_relay, args=(process.stdout, log, screen, tail, True), daemon=True),
            threading.Thread(target=_relay, args=(process.stderr, log, screen, tail, False), daemon=True),
        ]
        for reader in readers:
            reader.start()
        try:
            code = process.wait()
        except BaseException:
            screen.line("stopping: the stage is given time to save what it has (Ctrl-C again: at once)")
            _stop(process)
            raise
        finally:
            for reader in readers:
                # A grandchild that outlives the child may keep the pipe open.
                reader.join(timeout=5)
            screen.end()
    if code:
        last = [line for line in tail if not line.startswith("error: ")]
        told = [line.removeprefix("error: ") for line in tail if line.startswith("error: ")]
        reason = told[-1] if told else "\n  ".join([_reason(code), *last])
        raise StageFailed(f"{reason}\n  log: {log_path}", code)


def _reason(code: int) -> str:
    if code < 0:
        name = signal.Signals(-code).name
        hint = " (out of memory? see `dmesg`)" if -code == signal.SIGKILL else ""
        return f"killed by {name}{hint}; the last lines were:"
    return f"ended with exit code {code}; the last lines were:"


def _die_with_parent() -> None:
    """In the child, before exec: a killed workflow must not leave a pipeline behind that writes the same folders."""
    _PRCTL(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def _stop(process: subprocess.Popen[Any]) -> None:
    """Ask the child to end (training saves a checkpoint on SIGTERM), then insist."""
    for ask, patience in ((signal.SIGTERM, _STOP_SECONDS), (signal.SIGKILL, 10.0)):
        if process.poll() is None:
            process.send_signal(ask)
            try:
                process.wait(patience)
            except (subprocess.TimeoutExpired, KeyboardInterrupt):
                continue


def _relay(pipe: IO[bytes], log: IO[bytes], screen: "_Screen", tail: deque[str], show: bool) -> None:
    pending = ""
    while chunk := os.read(pipe.fileno(), 65536):
        pending += chunk.decode(errors="replace")
        *parts, pending = re.split(r"(?<=[\r\n])", pending)
        for part in parts:
            _line(part.rstrip("\r\n"), part.endswith("\n"), log, screen, tail, show)
        if _BAR.search(pending):
            screen.bar(pending.rstrip())
    if pending:
        _line(pending, True, log, screen, tail, show)


def _line(text: str, ended: bool, log: IO[bytes], screen: "_Screen", tail: deque[str], show: bool) -> None:
    if _BAR.search(text):
        screen.bar(text, final=ended)
        if not ended:
            os.utime(log.fileno())  # the log's time says how long the stage ran, also when all is killed (runner.py)
            return
    elif text.strip():
        tail.append(text)
        if show and not _CHATTER.match(text):
            screen.line(text)
    log.write(text.encode() + b"\n")
    log.flush()


class _Screen:
    """Lines and one live bar on this process's stderr, written by two threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._tty = sys.stderr.isatty()
        self._live = ""
        self._shown = time.monotonic()

    def line(self, text: str) -> None:
        with self._lock:
            if self._tty and self._live:
                sys.stderr.write("\r\x1b[K")
                self._live = ""
            print(f"  {text}", file=sys.stderr, flush=True)

    def bar(self, text: str, final: bool = False) -> None:
        text = text.strip("\x1b[A \r\n")
        with self._lock:
            if not text or (text == self._live and not final):
                return
            if self._tty:
                sys.stderr.write(f"\r\x1b[K  {text}" + ("\n" if final else ""))
                self._live = "" if final else text
            elif final or time.monotonic() - self._shown >= _QUIET_SECONDS:
                sys.stderr.write(f"  {text}\n")
                self._shown = time.monotonic()
            sys.stderr.flush()

    def end(self) -> None:
        with self._lock:
            if self._live:
                sys.stderr.write("\n")
                self._live = ""
                sys.stderr.flush()
