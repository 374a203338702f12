"""One loop for every method: recipes, objectives, batches, checkpoints, finished runs."""
