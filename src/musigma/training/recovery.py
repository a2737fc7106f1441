"""What goes wrong in training: at once, and traced to where it began; or slowly, and warned of."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from musigma.context import Context
from musigma.evaluation import (
    COLLAPSED,
    ILL_CONDITIONED,
    SATURATED,
    conditioning,
    saturation,
)
from musigma.model import Model
from musigma.training.distributed import local_shard
from musigma.training.state import Progress

__all__ = ["diagnose", "health", "news", "spiked"]


def diagnose(
    model: Model, run: Callable[[], object] | None, loss: float, norm: float, limit: float
) -> str | None:
    """Why a step cannot be taken: the first tensor that is not finite, or the longest gradient.

    Args:
        model: With the gradients of the failed step.
        run: Repeats its forward pass; None where no loss went astray.
        loss: Of the failed step.
        norm: Of its gradient.
        limit: What the norm may be.

    Returns:
        The reason; None if there is none here: another process has it.
    """
    output = _first_bad_output(model, run) if run else None
    for name, t in [*model.named_parameters(), *model.named_buffers()]:
        if t.is_floating_point() and not local_shard(t).isfinite().all():
            return f"{name} is not finite"
    if not math.isfinite(loss):
        return output or f"the loss is {loss}"
    if math.isfinite(norm) and norm <= limit:
        return None
    gradients = {n: local_shard(p.grad) for n, p in model.named_parameters() if p.grad is not None}
    sizes = {name: float(g.norm()) for name, g in gradients.items()}
    if not math.isfinite(norm):
        bad = [name for name, size in sizes.items() if not math.isfinite(size)]
        return f"the gradient of {bad[-1]} is not finite" if bad else None  # nearest to the output
    longest = max(sizes, key=lambda name: sizes[name])
    return f"the gradient has norm {norm:.3g}, above {limit:.3g}, most of it in {longest}"


def _first_bad_output(model: Model, run: Callable[[], object]) -> str | None:
    found: list[str] = []

    def tensors(value: object) -> Iterator[tuple[str, Tensor]]:
        if isinstance(value, Tensor):
            yield "output", value
        elif isinstance(value, Distribution):
            for name, t in vars(value).items():
                if isinstance(t, Tensor):
                    yield name.strip("_"), t
        elif isinstance(value, (tuple, list)):
            for part in value:
                yield from tensors(part)

    def watch(name: str):
        def hook(module: nn.Module, args: object, output: object) -> None:
            for part, t in tensors(output):
                if not found and t.is_floating_point() and not t.isfinite().all():
                    bad = t[~t.isfinite()].flatten()[0]
                    whose = f"{name or 'the model'} ({type(module).__name__})"
                    found.append(f"{part} of {whose} has {bad}")

        return hook

    hooks = [m.register_forward_hook(watch(name)) for name, m in model.named_modules()]
    try:
        with torch.no_grad():
            run()
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else None


# --- what goes wrong slowly --------------------------------------------------------------------

SPIKE = 10.0  # mean distances from the usual loss


def spiked(progress: Progress, loss: float) -> str | None:
    """Whether a loss lies far above the usual one, of which it then becomes part."""
    message = None
    if progress.usual_loss and progress.step > 100:
        usual, distance = progress.usual_loss
        if loss > usual + SPIKE * distance:
            message = f"the loss is {loss:.4g} nats, and usually {usual:.4g} +- {distance:.2g}"
    usual, distance = progress.usual_loss or (loss, abs(loss))
    weight = 0.02 if progress.step else 1.0
    step = min(loss, usual + SPIKE * distance) - usual  # one spike does not make the next usual
    progress.usual_loss = [usual + weight * step, distance + weight * (abs(step) - distance)]
    return message


@torch.no_grad()
def health(model: Model, kl: Mapping[str, float], x: Tensor, context: Context) -> dict[str, str]:
    """What is about to go wrong with a model: a sentence for each trouble, by its name.

    Args:
        model: The model.
        kl: Nats that each latent costs, by the name of its site; none for flows.
        x: A batch.
        context: Its context.
    """
    found: dict[str, str] = {}
    for site, nats in kl.items():
        if nats < COLLAPSED:
            found[f"collapse {site}"] = (
                f"the latent of {site} carries {nats:.3f} nats: its posterior is its prior; "
                "--free-bits or --kl-warmup keep latents open"
            )
    for name, share in saturation(model, x, context).items():
        if share is None:
            found[f"saturation {name}"] = (
                f"the scales of {name} are not examined: it states no emitters() that the pass ran"
            )
        elif share > SATURATED:
            found[f"saturation {name}"] = (
                f"{share:.0%} of the scales of {name} have run into their limit; a wider format, "
                "or a smaller --lr"
            )
    for name, condition in conditioning(model).items():
        if condition > ILL_CONDITIONED:
            found[f"conditioning {name}"] = (
                f"the matrix of {name} has condition number {condition:.1e}: decoding loses "
                f"{math.log10(condition):.0f} digits; a smaller --lr"
            )
    return found


def news(progress: Progress, kinds: tuple[str, ...], found: Mapping[str, str]) -> list[str]:
    """Of all troubles of some kinds that there are now, those that were not known of."""
    known = {name for name in progress.alerts if name.split(" ")[0] in kinds}
    fresh = [message for name, message in found.items() if name not in known]
    kept = {name: text for name, text in progress.alerts.items() if name not in known}
    progress.alerts = kept | dict(found)
    return fresh
