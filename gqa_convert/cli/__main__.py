"""`python -m gqa_convert.cli`: the same as `gqa`."""

from __future__ import annotations

from gqa_convert.cli.main import main

if __name__ == "__main__":
    main()
