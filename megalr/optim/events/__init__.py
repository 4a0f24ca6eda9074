"""What the optimizer does beside its updates, one file for each kind of event."""
