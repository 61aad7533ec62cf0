"""Every command, one file per job, and what its results look like on a terminal."""
