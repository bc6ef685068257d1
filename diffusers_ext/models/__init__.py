"""Networks that papers bring: one file a network."""
