"""Weights from and for other libraries.

layouts.py reads a file into named tensors, public.py finds public weights by name, and load.py puts
them into a backbone. libraries.py and hf.py describe the files that other libraries read, card.py
the model card; snclr.export writes them.
"""
