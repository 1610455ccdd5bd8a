"""The playbooks in .agents/skills name what exists: their parts, files, commands, settings."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from pithtrain.cli import make_parser, parse_overrides
from pithtrain.config import load_config

REPOSITORY = Path(__file__).resolve().parent.parent
SKILLS = sorted((REPOSITORY / ".agents" / "skills").glob("*/SKILL.md"))


def test_all_seven_are_here():
    assert {path.parent.name for path in SKILLS} == {
        "add-a-kernel", "add-a-model", "add-a-schedule", "launch-on-slurm", "plan-memory", "profile-a-run",
        "validate-correctness",
    }  # fmt: skip


@pytest.mark.parametrize("path", SKILLS, ids=lambda path: path.parent.name)
def test_a_skill_has_its_parts_and_names_what_exists(path: Path):
    text = path.read_text()
    head = re.match(r"---\nname: (.+)\ndescription: (.+)\n---\n", text)
    assert head and head[1] == path.parent.name and "Use " in head[2]
    assert re.findall(r"^## (.+)$", text, re.MULTILINE) == ["Prerequisites", "Steps", "PASS or FAIL"]
    assert ".venv/bin/" in text.split("## Prerequisites")[1].split("## Steps")[0]
    for named in re.findall(r"(?<![\w/~])(?:nbs|tests|configs|tools|\.agents)/[\w./-]+\.\w+", text):
        if not re.search(r"NAME|NN_|MODULE|1X_|35x_", named):
            assert (REPOSITORY / named).exists(), named


@pytest.mark.timeout(400)
def test_the_command_that_says_pass_does(tmp_path: Path):
    """The cheap one; others are run by the tests of what they name, or train on several processes."""
    text = (REPOSITORY / ".agents" / "skills" / "plan-memory" / "SKILL.md").read_text()
    command = re.search(r"```\n(.+?)```", text.split("## PASS or FAIL")[1], re.DOTALL)[1]
    command = command.replace("/tmp/", f"{tmp_path}/").replace(".venv/bin", str(Path(sys.executable).parent))
    done = subprocess.run(["bash", "-c", command], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.stdout.strip().splitlines()[-1].startswith("PASS"), done.stdout + done.stderr


@pytest.mark.parametrize("path", SKILLS, ids=lambda path: path.parent.name)
def test_the_commands_of_a_skill_are_ones_that_the_command_line_knows(path: Path):
    text = path.read_text().replace("\\\n", " ")
    commands = re.findall(r"(?:\.venv/bin/)?pithtrain ((?:train|launch|verify|rehearse|schedule|bench)[^`\n#|]*)", text)
    for command in commands:
        words = shlex.split(command.replace(" NAME", " gpipe" if "schedule" in command else " qwen3-moe"))
        if "configs/tiny.toml" in words or words[0] == "schedule":
            arguments, overrides = make_parser().parse_known_args(words)
            if words[0] != "schedule":
                load_config(REPOSITORY / arguments.config, parse_overrides(overrides))
