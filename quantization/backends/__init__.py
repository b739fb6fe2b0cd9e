"""Who computes a quantizer: the reference, or Triton kernels with the same bits."""
