"""Programs as processes of their own that start at once: forks of a process that has imported what they need.

    Program(["pipelines/pretrain.py", "--config", "recipe.yaml"], log)

Many tests kill programs and start them over; torch, Ray, DeepSpeed and MLflow would be imported anew each time, which takes
longer than what is tested. That the pipelines start as users start them is for tests/test_end_to_end.py to show.
"""

import atexit
import faulthandler
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        "fluid_core.training.loop",
        "fluid_core.training.run",
        "fluid_core.encoding.run",
        "fluid_core.encoders.tokenizer_run",
        "fluid_core.encoders.text",
        "fluid_core.encoders.image",
        "deepspeed",
        "mlflow",
        "ray.data",
        "ray.train.torch",
    ]
)


class Program:
    """What `python *command` would run: a script, `-c CODE` or `-m MODULE`, each with its arguments. All it says is in `log`.

    The part of subprocess.Popen that tests use; in `returncode` a signal is negative.
    """

    def __init__(
        self,
        command: list[str],
        log: Path,
        env: dict[str, str] | None = None,
        cwd: Path | None = None,
        start_new_session: bool = False,
    ):
        self.command, self.log = command, log
        environment = dict(os.environ if env is None else env)
        arguments = (command, str(log), environment, str(cwd or Path.cwd()), start_new_session)
        self._process = _CONTEXT.Process(target=_run, args=arguments)
        # What DeepSpeed computes on is settled when it is imported, in the server that the first program starts.
        before = os.environ.get("DS_ACCELERATOR")
        os.environ["DS_ACCELERATOR"] = "cpu"
        try:
            self._process.start()
        finally:
            os.environ.pop("DS_ACCELERATOR")
            if before is not None:
                os.environ["DS_ACCELERATOR"] = before
        assert self._process.pid is not None
        self.pid: int = self._process.pid
        while start_new_session and self.poll() is None and os.getpgid(self.pid) != self.pid:
            time.sleep(0.001)

    @property
    def returncode(self) -> int | None:
        return self.poll()

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        status = self.poll()
        if status is None:
            raise subprocess.TimeoutExpired(self.command, timeout or 0.0)
        return status

    def send_signal(self, number: signal.Signals) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def output(self) -> str:
        """What it has said so far."""
        return self.log.read_text()

    def end(self, timeout: float = 500) -> tuple[int, str]:
        """(exit status, output) when it has ended. One that does not end is killed, and the error has its output and its threads' stacks."""
        try:
            return self.wait(timeout), self.output()
        except subprocess.TimeoutExpired as error:
            self.send_signal(signal.SIGUSR2)
            time.sleep(1)
            self.kill()
            raise AssertionError(f"not ended after {timeout:.0f} s: {self.output()[-6000:]}") from error


def _run(command: list[str], log: str, environment: dict[str, str], folder: str, new_session: bool) -> None:
    if new_session:
        os.setsid()
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.close(out)
    faulthandler.register(signal.SIGUSR2, file=2)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    warnings.simplefilter("ignore")
    try:
        if command[0] == "-c":
            sys.argv = ["-c", *command[2:]]
            exec(compile(command[1], "<string>", "exec"), {"__name__": "__main__"})
        elif command[0] == "-m":
            sys.argv = command[1:]
            runpy.run_module(command[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = command
            runpy.run_path(command[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # multiprocessing leaves them out
