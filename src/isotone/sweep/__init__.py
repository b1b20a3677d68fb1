"""``isotone sweep``: tries settings of arms, chooses on validation text, and writes an experiment of the best."""
