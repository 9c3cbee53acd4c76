"""Soft-neighbour contrastive learning (SNCLR, ICLR 2023): images to views to encoder to heads to bank to objective."""

__version__ = "0.1.0"
