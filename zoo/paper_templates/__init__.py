"""The files of a new paper as ``zoo new`` writes them, with names to be put in behind ``$``."""
