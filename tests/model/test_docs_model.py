"""The tables in docs/ are what their commands print."""

import subprocess
import sys
from pathlib import Path


def test_the_preset_table_is_the_commands(repository: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "fluid_core.cli", "presets", "--markdown"], capture_output=True, text=True)
    text = (repository / "docs" / "model.md").read_text()
    assert text.split("<!-- fluid presets --markdown -->\n")[1].split("<!-- end -->")[0] == done.stdout


def test_the_method_stays_short(repository: Path) -> None:
    lines = sum(len(path.read_text().splitlines()) for path in (repository / "fluid_core" / "model").glob("*.py"))
    assert lines < 1000, "a newcomer reads the method in one sitting"
