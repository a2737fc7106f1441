"""musigma: Gaussian latent-variable models whose numbers are true."""

__version__ = "0.1.0"
