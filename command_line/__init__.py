"""The command line of `compress_classifier.py`: its flags, and what it writes to. Needs no torch."""
