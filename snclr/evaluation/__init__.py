"""Evaluates frozen features and fine-tunes encoders."""
