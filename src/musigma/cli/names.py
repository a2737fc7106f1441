"""The command that lists what options such as ``--objective`` choose by name."""

from __future__ import annotations

import inspect
from typing import Annotated, Any

from musigma.cli.options import INSPECT, Argument, Common, app
from musigma.cli.screen import Screen


@app.command(name="list", group=INSPECT)
def names(
    what: Annotated[str, Argument] = "objective",
    *,
    common: Common = Common(),
) -> None:
    """List the names that an option takes, with their options and a line about each.

    Args:
        what: The option: `objective`, `posterior`, `prior`, `flow` (flows that are posteriors or
            priors), `embed`, `quantizer`, `penalty`, `features` or `by` (scores of anomalies).
    """
    from musigma import detectors, plugins  # noqa: F401  # which import all registries
    from musigma.named import REGISTRIES

    if common.plugin is not None:
        plugins.register(common.plugin)
    option = what.lstrip("-").replace("-", "_")
    registry = REGISTRIES.get(option, REGISTRIES.get(option.removesuffix("s")))
    if registry is None:
        raise ValueError(
            f"list: expected one of {', '.join(sorted(REGISTRIES))}; got {what!r} "
            "(`musigma train --help` lists the architectures)"
        )
    found: list[dict[str, Any]] = []
    for name in sorted(registry):
        line = (inspect.getdoc(registry[name]) or "").partition("\n")[0]
        shown = name.replace("_", "-")
        found.append({"name": shown, "options": registry.defaults(name), "about": line})
    lines = []
    for entry in found:
        options = (f"{key}={value}" for key, value in entry["options"].items())
        lines += [" ".join([entry["name"], *options]), f"    {entry['about']}"]
    if registry.others:
        lines.append(f"({registry.others})")
    if not lines:
        lines.append(f"{registry.option}: none is built in; FILE.py:NAME names one of your own")
    Screen(common).result({what: found}, "\n".join(lines))
