"""Image sets: opening them, decoding images, and cutting crops out of them."""
