import lingua.parallel.torchrun  # noqa: F401  before torch, which takes seconds to import
