"""What runs fused and why, whether a merge is right, and whether this machine is."""
