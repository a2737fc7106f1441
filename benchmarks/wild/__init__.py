"""Training steps of released libraries, to be audited; see docs/wild.md."""
