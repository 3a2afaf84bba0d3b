import multiprocessing
import os
from pathlib import Path

import pytest

from fluid_core.workflow.stage import replace_folder


def _folder(path: Path, content: str) -> Path:
    path.mkdir()
    for name in ("a", "b"):
        (path / name).write_text(content)
    return path


def _replace_and_die(new: Path, target: Path, calls: int) -> None:
    left = calls

    def mortal(call):
        def wrapped(*args, **kwargs):
            nonlocal left
            if left == 0:
                os._exit(9)
            left -= 1
            return call(*args, **kwargs)

        return wrapped

    for name in ("replace", "unlink", "rmdir"):
        setattr(os, name, mortal(getattr(os, name)))
    replace_folder(new, target)


@pytest.mark.parametrize("there", [False, True])
def test_a_folder_is_replaced_whole_wherever_it_is_killed(tmp_path, there):
    seen = set()
    for calls in range(20):
        root = tmp_path / str(calls)
        root.mkdir()
        target, new = root / "target", _folder(root / "new", "new")
        if there:
            _folder(target, "old")
        process = multiprocessing.get_context("fork").Process(target=_replace_and_die, args=(new, target, calls))
        process.start()
        process.join()
        found = {(target / name).read_text() for name in ("a", "b")} if target.exists() else {"absent"}
        assert len(found) == 1, f"killed before call {calls}: a part is left"
        seen |= found
        replace_folder(_folder(root / "last", "last"), target)
        assert {path.name for path in root.iterdir()} <= {"target", "new"}, "what a kill left is cleaned up by the next"
        if process.exitcode == 0:
            break
    assert process.exitcode == 0
    assert seen == ({"old", "absent", "new"} if there else {"absent", "new"})
