"""What a pipeline says reaches the terminal or the log, and it never outlives the workflow."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fluid_core.workflow.child import StageFailed, run_child

PROGRAM = """
import sys, time
from tqdm import tqdm
print("a line of ours")
print("(raylet) chatter", file=sys.stderr)
print("\\x1b[33m(raylet)\\x1b[0m more chatter")
for _ in tqdm(range(20), desc="working"):
    time.sleep(0.01)
"""


def run(tmp_path: Path, program: str) -> Path:
    log = tmp_path / "logs" / "stage.log"
    run_child([sys.executable, "-c", program], log, dict(os.environ))
    return log


def test_lines_and_bars_are_shown_and_chatter_goes_to_the_log_only(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    log = run(tmp_path, PROGRAM).read_text()
    shown = capfd.readouterr().err
    assert "a line of ours" in shown and "20/20" in shown and "chatter" not in shown
    assert "a line of ours" in log and "(raylet) chatter" in log and "more chatter" in log
    assert log.count("working:") == 1, "the log keeps the last state of a bar, not every one"


def test_a_users_error_is_told_in_one_line_with_its_exit_code(tmp_path: Path) -> None:
    with pytest.raises(StageFailed) as caught:
        run(tmp_path, "import sys; print('noise', file=sys.stderr); print('error: mend this', file=sys.stderr); sys.exit(2)")
    assert caught.value.code == 2
    assert str(caught.value).splitlines() == ["mend this", f"  log: {tmp_path}/logs/stage.log"]


def test_a_crash_shows_its_last_lines(tmp_path: Path) -> None:
    with pytest.raises(StageFailed, match=r"exit code 1(.|\n)*ZeroDivisionError"):
        run(tmp_path, "1 / 0")


def test_a_child_killed_for_memory_is_said_to_be(tmp_path: Path) -> None:
    with pytest.raises(StageFailed, match=r"killed by SIGKILL.*memory"):
        run(tmp_path, "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")


def test_a_killed_workflow_takes_its_pipeline_with_it(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    child = f"import os, time; open({str(pid_file)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    parent = f"""
import os, sys
from pathlib import Path
from fluid_core.workflow.child import run_child
run_child([sys.executable, "-c", {child!r}], Path({str(tmp_path / "log")!r}), dict(os.environ))
"""
    workflow = subprocess.Popen([sys.executable, "-c", parent])
    while not (pid_file.is_file() and pid_file.read_text()):
        time.sleep(0.05)
    workflow.send_signal(signal.SIGKILL)
    workflow.wait()
    pid = int(pid_file.read_text())
    for _ in range(200):
        state = Path(f"/proc/{pid}/stat")
        if not state.exists() or state.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            return
        time.sleep(0.05)
    os.kill(pid, signal.SIGKILL)
    pytest.fail("the pipeline went on after its workflow was killed")


def test_an_interrupt_asks_the_child_to_end_and_waits_for_it(tmp_path: Path) -> None:
    child = """
import signal, sys, time
def end(*_):
    time.sleep(0.3)
    print("saved", flush=True)
    sys.exit(0)
signal.signal(signal.SIGTERM, end)
print("ready", flush=True)
time.sleep(60)
"""
    log = tmp_path / "log"
    parent = f"""
import os, signal, sys
from pathlib import Path
from fluid_core.workflow.child import run_child
signal.signal(signal.SIGTERM, signal.default_int_handler)
try:
    run_child([sys.executable, "-c", {child!r}], Path({str(log)!r}), dict(os.environ))
except KeyboardInterrupt:
    sys.exit(130)
"""
    workflow = subprocess.Popen([sys.executable, "-c", parent])
    while not (log.is_file() and "\nready\n" in log.read_text()):
        time.sleep(0.05)
    workflow.send_signal(signal.SIGTERM)
    assert workflow.wait(30) == 130
    assert "saved" in log.read_text()
