"""The LoRA linear: operator, plan, kernel launches and the eager path."""
