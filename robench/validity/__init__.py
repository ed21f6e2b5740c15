"""Whether a plug-in keeps its contract, and whether a number can be believed."""
