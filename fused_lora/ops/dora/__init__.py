"""What DoRA adds to LoRA: row norms of the adapted weight, and a dropped input for the base."""
