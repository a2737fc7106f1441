"""Flows in a recorded step: on the posterior of a latent, and as a likelihood of data."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from musigma.audit.latents import Latent
    from musigma.audit.step import StepAudit
    from musigma.audit.step_kl import Divergence

__all__ = ["judge_flow", "judge_posterior_flow"]


def judge_flow(audit: StepAudit) -> bool:
    """Examine a step without latents as the likelihood of a flow; False if it is none."""
    return False


def judge_posterior_flow(
    audit: StepAudit, latent: Latent, latents: list[Latent], d: Divergence
) -> bool:
    """Examine a flow between the draw of a latent and what is decoded; False if there is none."""
    return False
