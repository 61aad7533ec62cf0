"""The parts of `fuzz.py` and `kill_conversions.py`: tiny models, ways to damage them, and what is watched meanwhile."""
