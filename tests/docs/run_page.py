"""Runs a page of the guides: `python run_page.py PAGE.md`, in an empty folder.

In the page's order: Python blocks with a title are written to files of that name. Python blocks
after `<!-- runs -->` are executed, all in one namespace, and must print what a text block right
after them shows. Shell blocks after it are run, a command a line, and must exit with 0, or with N
after `<!-- runs: exit N -->`; `<!-- runs: 8 devices -->` runs them with eight virtual devices, in a
process of their own.
"""

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from lamina.platform import cli

BLOCK = re.compile(
    r"(?:<!-- runs(?:: (?P<how>[^>]*?))? -->\n)?"
    r"```(?P<language>\w+)(?: title=\"(?P<title>[^\"]+)\")?\n(?P<text>.*?)\n```",
    re.DOTALL,
)
SHOWN = re.compile(r"\s*```text\n(?P<text>.*?)```", re.DOTALL)
"""What the block before it prints."""


def main(page: Path) -> int:
    """Runs the page and returns how many blocks there were to run."""
    text = page.read_text()
    sys.path.insert(0, os.getcwd())
    namespace: dict = {"__name__": "__main__"}
    count = 0
    for block in BLOCK.finditer(text):
        where = f"{page.name}, line {text[: block.start()].count(chr(10)) + 1}"
        if block["title"]:
            file = Path(block["title"])
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(block["text"] + "\n")
        if not block[0].startswith("<!-- runs"):
            continue
        count += 1
        print(f"--- {where}", flush=True)
        if block["language"] == "python":
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                exec(compile(block["text"], where, "exec"), namespace)
            shown = SHOWN.match(text, block.end())
            assert shown is None or printed.getvalue() == shown["text"], printed.getvalue()
            continue
        for line in block["text"].splitlines():
            command(shlex.split(line), block["how"] or "")
    return count


def command(words: list[str], how: str) -> None:
    """Runs `lamina ...` and checks its exit code."""
    while "=" in words[0]:  # variables; this process's own environment serves
        del words[0]
    assert words.pop(0) == "lamina"
    expected = int(how.removeprefix("exit ")) if how.startswith("exit ") else 0
    if how == "8 devices":
        environment = os.environ | {
            "PYTHONPATH": ".",
            "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        }
        run = [sys.executable, "-m", "lamina.platform.cli", *words]
        code = subprocess.run(run, env=environment, check=False).returncode
    else:
        code = cli.main(words)
    assert code == expected, f"exit code {code}, expected {expected}: lamina {shlex.join(words)}"


if __name__ == "__main__":
    print(main(Path(sys.argv[1])), "blocks")
