"""The typed view of the JSON: settings, and what goes with what."""
