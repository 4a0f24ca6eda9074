"""What a run holds in memory: by formula, and as measured on an engine."""
