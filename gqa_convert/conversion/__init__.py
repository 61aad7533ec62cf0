"""A conversion from plan to written folder: what will be done, doing it, and checking that it was done."""
