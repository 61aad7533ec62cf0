"""The contract: what the converter claims of a family, proven on tiny random models rather than listed."""
