"""robench: the adversarial robustness of ensembles, measured so that the number can be checked."""
