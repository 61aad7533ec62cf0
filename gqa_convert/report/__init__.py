"""One self-contained page, plots and a model card from what was measured."""

from gqa_convert.rooms import call_through

call_through(__name__)
