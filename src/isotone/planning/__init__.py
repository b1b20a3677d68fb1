"""What an experiment will take, in time, memory and disk, against limits, before anything runs. Imports no torch."""
