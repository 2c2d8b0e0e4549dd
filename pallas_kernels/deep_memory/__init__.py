"""A matrix that learns by gradient steps with momentum, its gradients frozen for chunks of tokens."""
