"""Fuzz targets of every reader of files from outside: see ``run.py``."""
