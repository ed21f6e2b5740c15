"""Whether a plug-in, a model or a number can be believed."""
