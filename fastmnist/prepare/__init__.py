"""From a source to `.beton` files."""
