"""The sample stage: what generators make, embedded."""
