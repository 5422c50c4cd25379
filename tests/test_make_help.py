"""make alone shows every target."""

import re
import subprocess

from tests.conftest import REPOSITORY

TARGETS = re.findall(r"^\.PHONY: (.+)$", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)


def test_make_alone_is_help():
    alone = subprocess.run(["make"], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    asked = subprocess.run(["make", "help"], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    assert alone == asked


def test_every_target_is_in_help_with_a_text_under_a_heading():
    text = subprocess.run(["make", "help"], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    shown = re.findall(r"^  ([a-z-]+) +\S.+$", text, re.MULTILINE)
    assert shown == TARGETS
    assert re.match(r"\n?Start\n  help ", text)


def test_every_rule_is_a_phony_target_but_for_the_settings_file():
    rules = re.findall(r"^([^\s#:=]+):(?!=)", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
    assert set(rules) - set(TARGETS) == {".PHONY", ".cache/env.mk", "FORCE"}


def test_every_recipe_is_one_command():
    """A recipe that needs more belongs into a script, which can be tested and run by hand."""
    lines = (REPOSITORY / "Makefile").read_text().replace("\\\n", "").splitlines()
    recipes = [line for line in lines if line.startswith("\t")]
    assert len(recipes) == len(TARGETS) + 1
