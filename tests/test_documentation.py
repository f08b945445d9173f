"""Tables of the documentation against the code: each command, each option, and nothing that is not there; each test that is named."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import typer

from renderfarm.cli import app

README = Path(__file__).parents[1] / "README.md"
COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
EVERYWHERE = {"--help", "--json"}


def rows() -> dict[str, str]:
    """Of the table of commands: a command's name, and what its rows have in the column of options."""
    (table,) = re.findall(r"^## Commands\n\n(.*?)\n\n", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    found: dict[str, str] = {}
    for line in table.splitlines()[2:]:
        for name in re.findall(r"`renderfarm (?!--)([\w-]+)", line.split("|")[1]):
            found[name] = found.get(name, "") + line.replace("\\|", "/").split("|")[3]
    return found


def options(command: Any) -> set[str]:
    """The names that the command's own help gives them, longest first where there are several."""
    named = [parameter for parameter in command.params if parameter.param_type_name == "option"]
    return {max(parameter.opts, key=len) for parameter in named} - EVERYWHERE


def test_the_table_has_each_command_and_no_other() -> None:
    assert sorted(rows()) == sorted(COMMANDS)


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_a_command_and_each_of_its_options_say_what_they_are(name: str) -> None:
    command = COMMANDS[name]
    assert len(command.help or "") > 20
    assert [parameter.name for parameter in command.params if parameter.name != "help" and not parameter.help] == []


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_the_table_names_the_options_of_a_command_and_no_others(name: str) -> None:
    said = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", rows()[name]))
    assert said - EVERYWHERE == options(COMMANDS[name])


def test_the_tests_that_the_table_of_faults_names_are_there() -> None:
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", (Path(__file__).parent / "README.md").read_text(encoding="utf-8"))
    assert len(named) > 20
    assert [name for file, name in named if f"def {name}(" not in (Path(__file__).parent / file).read_text(encoding="utf-8")] == []
