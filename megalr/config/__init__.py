"""The typed view of the JSON: sections, reading them, and what goes with what."""
