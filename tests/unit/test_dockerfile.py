"""Dockerfile.ascend, without Docker: what it copies and runs is there."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import tomllib
from importlib.machinery import PathFinder
from pathlib import Path, PurePosixPath

import pytest

from vllm_pd.cli import run_cli

ROOT = Path(__file__).resolve().parent.parent.parent
DOCKERFILE = ROOT / "Dockerfile.ascend"
KNOWN = {"ARG", "FROM", "WORKDIR", "COPY", "RUN", "USER", "EXPOSE", "CMD"}
OF_THE_IMAGE = {"python3"}
"""Commands that the base image brings; here another one of the same name is looked for."""
SEPARATORS = {"&&", "||", ";"}


def instructions() -> list[tuple[str, str]]:
    """Return every instruction and its arguments, continued lines joined."""
    text = re.sub(r"^#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE)
    lines = [line.strip() for line in text.replace("\\\n", " ").splitlines() if line.strip()]
    return [(line.split()[0], line.partition(" ")[2].strip()) for line in lines]


def arguments_of(name: str) -> list[str]:
    return [arguments for instruction, arguments in instructions() if instruction == name]


def copied() -> dict[str, str]:
    """Return, by source in the repository, where it goes."""
    found = {}
    for arguments in arguments_of("COPY"):
        *sources, target = shlex.split(arguments)
        for source in sources:
            is_folder = target.endswith("/") and not source.endswith("/")
            found[source] = f"{target}{PurePosixPath(source).name}" if is_folder else target
    return found


def commands() -> list[list[str]]:
    """Return the commands of all RUN instructions."""
    found: list[list[str]] = []
    for arguments in arguments_of("RUN"):
        found.append([])
        for word in shlex.split(arguments):
            if word in SEPARATORS:
                found.append([])
            else:
                found[-1].append(word)
    return found


def test_every_instruction_is_known() -> None:
    assert {instruction for instruction, _ in instructions()} <= KNOWN


def test_the_base_is_the_official_image_by_tag() -> None:
    assert arguments_of("FROM") == ["quay.io/ascend/vllm-ascend:${TAG}"]
    assert arguments_of("ARG")[0] == "TAG=v0.23.0"


@pytest.mark.parametrize("source", list(copied()))
def test_what_is_copied_exists(source: str) -> None:
    assert (ROOT / source).exists()
    assert source.endswith("/") == (ROOT / source).is_dir()


def ignored(path: str) -> list[str]:
    """Return the patterns of .dockerignore that leave a path, or a folder it is in, out.

    As in Docker's reference: patterns are of the top folder, ``*`` stays within a folder,
    and ``**`` is any number of folders.
    """
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    patterns = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    parents = [PurePosixPath(path), *PurePosixPath(path).parents]
    return [p for p in patterns if any(re.fullmatch(to_regex(p), str(own)) for own in parents)]


def to_regex(pattern: str) -> str:
    parts = re.split(r"(\*\*/|\*)", pattern)
    words = {"**/": "(?:[^/]+/)*", "*": "[^/]*"}
    return "".join(words.get(part) or re.escape(part) for part in parts)


def files_of(source: str) -> list[str]:
    """Return the files of the repository that a COPY takes, without what builds have left."""
    listed = subprocess.run(
        ["git", "ls-files", "--", source], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return listed.stdout.splitlines()


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="no checkout, so nobody lists its files")
@pytest.mark.parametrize("source", list(copied()))
def test_what_is_copied_is_not_left_out_of_the_context(source: str) -> None:
    files = files_of(source)
    assert files
    assert {file: patterns for file in files if (patterns := ignored(file))} == {}


@pytest.mark.parametrize(
    "path",
    [
        ".git/HEAD",
        ".venv/bin/python",
        "build/lib/vllm_pd/cli.py",
        "ascend-vllm-plugin/build/lib/ascend_vllm_plugin/abi.py",
        "ascend-vllm-plugin/ascend_vllm_plugin.egg-info/PKG-INFO",
        "ascend-vllm-plugin/ascend_vllm_plugin/__pycache__/abi.pyc",
        "vllm_pd/.mypy_cache/x",
    ],
)
def test_what_builds_and_tests_leave_is_left_out(path: str) -> None:
    assert ignored(path)


@pytest.mark.parametrize("path", ["vllm_pd/builder.py", "pd_example/dist.sh", "README.md"])
def test_files_of_similar_names_are_not_left_out(path: str) -> None:
    assert not ignored(path)


def test_files_that_the_build_of_a_distribution_needs_are_copied() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = {"pyproject.toml", "vllm_pd/", project["readme"], *project["license-files"]}
    assert wanted <= set(copied())


@pytest.mark.parametrize("command", commands(), ids=lambda command: " ".join(command[:4]))
def test_every_command_exists(command: list[str]) -> None:
    assert shutil.which(command[0]), command
    if command[0] in OF_THE_IMAGE and "-m" in command:
        # Not importlib's find_spec: for pip, setuptools' hook there may warn of distutils.
        assert PathFinder.find_spec(command[command.index("-m") + 1])


def test_pip_installs_what_was_copied_and_leaves_the_engine_alone() -> None:
    installs = [command for command in commands() if "pip" in command]
    assert len(installs) == 2
    listed, ours = installs
    assert listed[-1] in copied()
    assert not re.search(r"^(torch|vllm)", (ROOT / listed[-1]).read_text(), flags=re.MULTILINE)
    assert "--no-deps" in ours
    for folder in (".", "./ascend-vllm-plugin"):
        assert folder in ours
        assert (ROOT / folder / "pyproject.toml").is_file()
    assert "ascend-vllm-plugin/" in copied()


def test_modules_that_are_imported_to_check_it_exist() -> None:
    (check,) = [command for command in commands() if command[:3] == ["python3", "-P", "-c"]]
    names = check[3].removeprefix("import ").split(", ")
    assert all(importlib.util.find_spec(name) for name in names)


def test_the_command_of_the_image_is_one_of_ours(capsys: pytest.CaptureFixture[str]) -> None:
    program, *arguments = json.loads(arguments_of("CMD")[0])
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert program in scripts
    assert run_cli([*arguments, "--help"]) == 0
    assert "Usage" in capsys.readouterr().out


def test_the_container_does_not_run_as_root() -> None:
    assert arguments_of("USER") == ["${RUN_AS}"]
    assert "RUN_AS=vllm-pd" in arguments_of("ARG")
