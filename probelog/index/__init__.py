"""The published index: its tables, its pointer, and the generations that readers open."""
