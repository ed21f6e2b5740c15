"""Training: recipes as data, one loop for every defense, exact resume."""
