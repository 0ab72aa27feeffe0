import utils  # noqa: F401  # before PyTorch, see there
