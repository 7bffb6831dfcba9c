"""What torch sees: argument checks, custom operators, the CPU path, gradients, and the choice of a kernel."""
