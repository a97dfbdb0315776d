"""How well generators are found by what they make: `probelog-index evaluate --kind generator`."""
