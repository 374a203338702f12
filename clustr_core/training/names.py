"""The files of a run; read without PyTorch."""

CHECKPOINT, WEIGHTS, HISTORY, DONE = "checkpoint.safetensors", "model.safetensors", "history.csv", "run.json"
