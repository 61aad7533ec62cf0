"""All that meets transformers beyond its public classes: private calls, loading, single layers."""
