"""The corpus of training steps, right and wrong, each with what the audit may say of it."""

import corpus_steps_deep
import corpus_steps_flow
import corpus_steps_likelihoods
import corpus_steps_maps
import corpus_steps_networks
import corpus_steps_refused
import corpus_steps_shapes
import corpus_steps_vae
import corpus_steps_wrong
from corpus_steps_base import ENTRIES, Built, Entry

PARTS = (
    corpus_steps_vae,
    corpus_steps_likelihoods,
    corpus_steps_networks,
    corpus_steps_wrong,
    corpus_steps_shapes,
    corpus_steps_deep,
    corpus_steps_flow,
    corpus_steps_maps,
    corpus_steps_refused,
)

__all__ = ["ENTRIES", "PARTS", "Built", "Entry"]
