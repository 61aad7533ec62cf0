"""One self-contained page, plots and a model card from what was measured."""
