"""The embedded default: a small MHA checkpoint, the text it was trained on, and the run that converts it."""
