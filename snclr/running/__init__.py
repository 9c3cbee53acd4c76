"""What keeps a run alive: processes, checkpoints, logs, signals, errors."""
