"""The process that forks, once for each model: its own side, and that of whoever asks it."""
