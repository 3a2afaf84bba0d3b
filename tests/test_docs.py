"""Every command in README and docs is one that works: scripts, arguments, recipes, settings, files."""

import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fluid_core import cli

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
OUR_PROGRAMS = {"make", "fluid", "python", "python3.11", "ray", "torchrun", "mlflow"}
OTHER_PROGRAMS = {"docker", "kubectl", "terraform", "curl", "export", "argo", "serve"}


def fenced(text: str) -> list[tuple[str, str]]:
    """(language, text) of each fenced block."""
    return re.findall(r"^```(\w*)[^\n]*\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def commands() -> list[tuple[str, list[str]]]:
    """(page: command line, its words) of every line of the blocks that begin with a command; others show files or output."""
    found = []
    for page in PAGES:
        for language, block in fenced(page.read_text()):
            lines = [line for line in block.replace("\\\n", " ").splitlines() if line.strip() and not line.startswith("#")]
            if (
                language in ("", "sh", "bash", "shell", "console")
                and lines
                and program_of(lines[0]) in OUR_PROGRAMS | OTHER_PROGRAMS
            ):
                found += [(f"{page.name}: {line.strip()}", words_of(line)) for line in lines]
    return found


def words_of(line: str) -> list[str]:
    words = shlex.split(line.removeprefix("$ "), comments=True)
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words = words[1:]
    return words


def program_of(line: str) -> str:
    words = line.removeprefix("$ ").split()
    words = [word for word in words if not re.fullmatch(r"[A-Z_]+=\S*", word)]
    return words[0].removeprefix(".venv/bin/") if words else ""


@pytest.mark.parametrize(("where", "words"), commands(), ids=[where for where, _ in commands()])
def test_commands_in_the_docs_are_right(where: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    if words[:3] == ["ray", "job", "submit"]:
        words = words[words.index("--") + 1 :]
    if words[0] == "torchrun":
        words = ["python", *words[words.index("-m") if "-m" in words else 3 :]]
    program = words[0].removeprefix(".venv/bin/")
    if program == "make":
        done = subprocess.run(["make", "-n", *words[1:]], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    elif program == "fluid":
        check_fluid(words[1:], monkeypatch)
    elif program in ("python", "python3.11") and words[1].startswith("pipelines/"):
        check_pipeline(words[1], words[2:], monkeypatch)
    elif program in ("python", "python3.11") and words[1] == "-m":
        assert (ROOT / (words[2].replace(".", "/") + ".py")).is_file() or words[2] in ("pytest", "pip")
    elif program == "mlflow":
        assert words[1] == "ui"
    else:
        assert program in OTHER_PROGRAMS, f"{where}: what is {program}?"
    for word in words:
        if re.fullmatch(r"(infra|configs|pipelines|dashboards|benchmarks|tests|docs)/[\w./-]+\.\w+", word):
            assert (ROOT / word).exists(), f"{where}: {word} is not there"


def check_pipeline(script: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Arguments and recipe are valid; a config named `...` or in capitals stands for the reader's own."""
    if arguments[:1] != ["--help"]:
        arguments = [word for word in arguments if word not in ("...", "[--resume]")]
        if "--config" not in arguments or arguments[-1] == "--config":
            arguments = [*(word for word in arguments if word != "--config"), "--config", "configs/tiny.yaml"]
        arguments = [*arguments, "--print-config"]
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    with pytest.raises(SystemExit) as exit_:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    assert not exit_.value.code, f"{script} {' '.join(arguments)}"


def check_fluid(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib

    if arguments and arguments[0] in cli.COMMANDS:
        command = importlib.import_module(cli.COMMANDS[arguments[0]][0])
        monkeypatch.setattr(command, "run", lambda args: 0)
    with pytest.raises(SystemExit) as exit_:
        cli.main(arguments)
    assert not exit_.value.code


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", text):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_and_yaml_in_the_docs_parse(page: Path) -> None:
    import yaml

    for language, block in fenced(page.read_text()):
        if language == "python":
            compile(block, page.name, "exec")
        elif language in ("yaml", "yml"):
            yaml.safe_load(block)


def test_the_makefile_lists_its_targets() -> None:
    done = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True)
    for target in ("install", "demo", "test", "lint", "bench", "help"):
        assert f"make {target}" in done.stdout


def test_make_names_what_is_missing(tmp_path: Path) -> None:
    """A bare machine: a PATH with the tools that make itself needs, and no Python."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("sh", "bash", "touch", "awk", "make"):
        found = shutil.which(name)
        if found:
            (tools / name).symlink_to(found)
    (tmp_path / "Makefile").write_text((ROOT / "Makefile").read_text())
    for name in ("pyproject.toml", "constraints.txt"):
        (tmp_path / name).write_text("")
    environment = {"PATH": str(tools), "HOME": str(tmp_path)}
    command = [str(tools / "make"), "install"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode != 0
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "python3.11 was not found" in error and "apt-get install" in error and "make PYTHON=" in error
    assert not (tmp_path / ".venv").exists()


def test_constraints_pin_every_dependency() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = {
        line.split("==")[0].lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    }
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    names = {re.split(r"[\[=<>~! ]", requirement)[0].lower().replace("_", "-") for requirement in wanted}
    assert names <= pinned, names - pinned
    assert not [
        line for line in (ROOT / "constraints.txt").read_text().splitlines() if "+cpu" in line or line.startswith("nvidia")
    ]


def test_room_imports_point_one_way() -> None:
    """model, diffusion and generation run anywhere: when imported they need torch, numpy, Pillow and safetensors alone."""
    allowed = {"torch", "numpy", "PIL", "safetensors", "fluid_core"}
    rooms = {"config", "model", "diffusion", "generation", "random", "workflow"}
    for room in ("model", "diffusion", "generation"):
        for path in sorted((ROOT / "fluid_core" / room).glob("*.py")):
            for match in re.finditer(r"^(?:from|import) ([\w.]+)", path.read_text(), flags=re.MULTILINE):
                parts = match[1].split(".")
                assert parts[0] in allowed | sys.stdlib_module_names, f"{path.name} imports {match[1]}"
                if parts[0] == "fluid_core":
                    assert parts[1] in rooms, f"{path.name} imports {match[1]}"
