"""A density of the rows of a table, with columns of any type."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from musigma.any_order import AnyOrder, orders_of
from musigma.schema import Schema
from musigma.zoo import architecture, at_least


@architecture
def table(
    shape: Sequence[int],
    *,
    schema: Sequence[Mapping[str, Any]] = (),
    hidden: int = 256,
    blocks: int = 3,
    embedding: int = 24,
    frequencies: int = 8,
    cosines: int = 48,
    smoothness: float | None = None,
    subsets: int = 4,
    orders: int = 1,
    smoothing: float = 1e-3,
    context: int = 0,
) -> AnyOrder:
    """An any-order autoregressive density of typed columns (Uria et al., 2014, arXiv:1310.1757).

    One network computes the distribution of each column given any subset of the others, so rows
    are scored exactly, and sampled and completed under any condition.

    Args:
        shape: (D,).
        schema: The columns, measured on the training rows.
        hidden: Width of the network.
        blocks: Number of residual blocks, of two layers each.
        embedding: Number of features of a cell in the input.
        frequencies: Number of sines and cosines of the rank of a value in the input.
        cosines: Number of cosines over the rank that the logits of a column of numbers consist of.
        smoothness: How much slower fine detail is learned, from 0 to 1; by default from the number
            of training rows.
        subsets: Random subsets of the columns that each row of a training batch is seen with.
        orders: Number of orders of the columns whose mixture is scored: 1 is the order of the
            table; more are random orders.
        smoothing: Weight of the marginal distribution in each factor.
        context: Number of features of the context.
    """
    at_least(1, hidden=hidden, embedding=embedding, subsets=subsets, orders=orders)
    at_least(0, blocks=blocks, frequencies=frequencies, cosines=cosines)
    if not 0 < smoothing < 1:
        raise ValueError(f"smoothing: expected a number between 0 and 1; got {smoothing}")
    if len(schema) != shape[0] or len(shape) != 1:
        raise ValueError(
            f"schema: table models rows of typed columns; got shape {tuple(shape)} and "
            f"{len(schema)} columns (read the data with a schema)"
        )
    model = AnyOrder(
        Schema.from_json(schema),
        hidden=hidden,
        blocks=blocks,
        embedding=embedding,
        frequencies=frequencies,
        cosines=cosines,
        smoothness=smoothness,
        subsets=subsets,
        context=context,
        smoothing=smoothing,
    )
    model.orders = orders_of(shape[0], orders)
    return model
