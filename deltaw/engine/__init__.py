"""The run: objective, flat factors, loop, checkpoints, evaluation, generation, and the folder that holds it all."""
