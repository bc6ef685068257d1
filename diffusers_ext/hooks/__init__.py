"""Inference hooks: one file a method, on the shared plan of what is computed when (`_plan`)."""
