"""``musigma mcp``: the audit as a tool for coding assistants, by the Model Context Protocol."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from musigma import __version__

MINUTES = 10
"""Time after which an audit is stopped."""

INSTRUCTIONS = (
    "Audits what VAEs, normalizing flows and their training steps really compute. Call `audit` "
    "after changing a sampler, a KL, a loss or a flow; the verdict is correct, warning, bug, or "
    "incomplete if an essential part, such as the KL, could not be examined."
)


def mcp() -> None:
    """Serve the audit to coding assistants over standard input and output.

    It serves one tool, `audit`, by the Model Context Protocol, until its input ends. Paths are
    relative to the folder in which it is started. Needs the package mcp: pip install
    'musigma[mcp]'.
    """
    server().run("stdio")


def server() -> Any:
    """The server, an `mcp.server.MCPServer`.

    Raises:
        ValueError: If the package mcp is not installed, or is older than version 2.
    """
    try:
        from mcp.server import MCPServer
    except ImportError as error:
        raise ValueError(
            f"mcp: the server needs the package mcp of version 2 or newer ({error}); pip install "
            "'musigma[mcp]'"
        ) from error
    made = MCPServer(
        "musigma", version=__version__, instructions=INSTRUCTIONS, log_level="WARNING"
    )
    description = inspect.getdoc(audit)
    made.tool(title="Audit a VAE, a flow or a training step", description=description)(audit)
    return made


async def audit(target: str, example: str | None = None, shape: str | None = None) -> Any:
    """Run a VAE, a normalizing flow or a training step, and check what it computes.

    The file is executed in a process of its own. The answer has a verdict (correct, warning, bug,
    or incomplete if the KL or the log-determinant could not be examined), and the findings with
    their repairs.

    Args:
        target: FILE.py:NAME or module:NAME of a class, an instance, or a function.
        example: FILE.py:NAME of a batch as the model takes it in training, or of a function that
            returns one.
        shape: Shape of one example, such as 1x28x28, if there is no example.
    """
    import anyio
    from mcp.types import CallToolResult, TextContent

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "report.json"
        options = {"out": file, "example": example, "shape": shape}
        given = [f"--{name}={value}" for name, value in options.items() if value is not None]
        # in a process of its own, changed files are read anew, and no exit ends the server
        command = [sys.executable, "-m", "musigma", "audit", *given, "--", target]
        report, text = None, f"the audit did not end within {MINUTES} minutes"
        with anyio.move_on_after(60 * MINUTES):
            done = await anyio.run_process(
                command,
                check=False,
                stdin=subprocess.DEVNULL,
                env={**os.environ, "PYTHONSAFEPATH": "1"},
            )
            text = done.stdout.decode(errors="replace").strip()
            if file.exists():
                report = json.loads(file.read_text(encoding="utf-8"))
            else:
                said = done.stderr.decode(errors="replace").strip()[-4000:]
                text = said or f"the audit ended with exit code {done.returncode}"
    return CallToolResult(
        content=[TextContent(type="text", text=text)],
        structured_content=report,
        is_error=report is None,
    )
