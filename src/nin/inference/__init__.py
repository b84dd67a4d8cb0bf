"""A trained network in use: on a few images, on any number of them, on a test set."""
