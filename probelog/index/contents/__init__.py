"""What a generation holds, a module for each subject: base classes of ``probelog.index.generation.Generation``."""
