"""Runs an experiment as jobs of a Slurm cluster. Starts commands, and imports no torch."""
