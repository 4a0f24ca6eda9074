"""Update rules: pure functions on tensors that know nothing of ranks, DeepSpeed or files."""
