"""Weights from and for other libraries.

layouts.py reads a file into named tensors, load.py puts them into a backbone, and libraries.py
describes the files that other libraries read; snclr.export writes those.
"""
