"""nn.Module drop-ins and what works on a whole model: configs, targets, injection, merging."""
