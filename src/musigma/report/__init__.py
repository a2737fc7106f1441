"""Pictures and HTML pages of runs."""

from musigma.report.page import write

__all__ = ["write"]
