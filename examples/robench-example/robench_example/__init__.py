"""Plug-ins for robench: after `pip install ./examples/robench-example`, `robench list` and `check plugin` find them."""
