"""Weight files read as data: repositories on disk, safetensors, digests and sketches."""
