"""Weights in fewer bits: a file per format, with quantize, dequantize and the linear that takes `nn.Linear`'s place."""
