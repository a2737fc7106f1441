"""A local page that shows a trained latent-variable model: what it says of one input, and of all.

`Explorer` answers the questions of the page, `musigma.explore.server` serves it (`musigma explore
RUN`; docs/explore.md), and `static` is the page: plain HTML, CSS and JavaScript modules.
"""

from musigma.explore.explorer import Explorer

__all__ = ["Explorer"]
