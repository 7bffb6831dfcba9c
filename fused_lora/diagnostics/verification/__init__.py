"""The parts of ``fused_lora.verify``: layers in both states, error bounds, weights against a reference, the report."""
