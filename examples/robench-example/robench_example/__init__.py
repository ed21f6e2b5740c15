"""Plug-ins for robench: `pip install ./examples/robench-example`; `robench list` and `robench check` find them."""
