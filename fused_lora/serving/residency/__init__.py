"""Which adapters are known, which lie in memory, and how they get to the device."""
