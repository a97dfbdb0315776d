"""Building, checking and releasing a generation."""
