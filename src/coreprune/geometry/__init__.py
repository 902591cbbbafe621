"""Convex geometry on point clouds: tensors in, tensors out, float64 inside, no nn.Module."""
