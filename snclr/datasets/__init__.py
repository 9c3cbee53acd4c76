"""Image sets: where they come from, decoding, and the crops that are cut out of them."""
