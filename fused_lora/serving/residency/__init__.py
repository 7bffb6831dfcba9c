"""Which adapters are known, where they are in memory, and how they get to the device."""
