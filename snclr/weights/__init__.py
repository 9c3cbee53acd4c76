"""Weights from and for other libraries.

layouts.py reads a file into named tensors, load.py puts them into a backbone, libraries.py
describes the files that other libraries read, and files.py writes those.
"""
