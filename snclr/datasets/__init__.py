"""Where images come from: sets, their sources, decoding."""
