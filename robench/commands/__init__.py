"""One file per command of the command line; `robench.cli` gathers them."""
