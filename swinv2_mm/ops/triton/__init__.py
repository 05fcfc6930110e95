"""Window attention by Triton kernels of our own. Importing this package does not import Triton."""
