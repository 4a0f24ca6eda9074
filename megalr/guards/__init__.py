"""Guards of a training run: updates that had better not be made, and ranks that have drifted apart."""
