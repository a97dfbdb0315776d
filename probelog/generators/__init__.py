"""Models that make pictures: which ones are run, how they are built from untrusted files, and how they are sampled."""
